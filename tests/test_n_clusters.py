"The number of clusters: its evidence, its vote and its doubts."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score, silhouette_score

from scan_nb.data import UserError
from scan_nb.n_clusters import (
    Suggestion,
    bound_share,
    cosine_silhouette,
    doubt,
    neighbors_within,
    pairwise_ari,
    plot_suggestion,
    suggest_n_clusters,
    vote,
    weigh_clusters,
)
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.training import make_generator


def groups(k, n, seed=0, dim=16):
    "Gaussian groups of nearly one size, and the group of each point."
    g = make_generator(seed)
    label = torch.arange(n) % k
    return 2*torch.randn(k, dim, generator=g)[label] + torch.randn(n, dim, generator=g), label


@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), ka=st.integers(1, 8), kb=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_ari_of_all_pairs_is_that_of_scikit_learn(seed, n, ka, kb):
    g = make_generator(seed)
    a, b = torch.randint(ka, (3, n), generator=g), torch.randint(kb, (2, n), generator=g)
    expected = [[adjusted_rand_score(x, y) for y in b.numpy()] for x in a.numpy()]
    np.testing.assert_allclose(pairwise_ari(a, b), expected, atol=1e-9)


@given(seed=st.integers(0, 10**6), k=st.integers(2, 9))
@settings(max_examples=20, deadline=None)
def test_ari_does_not_mind_names_and_is_symmetric(seed, k):
    g = make_generator(seed)
    a, names = torch.randint(k, (4, 50), generator=g), torch.randperm(k, generator=g)
    torch.testing.assert_close(pairwise_ari(a, names[a]), pairwise_ari(a, a))
    torch.testing.assert_close(pairwise_ari(a, a), pairwise_ari(a, a).T)
    torch.testing.assert_close(pairwise_ari(a, a).diagonal(), torch.ones(4).double())


@given(seed=st.integers(0, 10**6), n=st.integers(5, 60), k=st.integers(2, 6), scale=st.floats(.1, 100))
@settings(max_examples=40, deadline=None)
def test_silhouette_is_that_of_scikit_learn(seed, n, k, scale):
    g = make_generator(seed)
    z, clusters = scale*torch.randn(n, 5, generator=g), torch.randint(k, (n,), generator=g)
    used = len(clusters.unique())
    expected = silhouette_score(z, clusters, metric='cosine') if 2 <= used < n else 0
    assert cosine_silhouette(z, clusters) == pytest.approx(expected, abs=1e-4)
    assert cosine_silhouette(z*7, clusters) == pytest.approx(cosine_silhouette(z, clusters), abs=1e-5)


@given(seed=st.integers(0, 10**6), n=st.integers(3, 40), k=st.integers(1, 6), share=st.floats(.1, 1))
@settings(max_examples=60, deadline=None)
def test_neighbors_within_keeps_those_inside_and_invents_none(seed, n, k, share):
    g = make_generator(seed)
    neighbors = torch.randint(n, (n, k), generator=g)
    index = torch.randperm(n, generator=g)[:max(1, int(share*n))]
    near = neighbors_within(neighbors, index)
    assert near.shape == (len(index), k) and near.min() >= 0 and near.max() < len(index)
    for i, row in zip(index.tolist(), near):
        inside = [j for j in neighbors[i].tolist() if j in index.tolist()]
        assert index[row].tolist() == ((inside or [i])*k)[:k]


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 4), c=st.integers(2, 9), scale=st.floats(0, 30))
@settings(max_examples=40, deadline=None)
def test_bound_share_never_passes_one(seed, heads, c, scale):
    g = make_generator(seed)
    logits, near = scale*torch.randn(heads, 30, c, generator=g), torch.randint(30, (30, 3), generator=g)
    p = logits.double().softmax(-1).numpy()
    pairs = np.log(np.einsum('hic,hikc->hik', p, p[:, near.numpy()])).mean((1, 2))
    mean = p.mean(1)
    expected = (pairs - (mean*np.log(mean)).sum(1))/math.log(c)
    np.testing.assert_allclose(bound_share(logits, near), expected, atol=1e-4)
    assert (bound_share(logits, near) <= 1 + 1e-4).all()


@pytest.mark.parametrize('k, seed', [(3, 0), (6, 0), (6, 1)])
def test_finds_the_number_of_groups(k, seed):
    z = groups(k, 50*k, seed)[0]
    found = suggest_n_clusters(z, candidates=range(k - 1, k + 3), n_heads=4, updates=80, seed=seed)
    assert found.n_clusters == k and not found.doubts
    assert [row['n_clusters'] for row in found.evidence] == list(range(k - 1, k + 3))


def test_says_when_there_is_nothing_to_find():
    cloud = torch.randn(300, 16, generator=make_generator(0))
    assert 'hardly agree' in suggest_n_clusters(cloud, candidates=range(2, 6), n_heads=4, updates=60).doubts


def test_same_seed_same_suggestion_another_seed_another_evidence():
    z = groups(4, 120)[0]
    a, b, other = (suggest_n_clusters(z, candidates=[4, 5], n_heads=3, updates=10, seed=s) for s in (5, 5, 6))
    assert a == b and a.evidence != other.evidence


def test_leaves_the_random_state_and_its_input_alone():
    z = groups(4, 120)[0]
    near, state = mine_neighbors(z, 5), torch.get_rng_state()
    old = z.clone(), near.clone()
    suggest_n_clusters(z, near, [2, 3], n_heads=2, updates=5)
    assert torch.equal(z, old[0]) and torch.equal(near, old[1]) and torch.equal(torch.get_rng_state(), state)


def test_given_neighbors_are_the_only_pairs():
    "Neighbors that join groups two by two make three of six."
    z, label = groups(6, 300)
    g = make_generator(1)
    near = torch.stack([(label//2 == i//2).nonzero()[:, 0][torch.randint(100, (10,), generator=g)]
                        for i in label.tolist()])
    found = suggest_n_clusters(z, near, [2, 3, 4, 6], n_heads=4, updates=80)
    assert found.votes['bound'] == found.votes['stability'] == 3


def test_a_part_of_many_images_is_enough():
    z, label = groups(5, 2000)
    for near in (None, mine_neighbors(z, 50)):
        found = suggest_n_clusters(z, near, range(4, 7), n_heads=4, updates=60, max_images=250)
        assert found.n_clusters == 5


def test_evidence_is_within_its_limits():
    z, _ = groups(4, 160)
    halves = list(torch.arange(160).view(2, 80))
    row = weigh_clusters(z, mine_neighbors(z, 5), 5, halves, n_heads=3, updates=20)
    assert -1 <= row['silhouette'] <= 1 and row['bound'] <= 1 and 1 <= row['effective_clusters'] <= 5 + 1e-9
    assert max(row['heads'], row['halves']) <= 1 and row['loss'] >= -5*math.log(5)


def rows(*values):
    names = 'n_clusters', 'heads', 'halves', 'bound', 'silhouette', 'effective_clusters'
    return [dict(zip(names, (*v, v[0]))) for v in values]


def test_vote_takes_each_witness_at_its_best():
    evidence = rows((2, .9, .5, .7, .1), (3, .8, .8, .6, .2), (4, .1, .1, .9, .2))
    assert vote(evidence) == dict(stability=3, bound=4, silhouette=4)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_vote_is_the_largest_of_those_as_good_as_the_best(values):
    evidence = rows(*[(k, v, v, v, v) for k, v in enumerate(values, 2)])
    for k in vote(evidence).values():
        assert values[k - 2] >= max(values) - .0051 and all(v < max(values) - .0049 for v in values[k - 1:])


def test_doubts():
    agreed, evidence = dict(stability=5, bound=5, silhouette=5), rows((5, 1, .9, 1, 1), (9, 1, .1, 1, 1))
    assert doubt(5, agreed, evidence) == ''
    assert 'from 2 to 9' in doubt(5, dict(stability=2, bound=9, silhouette=5), evidence)
    assert 'hardly agree' in doubt(9, agreed, evidence) and 'largest' in doubt(9, agreed, evidence)


@pytest.mark.parametrize('candidates', [[], [5], [1, 2], [3, 51], [0, 4], range(-3, 3)])
def test_refuses_candidates_that_can_not_be(candidates):
    with pytest.raises(UserError, match='half of the 100 images'):
        suggest_n_clusters(groups(4, 100)[0], candidates=candidates)


def test_refuses_foreign_neighbors_one_head_and_broken_embeddings():
    z = groups(4, 100)[0]
    broken, near = z.masked_fill(z > 3, torch.nan), torch.zeros(50, 3).long()
    with pytest.raises(UserError, match='do not belong'): suggest_n_clusters(z, near, [2, 3])
    with pytest.raises(UserError, match='2 or more'): suggest_n_clusters(z, None, [2, 3], n_heads=1)
    with pytest.raises(UserError, match='NaN'): suggest_n_clusters(broken, None, [2, 3])
    with pytest.raises(UserError, match='N×D'): suggest_n_clusters(z[0], None, [2, 3])


def test_plot_marks_each_vote_and_the_suggestion():
    import matplotlib
    matplotlib.use('agg')
    evidence = rows((2, .9, .5, .7, .1), (3, .8, .8, .6, .2), (4, .1, .1, .9, .1))
    figure = plot_suggestion(Suggestion(3, vote(evidence), '', evidence))
    stability, bound, silhouette, effective = figure.axes
    assert [ax.get_title(loc) for ax in (stability, bound, silhouette) for loc in ('left', 'center')
            if ax.get_title(loc)] == ['stability: 3', 'bound: 4', 'silhouette: 3']
    for ax, k in ((stability, 3), (bound, 4), (silhouette, 3)):
        rings = [line for line in ax.lines if line.get_markerfacecolor() == 'none']
        assert rings and all(list(line.get_xdata()) == [k] for line in rings)
    assert not [line for line in effective.lines if line.get_markerfacecolor() == 'none']
    matplotlib.pyplot.close(figure)
