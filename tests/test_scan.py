"The SCAN loss, its heads and the stage that trains the whole network."

import copy, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import normalized_mutual_info_score
from scan_nb.augment import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics
from scan_nb.models import ClusterHeads, ClusteringModel, small_resnet
from scan_nb.neighbors import embed, mine_neighbors
from scan_nb.scan import (
    choose_head,
    clustering_health,
    diagnose,
    got_worse,
    head_agreement,
    mean_entropy,
    random_partners,
    scan_loss,
    train_heads,
    train_scan,
    unstandardize,
    validate_scan,
)
from scan_nb.training import Checkpoint, make_generator


def reference(a, b, weight):
    "Float64, pair by pair."
    p, q = (torch.as_tensor(x).double().softmax(-1).numpy() for x in (a, b))
    consistency = -np.mean([np.log(np.dot(p[i], q[i])) for i in range(len(p))])
    mean = p.mean(0)
    entropy = -sum(m * np.log(m) for m in mean if m > 0)
    return consistency - weight * entropy, consistency, entropy


def draw(seed, *shape, scale=3.0):
    return torch.randn(*shape, generator=make_generator(seed)) * scale


@pytest.fixture(scope='module')
def blobs():
    "Five separate groups of forty points in eight dimensions, and their neighbors."
    centers = draw(0, 5, 8, scale=5.0)
    z = centers.repeat_interleave(40, 0) + draw(1, 200, 8, scale=0.3)
    return z, mine_neighbors(z, 5), torch.arange(5).repeat_interleave(40)


@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 30),
    c=st.integers(2, 12),
    weight=st.floats(0, 20),
    scale=st.floats(0.01, 20),
)
@settings(max_examples=60, deadline=None)
def test_loss_equals_brute_force_and_keeps_its_bounds(seed, b, c, weight, scale):
    a, n = draw(seed, b, c, scale=scale), draw(seed + 1, b, c, scale=scale)
    loss = scan_loss(a, n, weight)
    for ours, exact in zip(loss, reference(a, n, weight)):
        assert ours.item() == pytest.approx(exact, rel=1e-3, abs=1e-3)
    assert loss.consistency >= -1e-5 and -1e-5 <= loss.entropy <= math.log(c) + 1e-5
    assert loss.total >= -weight * math.log(c) - 1e-3


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_heads_do_not_mix(seed, heads):
    a, n = draw(seed, heads, 20, 6), draw(seed + 1, heads, 20, 6)
    together = scan_loss(a, n)
    assert together.total.shape == (heads,)
    for h in range(heads):
        for one, many in zip(scan_loss(a[h], n[h]), together):
            torch.testing.assert_close(one, many[h])


def test_loss_is_finite_for_extreme_logits_and_half_precision():
    far = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    for dtype in (torch.float32, torch.bfloat16):
        x = far.to(dtype, copy=True).requires_grad_()
        loss = scan_loss(x, x.flip(0))
        assert loss.total.dtype == torch.float32 and torch.isfinite(loss.total)
        loss.total.backward()
        assert torch.isfinite(x.grad).all()


def test_perfect_even_clusters_reach_the_bound_and_collapse_does_not():
    sure = 50 * torch.eye(10).repeat(10, 1)
    assert scan_loss(sure, sure, 5.0).total.item() == pytest.approx(-5 * math.log(10), abs=1e-4)
    assert scan_loss(sure[:1].expand(100, 10), sure[:1].expand(100, 10), 5.0).total.item() == pytest.approx(
        0, abs=1e-4
    )


def test_gradient_matches_finite_differences():
    a, n = draw(3, 4, 3).double().requires_grad_(), draw(4, 4, 3).double().requires_grad_()

    def total(a, n):
        p, q = a.log_softmax(-1), n.log_softmax(-1)
        return -(p + q).logsumexp(-1).mean() - 5 * mean_entropy(p)

    assert torch.autograd.gradcheck(total, (a, n))
    ours = torch.autograd.grad(scan_loss(a, n, 5.0).total, (a, n))
    for x, y in zip(ours, torch.autograd.grad(total(a, n), (a, n))):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 40),
    k=st.integers(1, 5),
    block=st.integers(1, 50),
    heads=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_validation_is_all_pairs_whatever_the_block(seed, n, k, block, heads):
    logits, neighbors = draw(seed, heads, n, 4), torch.randint(n, (n, k), generator=make_generator(seed))
    found = validate_scan(logits, neighbors, 5.0, block)
    for h in range(heads):
        i = torch.arange(n).repeat_interleave(k)
        _, consistency, _ = reference(logits[h][i], logits[h][neighbors.flatten()], 5.0)
        _, _, entropy = reference(logits[h], logits[h], 5.0)
        assert found.consistency[h].item() == pytest.approx(consistency, abs=1e-4)
        assert found.total[h].item() == pytest.approx(consistency - 5 * entropy, abs=1e-3)


def test_agreement_is_the_mean_nmi_with_the_others():
    clusters = torch.randint(4, (6, 300), generator=make_generator(0))
    clusters[1] = (clusters[0] + 1) % 4
    found = head_agreement(clusters, 4)
    for i in range(6):
        exact = np.mean([normalized_mutual_info_score(clusters[i], clusters[j]) for j in range(6) if j != i])
        assert found[i].item() == pytest.approx(exact, abs=1e-6)
    assert head_agreement(clusters[:1], 4).tolist() == [1.0]


def test_collapsed_heads_have_no_agreement_and_no_error():
    clusters = torch.zeros(3, 50, dtype=torch.long)
    assert torch.isfinite(head_agreement(clusters, 4)).all()


def test_choose_head():
    losses, agreement = (
        torch.tensor([3.0, 1.0, 1.1, 5.0, 4.0, 6.0, 7.0, 8.0]),
        torch.tensor([0.1, 0.2, 0.5, 0.9, 0.1, 0.1, 0.1, 0.1]),
    )
    assert [choose_head(losses, agreement, c) for c in ('loss', 'agreement', 'both')] == [1, 3, 2]
    with pytest.raises(UserError, match="choose is 'luck'"):
        choose_head(losses, agreement, 'luck')


def test_folding_a_standardization_changes_no_logit():
    z = draw(0, 50, 8) * 7 + 3
    heads, mean, std = ClusterHeads(8, 4, 3), z.mean(0), z.std(0)
    before = heads((z - mean) / std)
    torch.testing.assert_close(unstandardize(heads, mean, std)(z), before, atol=1e-4, rtol=1e-4)


def test_partners_are_neighbors_and_all_of_them_come():
    neighbors = torch.arange(40).view(10, 4)
    drawn = torch.stack(
        [random_partners(neighbors, torch.tensor([2, 7]), make_generator(s)) for s in range(100)]
    )
    assert set(drawn[:, 0].tolist()) == {8, 9, 10, 11} and set(drawn[:, 1].tolist()) == {28, 29, 30, 31}


def test_heads_find_separate_groups_the_same_way_each_time(blobs):
    z, neighbors, labels = blobs
    a, b = (train_heads(z, neighbors, 5, n_heads=16, epochs=40, batch_size=64, seed=3) for _ in range(2))
    assert torch.equal(a.heads.weight, b.heads.weight) and a.best == b.best
    clusters = a.heads(z)[a.best].argmax(-1)
    assert (
        cluster_metrics(clusters, labels)['acc'] == 1 and cluster_metrics(clusters, labels)['n_clusters'] == 5
    )
    assert (a.losses >= -5 * math.log(5) - 1e-3).all() and a.losses[a.best] == a.losses.min()
    torch.testing.assert_close(validate_scan(a.heads(z), neighbors).total, a.losses, atol=1e-3, rtol=1e-3)
    other = train_heads(z, neighbors, 5, n_heads=16, epochs=1, batch_size=64, seed=4)
    assert not torch.equal(other.heads.weight, a.heads.weight)


def test_heads_leave_the_global_random_numbers_alone(blobs):
    z, neighbors, _ = blobs
    before = torch.get_rng_state()
    train_heads(z, neighbors, 5, n_heads=2, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_constant_features_and_more_clusters_than_groups_are_no_error(blobs):
    z, neighbors, _ = blobs
    constant = torch.cat([z, torch.ones(len(z), 2)], 1)
    trained = train_heads(constant, neighbors, 20, n_heads=2, epochs=2)
    assert torch.isfinite(trained.heads.weight).all() and torch.isfinite(trained.losses).all()


@pytest.mark.parametrize('k, message', [(1, 'n_clusters is 1'), (201, 'n_clusters is 201')])
def test_impossible_numbers_of_clusters(blobs, k, message):
    z, neighbors, _ = blobs
    with pytest.raises(UserError, match=message):
        train_heads(z, neighbors, k)


def test_neighbors_of_another_set(blobs):
    z, neighbors, _ = blobs
    for wrong in (neighbors[:-1], neighbors + 1, neighbors[:, 0]):
        with pytest.raises(UserError, match='do not belong to 200 images'):
            train_heads(z, wrong, 5)


def test_health_of_known_clusterings():
    neighbors = torch.tensor([[1], [0], [3], [2]])
    even = clustering_health(20 * torch.eye(2)[[0, 0, 1, 1]], neighbors)
    assert (
        even['agreement'] == 1
        and even['effective_clusters'] == pytest.approx(2)
        and even['confidence'] > 0.99
    )
    collapsed = clustering_health(20 * torch.eye(2)[[0, 0, 0, 0]], neighbors)
    assert collapsed['effective_clusters'] == 1 and collapsed['val_loss'] > even['val_loss']
    parted = clustering_health(20 * torch.eye(2)[[0, 1, 0, 1]], neighbors)
    assert parted['agreement'] == 0


@pytest.mark.parametrize(
    'change, words',
    [
        ({}, ''),
        (dict(effective_clusters=1.0), 'All images fell into one cluster'),
        (dict(effective_clusters=4.0), 'Only about 4.0 of 10'),
        (dict(agreement=0.2), 'Fewer than half of the neighbors'),
        (dict(confidence=0.3), 'undecided'),
    ],
)
def test_diagnosis_in_words(change, words):
    found = diagnose(dict(effective_clusters=9.9, agreement=0.9, confidence=0.9) | change, 10)
    assert words in found and bool(words) == bool(found)


def test_got_worse():
    before = dict(effective_clusters=10.0, agreement=0.9)
    assert got_worse(before, before) == ''
    assert 'effective clusters fell' in got_worse(before, before | dict(effective_clusters=9.0))
    assert 'agreement of neighbors fell' in got_worse(before, before | dict(agreement=0.8))


@pytest.fixture(scope='module')
def small():
    "A few digits, a tiny network, pixel neighbors."
    ds = digits()[:200]
    torch.manual_seed(0)
    model = ClusteringModel(small_resnet(1, (8, 16)), 10)
    views = SimCLRAugment(8, scale=(0.8, 1.2), flip_p=0.0)
    return ds.images, mine_neighbors(ds.images.flatten(1).float(), 5), model, views


def test_stage_is_deterministic_and_resumes_to_the_bit(small, tmp_path):
    images, neighbors, model, views = small
    options = dict(batch_size=50, lr=1e-3, seed=1)
    whole, first = copy.deepcopy(model), copy.deepcopy(model)
    a = train_scan(whole, images, neighbors, views, epochs=3, **options)

    class Killed(Exception):
        pass

    def kill(epoch):
        if epoch == 3:
            raise Killed
        return {}

    with pytest.raises(Killed):
        train_scan(
            first,
            images,
            neighbors,
            views,
            epochs=3,
            checkpoint=Checkpoint(tmp_path / 'scan.pt'),
            monitor=kill,
            **options,
        )
    again = copy.deepcopy(model)
    b = train_scan(
        again, images, neighbors, views, epochs=3, checkpoint=Checkpoint(tmp_path / 'scan.pt'), **options
    )
    for x, y in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(x, y)
    assert a.history == b.history and a.kept == b.kept and not whole.training


def test_stage_that_ruins_the_clusters_gives_them_back(small):
    images, neighbors, model, views = small
    z, ruined = embed(model, images), copy.deepcopy(model)
    trained = train_heads(z, mine_neighbors(z, 5), 10, n_heads=4, epochs=20, batch_size=100)
    ruined.cluster_head = trained.heads
    old = copy.deepcopy(ruined.select(trained.best).state_dict())
    result = train_scan(
        ruined, images, mine_neighbors(z, 5), views, epochs=2, batch_size=50, lr=1.0, entropy_weight=0.0
    )
    assert not result.kept
    for x, y in zip(old.values(), ruined.state_dict().values()):
        assert torch.equal(x, y)


def test_stage_refuses_foreign_neighbors(small):
    images, neighbors, model, views = small
    with pytest.raises(UserError, match='do not belong to 100 images'):
        train_scan(copy.deepcopy(model), images[:100], neighbors, views, epochs=1)
