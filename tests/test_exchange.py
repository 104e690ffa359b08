"Heads that exchange parts."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from scan_nb import exchange
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics
from scan_nb.exchange import exchange_parts, shared_parts
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import train_heads

pytestmark = pytest.mark.usefixtures('one_thread')
QUICK = dict(n_heads=8, epochs=30, batch_size=64)

def blobs(sizes=(60, 60, 60), dim=6, seed=0):
    "Far apart, in an order that tells nothing: embeddings, neighbors, labels."
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centers = 6*rng.standard_normal((len(sizes), dim))
    z = torch.tensor(centers[labels] + rng.standard_normal((len(labels), dim))).float()
    return z, mine_neighbors(z, 5), torch.tensor(labels)

def accuracy(found, z, labels): return cluster_metrics(found.heads(z)[found.best].argmax(1), labels)['acc']

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 9), st.integers(0, 999))
def test_shared_parts(c, n, mixed, seed):
    "Groups that are linked by a tenth of the smaller cluster, found here one cluster after the other."
    rng = np.random.default_rng(seed)
    one = rng.integers(0, c, n)
    other = np.where(rng.random(n) < mixed/10, rng.integers(0, c, n), rng.permutation(c)[one])
    count = np.array([[((one == a) & (other == b)).sum() for b in range(c)] for a in range(c)])
    want, left = [], set(range(c))
    while left:
        own, others = {min(left)}, set()
        for _ in range(2*c):
            others |= {b for a in own for b in range(c)
                       if count[a, b] > .1*min(count[a].sum(), count[:, b].sum())}
            own |= {a for b in others for a in range(c)
                    if count[a, b] > .1*min(count[a].sum(), count[:, b].sum())}
        left -= own
        if 1 < len(own) == len(others) < c: want.append((sorted(own), sorted(others)))
    assert sorted(shared_parts(torch.tensor(one), torch.tensor(other), c)) == sorted(want)

def pixels():
    data = digits()
    z = data.images.flatten(1).float()
    return z, mine_neighbors(z, 5), data.labels

def test_an_exchange_finds_what_no_head_had():
    z, near, labels = pixels()
    first = train_heads(z, near, 10, n_heads=16, epochs=20, batch_size=128)
    found = exchange_parts(first, z, near, rounds=4)
    assert found.losses.median() < first.losses.min()
    assert accuracy(found, z, labels) > accuracy(first, z, labels)

def test_a_child_is_one_parent_but_for_a_part_of_another():
    z, near, _ = pixels()
    first = train_heads(z, near, 10, n_heads=16, epochs=5)
    with torch.no_grad(): clusters = first.heads(z).argmax(-1)
    found = exchange._children(first.heads, first.losses, clusters, torch.Generator().manual_seed(0))
    whole = torch.cat([found.weight, found.bias], 1).detach()
    given = torch.cat([first.heads.weight, first.heads.bias], 1).detach()[first.losses.argsort()[:8]]
    assert torch.equal(whole[:8], given) and len(whole) == 16
    columns = given.transpose(1, 2).reshape(-1, given.shape[1])
    for child in whole[8:]:
        same = (child.T[:, None] == columns).all(-1)            # of each cluster: columns that it may be
        assert same.any(1).all()
        kept = same.view(10, 8, 10).any(-1).sum(0)                   # clusters from each parent
        assert kept.max() < 10 and kept.topk(2).values.sum() >= 10   # two parents are enough

def test_no_round_changes_nothing_and_the_given_heads_stay():
    z, near, _ = blobs()
    first = train_heads(z, near, 3, **QUICK)
    before = first.heads.weight.detach().clone()
    same = exchange_parts(first, z, near, rounds=0)
    torch.testing.assert_close(same.heads.weight, first.heads.weight)
    torch.testing.assert_close(same.losses, first.losses)
    assert same.best == first.best
    a, b, c = (exchange_parts(first, z, near, rounds=2, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.heads.weight, before)
    assert torch.equal(a.heads.weight, b.heads.weight) and not torch.equal(a.heads.weight, c.heads.weight)

@pytest.mark.parametrize('n_heads', [1, 2, 3])
def test_few_heads_or_all_alike(n_heads):
    z, near, labels = blobs()
    first = train_heads(z, near, 3, **QUICK | dict(n_heads=n_heads))
    found = exchange_parts(first, z, near, rounds=2)
    assert 1 <= len(found.losses) <= n_heads and accuracy(found, z, labels) > .95

def test_exchange_with_other_objective_prior_and_choice():
    z, near, labels = blobs((120, 40, 20))
    first = train_heads(z, near, 3, prior=torch.tensor([120., 40., 20.]), **QUICK)
    found = exchange_parts(first, z.double().numpy(), near, rounds=2, choose='both')
    assert accuracy(found, z, labels) >= accuracy(first, z, labels) and torch.equal(found.prior, first.prior)
    z, near, labels = blobs()
    first = train_heads(z, near, 3, objective='temi', **QUICK)
    found = exchange_parts(first, z, near, rounds=2, objective='temi')
    assert accuracy(found, z, labels) > .95

def test_seeds_agree_on_pixels():
    "Seeds of the heads agree more after the exchange."
    z, near, labels = pixels()
    drawn = [train_heads(z, near, 10, n_heads=16, epochs=30, seed=seed) for seed in range(3)]
    better = [exchange_parts(first, z, near, rounds=4, seed=seed) for seed, first in enumerate(drawn)]
    def agree(found):
        clusters = [f.heads(z)[f.best].argmax(1) for f in found]
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
        return (np.mean([normalized_mutual_info_score(a, b) for a, b in pairs]),
                np.mean([cluster_metrics(c, labels)['acc'] for c in clusters]))
    (steady, good), (varied, fair) = agree(better), agree(drawn)
    assert steady > varied + .02 and good > fair + .02

def test_does_not_touch_other_random_numbers():
    z, near, _ = blobs()
    first = train_heads(z, near, 3, **QUICK)
    torch.manual_seed(1)
    exchange_parts(first, z, near, rounds=2)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))

def test_images_that_are_all_the_same():
    z, near = torch.ones(40, 4), torch.arange(40).roll(1)[:, None]
    found = exchange_parts(train_heads(z, near, 3, **QUICK), z, near, rounds=2)
    assert found.heads.weight.isfinite().all() and found.losses.isfinite().all()

@pytest.mark.parametrize('change, words', [
    (dict(objective='luck'), "give 'scan' or 'temi'"), (dict(entropy_weight=-1.), 'entropy weight'),
    (dict(choose='luck'), "give 'loss', 'agreement' or 'both'")])
def test_exchange_refuses(change, words):
    z, near, _ = blobs()
    first = train_heads(z, near, 3, n_heads=4, epochs=2, batch_size=64)
    with pytest.raises(UserError, match=words): exchange_parts(first, z, near, rounds=1, **change)
