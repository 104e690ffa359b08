"The SCAN loss, its heads and the stage that trains the whole network."

import copy, itertools, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import normalized_mutual_info_score
from scan_nb import scan
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics, label_free_metrics
from scan_nb.models import ClusterHeads, ClusteringModel, small_resnet
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.pairs import heads_loss
from scan_nb.scan import (
    _picker,
    choose_head,
    clustering_health,
    diagnose,
    head_agreement,
    logits_of,
    mean_entropy,
    random_partners,
    scan_loss,
    temi_loss,
    train_heads,
    unstandardize,
    validate_scan,
)
from scan_nb.training import make_generator


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


@given(
    seed=st.integers(0, 10**6),
    heads=st.integers(1, 4),
    b=st.integers(1, 20),
    c=st.integers(2, 8),
    weight=st.floats(0, 20),
    scale=st.floats(0.01, 20),
    sizes=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_closed_form_is_what_a_graph_finds(seed, heads, b, c, weight, scale, sizes):
    "Loss, terms and gradients of several heads, from logits of a hundredth to hundreds."
    w, bias = draw(seed, heads, 5, c, scale=scale), draw(seed + 1, heads, 1, c)
    z = draw(seed + 2, 2 * b, 5, scale=1.0)
    prior = torch.rand(c, generator=make_generator(seed)) + 0.01 if sizes else None
    grads = []
    for loss in (heads_loss, lambda w, bias, z, *rest: scan_loss(*(z @ w + bias).chunk(2, 1), *rest)):
        given = [x.clone().requires_grad_() for x in (w, bias)]
        found = loss(*given, z, weight, prior)
        grads.append([*found, *torch.autograd.grad(found[0] @ torch.arange(1.0, heads + 1), given)])
    size = max(x.abs().max() for x in grads[1])
    for ours, theirs in zip(*grads):
        assert ours.shape == theirs.shape and torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4 * max(1.0, size.item()))


@pytest.mark.parametrize('prior', [None, torch.tensor([5.0, 1.0, 3.0, 2.0])])
def test_the_closed_form_in_float64(prior):
    "By finite differences; each head has its own, and of the terms nothing has one."
    w, bias, z = (draw(i, *shape).double() for i, shape in enumerate([(3, 5, 4), (3, 1, 4), (14, 5)]))
    given = w.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, bias: heads_loss(w, bias, z, 2.0, prior)[0], given)
    total, consistency, entropy = heads_loss(*given, z, 2.0, prior)
    assert total.requires_grad and not consistency.requires_grad and not entropy.requires_grad
    first = torch.autograd.grad(total[0], w)[0]
    assert first[0].abs().sum() > 0 and not first[1:].any()


def test_the_closed_form_where_nothing_is_undecided():
    "Certain heads: in one cluster, evenly in all, and each pair apart; finite, and never below the bound."
    z = torch.eye(4).repeat(2, 1)
    one, even, bound = 1e4 * torch.eye(4)[[0] * 4], 1e4 * torch.eye(4), -5 * math.log(4)
    apart = torch.cat([z[:4], z[:4].roll(1, 0)])   # two clusters, either of which would be as likely
    cases = (one, z, 0.0), (even, z, bound), (even, apart, 1e4 - math.log(2) + bound)
    for weight, batch, expected in cases:
        w, bias = weight[None].clone().requires_grad_(), torch.zeros(1, 1, 4)
        total, *_ = heads_loss(w, bias, batch, 5.0)
        assert total.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert torch.autograd.grad(total.sum(), w)[0].isfinite().all()


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


@pytest.fixture(scope='module')
def uneven(blobs):
    "80, 40, 20, 10 and 5 points in five separate groups."
    z = draw(0, 5, 8, scale=5.0).repeat_interleave(torch.tensor([80, 40, 20, 10, 5]), 0)
    z = z + draw(1, 155, 8, scale=0.3)
    return z, mine_neighbors(z, 4), torch.arange(5).repeat_interleave(torch.tensor([80, 40, 20, 10, 5]))


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


def test_all_logits():
    images, many = digits()[:200].images, ClusteringModel(small_resnet(1, (8, 16)), 10, 3)
    every = logits_of(many, images, 64, head=None)
    assert every.shape == (3, 200, 10)
    for head in range(3):
        torch.testing.assert_close(logits_of(many, images, head=head), every[head])
    assert torch.equal(logits_of(many, images), logits_of(many, images, head=0))
# ---- several networks side by side

def two_networks(seed=0):
    "What both networks know (shared), what only the first one knows (habit), and neighbors alike in both."
    rng = np.random.default_rng(seed)
    shared, habit = rng.permutation(np.repeat([0, 1], 60)), rng.permutation(np.repeat([0, 1], 60))
    z = rng.normal(0, .3, (120, 12))
    z[:, [0, 6]] += 6*(shared[:, None] - .5)
    z[:, 1:4] += 6*(habit[:, None] - .5)
    return torch.tensor(z).float(), torch.tensor(shared), torch.tensor(habit)

@pytest.mark.parametrize('n', [1, 2, 3, 6])
@pytest.mark.parametrize('cached', [False, True])
def test_each_image_is_read_by_one_network(n, cached):
    g = torch.Generator().manual_seed(0)
    z, mean, std = draw(0, 5, 6), torch.arange(6.), torch.arange(1., 7)
    views = torch.stack([10 + z, 20 + z]) if cached else None
    pick, rows = _picker(z, views, mean, std, g, n), torch.arange(5).repeat(400)
    options = (views - mean)/std if cached else z[None]
    read, seen = pick(rows), set()
    for row, found in zip(rows.tolist(), read):
        kept = found.view(n, -1).ne(0).any(1).nonzero()[:, 0].tolist()
        assert len(kept) == 1
        want = n*options[:, row].view(len(options), n, -1)[:, kept[0]]
        same = (found.view(n, -1)[kept[0]] - want).abs().amax(1) < 1e-5
        assert same.any()
        seen.add((row, kept[0], same.int().argmax().item()))
    assert len(seen) == 5*n*len(options)

def test_one_network_at_a_time_finds_what_both_know():
    z, shared, habit = two_networks()
    near = mine_neighbors(z, 5)
    assert (habit[near] == habit[:, None]).all()
    def cuts(n_networks, label):
        hits = []
        for seed in range(4):
            found = train_heads(z, near, 2, n_heads=8, batch_size=30, n_networks=n_networks, seed=seed)
            clusters = found.heads(z).argmax(-1)
            hits += [max((c == label).float().mean(), (c != label).float().mean()) > .95 for c in clusters]
        return np.mean(hits)
    assert cuts(2, shared) > .6 and cuts(1, habit) > .8

def test_one_network_is_the_default_and_seeds_repeat():
    z, *_ = two_networks()
    near, options = mine_neighbors(z, 3), dict(n_heads=3, epochs=2, seed=5)
    a, b, c, d = (train_heads(z, near, 2, **options, **more).losses
                  for more in ({}, dict(n_networks=1), dict(n_networks=2), dict(n_networks=2)))
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)

@pytest.mark.parametrize('n', [0, -1, 5, 24])
def test_networks_that_the_columns_do_not_fit(n):
    z, *_ = two_networks()
    with pytest.raises(UserError, match=f'12 columns are not those of {n} equal networks'):
        train_heads(z, mine_neighbors(z, 3), 2, n_networks=n)

