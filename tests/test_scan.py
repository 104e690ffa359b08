"The SCAN loss, its heads and the stage that trains the whole network."

import copy, itertools, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import normalized_mutual_info_score
from scan_nb import scan
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics, label_free_metrics
from scan_nb.models import ClusterHeads, ClusteringModel, small_resnet
from scan_nb.neighbors import embed
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import (
    choose_head,
    clustering_health,
    diagnose,
    estimate_prior,
    find_prior,
    got_worse,
    head_agreement,
    logits_of,
    mean_entropy,
    random_partners,
    scan_loss,
    temi_loss,
    train_heads,
    train_scan,
    unstandardize,
    validate_scan,
)
from scan_nb.training import Checkpoint, CosineSchedule, make_generator


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


def temi_reference(logits, beta):
    "Float64, head by head and pair by pair: anchors, neighbors, then what the teachers say of both."
    p, q, p_slow, q_slow = (x.double().softmax(-1).numpy() for x in logits)
    mean = np.concatenate([p_slow, q_slow], 1).mean(1)
    weight = [np.mean([np.dot(a, b) for a, b in zip(p_slow[:, i], q_slow[:, i])]) for i in range(p.shape[1])]

    def information(own, other):
        return [np.mean([w * np.log(np.sum((own[h, i] * other[h, i]) ** beta / mean[h]))
                         for i, w in enumerate(weight)]) for h in range(len(own))]

    return -(np.array(information(p, q_slow)) + np.array(information(q, p_slow))) / 2


@given(
    seed=st.integers(0, 10**6),
    h=st.integers(1, 4),
    b=st.integers(1, 20),
    c=st.integers(2, 9),
    beta=st.floats(0.5, 1),
    scale=st.floats(0.01, 20),
)
@settings(max_examples=60, deadline=None)
def test_temi_equals_brute_force_and_teaches_only_the_heads(seed, h, b, c, beta, scale):
    logits = [draw(seed + i, h, b, c, scale=scale).requires_grad_(i < 2) for i in range(4)]
    loss = temi_loss(*logits, beta)
    np.testing.assert_allclose(loss.detach(), temi_reference([x.detach() for x in logits], beta), 1e-3, 1e-3)
    loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in logits[:2])
    swapped = temi_loss(*(logits[i] for i in (1, 0, 3, 2)), beta)
    torch.testing.assert_close(swapped, loss)


def test_temi_stays_finite_where_probabilities_vanish():
    far = torch.tensor([[[300.0, 0.0], [0.0, 300.0]]], requires_grad=True)
    loss = temi_loss(far, far.flip(1), far.detach(), far.detach().flip(1))
    loss.sum().backward()
    assert loss.isfinite().all() and far.grad.isfinite().all()


def test_temi_heads_find_separate_groups_and_follow_slowly(blobs):
    z, neighbors, labels = blobs
    options = dict(n_heads=8, epochs=60, batch_size=50, objective='temi')
    found, again = (train_heads(z, neighbors, 5, entropy_weight=weight, **options) for weight in (5, 9))
    assert torch.equal(found.heads.weight, again.heads.weight) and torch.equal(found.losses, again.losses)
    assert cluster_metrics(found.heads(z)[found.best].argmax(-1), labels)['acc'] == 1
    assert {'loss', 'consistency', 'entropy'} <= found.history[0].keys()
    heads = ClusterHeads(8, 5, 2)
    follow, start = scan._teachers(heads, None), copy.deepcopy(heads)
    torch.testing.assert_close(torch.cat(follow(z), 1), start(z))
    with torch.no_grad():
        heads.weight += 1
    torch.testing.assert_close(torch.cat(follow(z), 1), start(z) + 0.2 * z.sum(1)[:, None])


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


@pytest.mark.parametrize('size', [1.0, 20.0, 200.0])
@pytest.mark.parametrize('c', [2, 10, 1000])
def test_losses_are_exact_when_probabilities_underflow(size, c):
    "Logits of ±size against float64 in log space; the training loss and that over all pairs."
    logits = size * torch.sign(draw(c, 30, c)) + draw(1, 30, c)
    neighbors = torch.randint(30, (30, 4), generator=make_generator(0))
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p[:, None] + log_p[neighbors]).logsumexp(-1).mean()
    found = validate_scan(logits, neighbors, 5.0)
    assert found.consistency.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    assert found.entropy.item() == pytest.approx(mean_entropy(log_p).item(), abs=1e-5)
    pairs = scan_loss(logits, logits[neighbors[:, 0]])
    exact = -(log_p + log_p[neighbors[:, 0]]).logsumexp(-1).mean()
    assert pairs.consistency.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)


def test_agreement_of_many_images_is_summed_in_parts():
    clusters = torch.randint(40, (30, 9000), generator=make_generator(0))
    exact = normalized_mutual_info_score(clusters[0], clusters[1])
    assert head_agreement(clusters[:2], 40)[0].item() == pytest.approx(exact, abs=1e-6)
    alone = [head_agreement(clusters[[0, i]], 40)[0].item() for i in range(1, 30)]
    assert head_agreement(clusters, 40)[0].item() == pytest.approx(np.mean(alone), abs=1e-9)


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
    "Many poor heads agree with each other; of the three good ones two agree."
    good, poor = draw(0, 3, 400).argmax(0), draw(1, 3, 400).argmax(0)
    odd = torch.where(torch.arange(400) < 150, draw(2, 3, 400).argmax(0), good)
    clusters = torch.stack([poor] * 9 + [odd, good, good])
    losses = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 5.5, 6.5, 7.5, 8.5, 1.0, 3.0, 2.0])
    assert [choose_head(losses, clusters, 3, c) for c in ('loss', 'both')] == [9, 11]
    assert choose_head(losses, clusters, 3, 'agreement') < 9
    assert choose_head(losses[:1], clusters[:1], 3, 'both') == 0
    with pytest.raises(UserError, match="choose is 'luck'"):
        choose_head(losses, clusters, 3, 'luck')


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


def test_decay_keeps_heads_small_and_changes_nothing_at_zero(blobs):
    z, neighbors, labels = blobs
    options = dict(n_heads=4, epochs=40, batch_size=50)
    plain, none, some = (train_heads(z, neighbors, 5, **options, **o) for o in ({}, dict(weight_decay=0.0),
                                                                               dict(weight_decay=0.2)))
    assert torch.equal(plain.heads.weight, none.heads.weight)
    assert some.heads.weight.norm() < 0.8 * plain.heads.weight.norm()
    assert cluster_metrics(some.heads(z)[some.best].argmax(-1), labels)['acc'] == 1


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


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(z=math.nan), 'must be finite'),
        (dict(z=math.inf), 'must be finite'),
        (dict(kind=torch.bool), 'do not belong'),
        (dict(kind=torch.float32), 'do not belong'),
        (dict(entropy_weight=math.nan), 'entropy weight is nan'),
        (dict(entropy_weight=-1.0), 'entropy weight is -1'),
        (dict(objective='dino'), "objective is 'dino': give 'scan' or 'temi'"),
        (dict(objective='temi', prior='estimate'), "'temi' has no prior"),
    ],
    ids=str,
)
def test_wrong_numbers_for_heads_come_before_the_first_epoch(blobs, change, words):
    z, neighbors, _ = blobs
    z = z.clone()
    z[3, 1] = change.pop('z', 0.0)
    kind = change.pop('kind', torch.int64)
    with pytest.raises(UserError, match=words):
        train_heads(z, neighbors.to(kind), 5, epochs=1, n_heads=2, **change)


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
        (dict(effective_clusters=1.0, balance=0.1), 'into one cluster: raise the entropy weight'),
        (dict(effective_clusters=4.0, balance=0.4), 'about 4.0 clusters are in use where 10.0 are'),
        (dict(effective_clusters=2.0, balance=0.5), 'about 2.0 clusters are in use where 4.0 are'),
        (dict(effective_clusters=1.0, balance=1.0), ''),
        (dict(agreement=0.2), 'Fewer than half of the neighbors'),
        (dict(confidence=0.3), 'undecided'),
    ],
)
def test_diagnosis_in_words(change, words):
    found = diagnose(dict(effective_clusters=9.9, balance=0.99, agreement=0.9, confidence=0.9) | change, 10)
    assert words in found and bool(words) == bool(found)


def test_advice_fits_the_cause():
    collapsed = dict(effective_clusters=1.0, balance=0.1, agreement=0.9, confidence=0.3)
    assert 'raise the entropy weight, 0.5 now' in diagnose(collapsed, 10, 0.5)
    assert 'copies of one another' in diagnose(collapsed, 10, alike=True)
    assert 'raise' not in diagnose(collapsed, 10, alike=True)
    assert 'lower the entropy weight, 5 now' in diagnose(collapsed, 10)
    assert 'lower' not in diagnose(collapsed, 10, 0.0)


def test_got_worse():
    before = dict(effective_clusters=10.0, balance=1.0, agreement=0.9)
    assert got_worse(before, before) == ''
    fewer = before | dict(effective_clusters=9.0)
    assert got_worse(before, fewer) == ''  # as uneven as the prior says
    assert 'effective clusters fell' in got_worse(before, fewer | dict(balance=0.9))
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


def test_large_images_are_judged_in_the_size_of_their_views(small):
    images, neighbors, model, views = small
    large, trained, sizes = torch.nn.functional.pad(images, (3, 3, 2, 2)), copy.deepcopy(model), set()
    trained.register_forward_pre_hook(lambda module, x: sizes.add(tuple(x[0].shape[2:])))
    options = dict(epochs=1, batch_size=50, lr=0., prior='estimate', remine_every=1)
    train_scan(trained, large, neighbors, views, **options)
    assert sizes == {(8, 8)}


def test_stage_refuses_foreign_neighbors(small):
    images, neighbors, model, views = small
    with pytest.raises(UserError, match='do not belong to 100 images'):
        train_scan(copy.deepcopy(model), images[:100], neighbors, views, epochs=1)


# ---- a prior in place of equal sizes


def balance(mean, prior):
    "ln C - KL, of the matching of clusters and sizes with the smallest KL, by trying all; float64."
    prior, c = prior / prior.sum(), len(prior)
    orders = itertools.permutations(range(c))
    return max(math.log(c) - np.sum(mean * np.log(mean / prior[list(o)])) for o in orders)


@given(seed=st.integers(0, 10**6), b=st.integers(1, 20), c=st.integers(2, 5), scale=st.floats(0.01, 5))
@settings(max_examples=40, deadline=None)
def test_prior_is_the_smallest_kl_of_all_matchings(seed, b, c, scale):
    a, n, g = draw(seed, b, c, scale=scale), draw(seed + 1, b, c, scale=scale), make_generator(seed)
    prior = torch.rand(c, generator=g) + 0.01
    loss, (_, consistency, _) = scan_loss(a, n, 5.0, prior), reference(a, n, 5.0)
    exact = balance(a.double().softmax(-1).mean(0).numpy(), prior.double().numpy())
    assert loss.entropy.item() == pytest.approx(exact, abs=1e-4) and exact <= math.log(c) + 1e-9
    assert loss.total.item() == pytest.approx(consistency - 5 * exact, abs=1e-3)


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), c=st.integers(2, 8), size=st.floats(0.1, 100))
@settings(max_examples=30, deadline=None)
def test_neither_the_order_nor_the_unit_of_a_prior_matters(seed, heads, c, size):
    a, n, g = draw(seed, heads, 20, c), draw(seed + 1, heads, 20, c), make_generator(seed)
    prior, order = torch.rand(c, generator=g) + 0.1, torch.randperm(c, generator=g)
    expected, other_unit = scan_loss(a, n, 5.0, prior), size * prior[order]
    for found in (scan_loss(a[..., order], n[..., order], 5.0, prior), scan_loss(a, n, 5.0, other_unit)):
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-5)
    equal, plain = scan_loss(a, n, 5.0, torch.full((c,), size)), scan_loss(a, n, 5.0)
    for x, y in zip(equal, plain):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_prior_has_a_gradient_everywhere():
    prior, neighbor = torch.tensor([5.0, 3.0, 1.0]), draw(1, 6, 3)
    for logits in (torch.zeros(6, 3), 1e4 * torch.eye(3)[[0] * 6], draw(0, 6, 3)):
        x = logits.clone().requires_grad_()
        scan_loss(x, neighbor, 5.0, prior).total.backward()
        assert torch.isfinite(x.grad).all() and (x.grad.abs().sum() > 0) == (logits.max() < 1e3)
    x = draw(0, 6, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mean_entropy(x.log_softmax(-1), prior), x)


def test_validation_and_health_know_the_prior(blobs):
    _, neighbors, labels = blobs
    sure = 30 * torch.eye(5)[torch.tensor([0, 0, 0, 3, 4])[labels]]
    prior = torch.tensor([0.2, 0.6, 0.2, 1e-4, 1e-4])
    loss = validate_scan(sure, neighbors, 5.0, prior=prior)
    assert loss.total.item() == pytest.approx(-5 * math.log(5), abs=0.01)
    assert validate_scan(sure, neighbors, 5.0).total > loss.total + 1
    known, unknown = (clustering_health(sure, neighbors, prior=p) for p in (prior, None))
    assert known['balance'] == pytest.approx(1, abs=0.01) and unknown['balance'] < 0.6
    assert known['effective_clusters'] == unknown['effective_clusters']
    assert known['effective_clusters'] == label_free_metrics(sure.softmax(1))['effective_clusters']
    assert diagnose(clustering_health(sure, neighbors, prior=prior), 5) == ''
    assert clustering_health(sure, neighbors, prior=prior)['val_loss'] == pytest.approx(loss.total.item())


@pytest.mark.parametrize(
    'wrong',
    ['guess', [1, 2], torch.ones(4), torch.tensor([1, 1, 0.0]), torch.tensor([1, math.nan, 1]), [[1, 1, 1]]],
)
def test_wrong_priors(wrong):
    with pytest.raises(UserError, match="prior must be 'estimate' or 3 class sizes above 0"):
        find_prior(wrong, 3, None)


def test_prior_in_numbers():
    assert find_prior(None, 3, None) is None
    torch.testing.assert_close(find_prior([6, 3, 1], 3, None), torch.tensor([0.6, 0.3, 0.1]))
    assert find_prior(np.array([1.0, 1.0]), 2, None).tolist() == [0.5, 0.5]


@pytest.fixture(scope='module')
def uneven(blobs):
    "80, 40, 20, 10 and 5 points in five separate groups."
    z = draw(0, 5, 8, scale=5.0).repeat_interleave(torch.tensor([80, 40, 20, 10, 5]), 0)
    z = z + draw(1, 155, 8, scale=0.3)
    return z, mine_neighbors(z, 4), torch.arange(5).repeat_interleave(torch.tensor([80, 40, 20, 10, 5]))


def test_sizes_of_separate_groups_are_found_without_labels(uneven):
    z, _, labels = uneven
    found = estimate_prior(z[torch.randperm(155, generator=make_generator(0))], 5)
    torch.testing.assert_close(found, labels.bincount() / 155)
    assert estimate_prior(torch.eye(6).repeat(2, 1), 6).tolist() == pytest.approx([1 / 6] * 6)
    outlier = torch.cat([z[:80], -100 * torch.ones(1, 8)])
    assert estimate_prior(outlier, 2)[1] == pytest.approx(0.05 / (0.05 + 80 / 81))


def test_heads_with_a_prior_find_groups_of_unequal_size(uneven):
    z, neighbors, labels = uneven
    options = dict(n_heads=16, epochs=60, batch_size=75)
    for prior in ('estimate', labels.bincount()):
        found = train_heads(z, neighbors, 5, prior=prior, **options)
        with torch.no_grad():
            clusters = found.heads(z)[found.best].argmax(-1)
        assert cluster_metrics(clusters, labels)['acc'] > 0.95
        torch.testing.assert_close(found.prior, labels.bincount() / 155)
    equal = train_heads(z, neighbors, 5, **options)
    assert equal.prior is None
    with torch.no_grad():
        clusters = equal.heads(z)[equal.best].argmax(-1)
    assert cluster_metrics(clusters, labels)['acc'] < 0.8


# ---- cached views


def test_one_view_that_is_the_image_changes_only_the_draws(blobs):
    z, neighbors, labels = blobs
    options = dict(n_heads=4, epochs=30, batch_size=64)
    views = torch.stack([z, z + 0.1 * draw(5, *z.shape)])
    a, b = (train_heads(z, neighbors, 5, views=views, **options) for _ in range(2))
    assert torch.equal(a.heads.weight, b.heads.weight)
    assert not torch.equal(a.heads.weight, train_heads(z, neighbors, 5, **options).heads.weight)
    with torch.no_grad():
        assert cluster_metrics(a.heads(z)[a.best].argmax(-1), labels)['acc'] == 1


def test_all_views_are_used_by_anchor_and_neighbor(blobs):
    z, neighbors, _ = blobs
    views = torch.stack([z, z, torch.full_like(z, torch.nan)])
    with pytest.raises(FloatingPointError):
        train_heads(z, neighbors, 5, views=views, n_heads=1, epochs=1)


def test_views_of_other_embeddings(blobs):
    z, neighbors, _ = blobs
    for wrong in (z, z[None, :-1], z[None, :, :-1]):
        with pytest.raises(UserError, match='do not belong to embeddings of shape'):
            train_heads(z, neighbors, 5, views=wrong, n_heads=1, epochs=1)


# ---- switches of the stage


def several(model, n_heads=3):
    torch.manual_seed(1)
    many = ClusteringModel(copy.deepcopy(model.backbone), 10, n_heads)
    return many


def test_head_only_leaves_the_backbone_alone(small):
    images, neighbors, model, views = small
    trained = several(model, 1)
    before = copy.deepcopy(trained.state_dict())
    train_scan(trained, images, neighbors, views, epochs=2, batch_size=50, lr=1e-2, head_only=True)
    for name, x in trained.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith('backbone'), name
    assert all(p.grad is None and p.requires_grad for p in trained.backbone.parameters())
    sgd = torch.optim.SGD(trained.parameters(), lr=0.1, weight_decay=0.1)
    train_scan(trained, images, neighbors, views, epochs=1, batch_size=50, head_only=True, optimizer=sgd)
    assert all(torch.equal(x, before[n]) for n, x in trained.state_dict().items() if n.startswith('backbone'))


def test_of_several_heads_the_best_stays(small):
    images, neighbors, model, views = small
    trained, seen = several(model), []
    def look(epoch):
        seen.append(validate_scan(logits_of(trained, images, head=None), neighbors).total)
    result = train_scan(trained, images, neighbors, views, epochs=2, batch_size=50, lr=1e-2, monitor=look,
                        tolerance=2.0)
    assert result.kept and trained.cluster_head.weight.shape[0] == 1 and not trained.training
    assert result.history[-1]['head'] == seen[-1].argmin()
    assert result.history[-1]['val_loss'] == pytest.approx(seen[-1].min().item(), abs=1e-4)
    left = validate_scan(logits_of(trained, images), neighbors).total
    assert left.item() == pytest.approx(seen[-1].min().item(), abs=1e-4)


def test_several_heads_that_were_ruined_give_the_best_of_before(small):
    images, neighbors, model, views = small
    trained, start = several(model), several(model)
    losses = validate_scan(logits_of(start, images, head=None), neighbors).total
    result = train_scan(trained, images, neighbors, views, epochs=1, batch_size=50, tolerance=-9.0)
    assert not result.kept
    assert torch.equal(trained.cluster_head.weight[0], start.cluster_head.weight[losses.argmin()])


def test_all_logits(small):
    images, _, model, _ = small
    many = several(model)
    every = logits_of(many, images, 64, head=None)
    assert every.shape == (3, 200, 10)
    for head in range(3):
        torch.testing.assert_close(logits_of(many, images, head=head), every[head])
    assert torch.equal(logits_of(many, images), logits_of(many, images, head=0))


def test_ready_made_optimizer_and_schedule(small):
    images, neighbors, model, views = small
    options = dict(epochs=2, batch_size=50, seed=1)
    ours, theirs = several(model, 1), several(model, 1)
    train_scan(ours, images, neighbors, views, lr=1e-3, **options)
    adam = torch.optim.Adam(theirs.parameters(), 1e-3, weight_decay=1e-4)
    train_scan(theirs, images, neighbors, views, optimizer=adam, **options)
    assert all(torch.equal(x, y) for x, y in zip(ours.state_dict().values(), theirs.state_dict().values()))
    sgd = torch.optim.SGD(theirs.parameters(), 0.01)
    constant = CosineSchedule(sgd, 8, final=1.0)
    rows = train_scan(theirs, images, neighbors, views, optimizer=sgd, schedule=constant, **options).history
    assert [row['lr'] for row in rows] == [0.01, 0.01] and constant.t == 8
    for wrong in (None, adam):
        with pytest.raises(UserError, match='belongs to another optimizer'):
            train_scan(theirs, images, neighbors, views, optimizer=wrong, schedule=constant, **options)


def test_neighbors_are_mined_anew_when_due(small):
    images, neighbors, model, views = small
    calls = []

    def mine(z, k):
        calls.append(z)
        return mine_neighbors(z, k)

    trained, states = several(model, 1), []
    train_scan(trained, images, neighbors, views, epochs=5, batch_size=50, lr=1e-3, remine_every=2, mine=mine,
               monitor=lambda epoch: states.append(embed(trained, images)), tolerance=2.0)
    assert len(calls) == 2
    torch.testing.assert_close(calls[0], states[1])
    torch.testing.assert_close(calls[1], states[3])
    plain, later = several(model, 1), several(model, 1)
    options = dict(batch_size=50, lr=1e-3, tolerance=2.0)
    a = train_scan(plain, images, neighbors, views, epochs=3, **options).history
    b = train_scan(later, images, neighbors, views, epochs=3, remine_every=2, **options).history
    assert a[:2] == b[:2] and a[2] != b[2]
    with pytest.raises(UserError, match='remine_every is -1'):
        train_scan(plain, images, neighbors, views, remine_every=-1)
    with pytest.raises(UserError, match='do not belong'):
        wrong = dict(epochs=1, remine_every=1, mine=lambda z, k: z[:, :k].long() - 9)
        train_scan(plain, images, neighbors, views, **wrong)


def test_mined_neighbors_and_heads_resume_to_the_bit(small, tmp_path):
    images, neighbors, model, views = small
    options = dict(epochs=4, batch_size=50, lr=1e-2, seed=1, remine_every=2, prior='estimate', tolerance=2.0)
    whole, first, again = several(model), several(model), several(model)
    a = train_scan(whole, images, neighbors, views, **options)
    checkpoint = dict(checkpoint=Checkpoint(tmp_path / 'scan.pt'))

    def kill(epoch):
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_scan(first, images, neighbors, views, monitor=kill, **checkpoint, **options)
    b = train_scan(again, images, neighbors, views, **checkpoint, **options)
    finished = several(model)
    c = train_scan(finished, images, neighbors, views, **checkpoint, **options)
    for trained, result in ((again, b), (finished, c)):
        assert result.history == a.history
        for x, y in zip(whole.state_dict().values(), trained.state_dict().values(), strict=True):
            assert torch.equal(x, y)

@pytest.mark.parametrize('scale', [1., 30., 200.])
def test_the_loop_over_pairs_is_the_stream(scale):
    g = torch.Generator().manual_seed(0)
    logits, near = scale*torch.randn(500, 7, generator=g), torch.randint(500, (500, 6), generator=g)
    lse, losses = logits.logsumexp(-1), torch.empty(500, dtype=torch.float64)
    p = (logits - lse[:, None]).exp()
    scan.in_threads(scan._pair_losses, 500, p, logits, lse, near, losses)
    pairs, mean = scan._stream_pairs(logits, lse, near, 100)
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p[:, None] + log_p[near]).logsumexp(-1)
    torch.testing.assert_close(losses, exact.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs, exact.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, log_p.exp().mean(0), rtol=1e-5, atol=1e-7)
