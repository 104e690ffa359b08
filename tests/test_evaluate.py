"Scores of a clustering against brute force, scikit-learn and SciPy, for any number of clusters and classes."
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

from scan_nb import evaluate
from scan_nb.data import UserError, digits
from scan_nb.evaluate import (
    adjusted_rand, cluster_metrics, confusion, contingency, grade, hungarian_match, kmeans_baseline,
    label_free_metrics, majority_match, match_accuracy, mutual_info, random_accuracy, top_k_accuracy)

seeds = st.integers(0, 2**32 - 1)
tables = hnp.array_shapes(min_dims=2, max_dims=2, max_side=5).flatmap(
    lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, 20))).filter(lambda t: t.sum() > 0)

def unroll(table):
    "Clusters and labels that have this count table."
    k, c = np.indices(table.shape)
    return np.repeat(k.ravel(), table.ravel()), np.repeat(c.ravel(), table.ravel())

def best_by_trying(table):
    "Most images right under any one-to-one matching, by trying all."
    table = table if table.shape[0] <= table.shape[1] else table.T
    columns = itertools.permutations(range(table.shape[1]), table.shape[0])
    return max(sum(table[k, c] for k, c in enumerate(choice)) for choice in columns)

def noisy(n, k, c, agree, seed=0):
    "Clusters that follow the labels for a share of the images."
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    return np.where(rng.random(n) < agree, labels % k, rng.integers(0, k, n)), labels

# -- the count table --

@given(seeds, st.integers(1, 60), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_contingency_by_loop(seed, n, k, c):
    rng = np.random.default_rng(seed)
    clusters, labels = rng.integers(0, k, n), rng.integers(-1, c, n)
    labels[0] = 0
    expected = np.zeros((k, c), int)
    for a, b in zip(clusters, labels):
        if b >= 0: expected[a, b] += 1
    table = contingency(clusters, labels, k, c)
    assert table.dtype == torch.int64 and table.tolist() == expected.tolist()

@pytest.mark.parametrize('kind', [list, tuple, np.array, torch.tensor, lambda v: np.array(v, np.uint8),
                                  lambda v: torch.tensor(v, dtype=torch.int32), lambda v: np.array(v, '>i8')])
def test_contingency_takes_any_kind(kind):
    assert contingency(kind([0, 2, 2]), kind([1, 0, 1])).tolist() == [[0, 1], [0, 0], [1, 1]]

def test_contingency_leaves_its_input_alone():
    clusters, labels = torch.tensor([0, 1, 1]), torch.tensor([0, -1, 1])
    contingency(clusters, labels)
    assert clusters.tolist() == [0, 1, 1] and labels.tolist() == [0, -1, 1]

@pytest.mark.parametrize('clusters, labels, sizes, says', [
    ([0, 1], [0], (), '2 clusters but 1 labels'),
    ([0, 1], [-1, -1], (), 'No image has a known label'),
    (np.zeros(0, int), np.zeros(0, int), (), 'No image has a known label'),
    ([0., 1.], [0, 1], (), 'clusters must be one whole number per image'),
    ([0, 1], [0., math.nan], (), 'labels must be one whole number per image'),
    ([0, 1], ['cat', 'dog'], (), 'labels must be one whole number per image'),
    ([[0, 1]], [0, 1], (), 'shape (1, 2)'),
    ([-1, 1], [0, 1], (), 'clusters run from -1 to 1'),
    ([0, 3], [0, 1], (3, 2), 'clusters run from 0 to 3, not within 0 to 2'),
    ([0, 1], [0, 2], (2, 2), 'labels run from 0 to 2, not within 0 to 1'),
    ([0, 10**6], [0, 10**6], (), 'too many'),
])
def test_contingency_refuses(clusters, labels, sizes, says):
    with pytest.raises(UserError, match='(?s).*' + says.replace('(', r'\(').replace(')', r'\)')) as error:
        contingency(clusters, labels, *sizes)
    assert str(error.value).count('\n') == 0 and str(error.value).endswith('.')

# -- matching --

@given(tables)
@settings(max_examples=200, deadline=None)
def test_hungarian_by_trying_all(table):
    match = hungarian_match(torch.from_numpy(table))
    taken = match[match >= 0].tolist()
    assert len(set(taken)) == len(taken) == min(table.shape)
    assert match_accuracy(torch.from_numpy(table), match) == best_by_trying(table) / table.sum()

@given(tables)
@settings(max_examples=60, deadline=None)
def test_majority_by_loop(table):
    match = majority_match(table).tolist()
    for row, found in zip(table.tolist(), match): assert found == (row.index(max(row)) if any(row) else -1)
    assert match_accuracy(torch.from_numpy(table), majority_match(table)) == table.max(1).sum() / table.sum()

def test_greedy_matching_is_not_enough():
    table = torch.tensor([[5, 4, 0], [4, 0, 1], [0, 1, 5]])
    assert hungarian_match(table).tolist() == [1, 0, 2]

def test_unmatched_clusters_are_wrong_and_not_class_zero():
    table = torch.tensor([[9, 0], [8, 0], [0, 7]])
    assert hungarian_match(table).tolist() == [0, -1, 1]
    assert match_accuracy(table, hungarian_match(table)) == 16 / 24

# -- scores --

@given(tables)
@settings(max_examples=200, deadline=None)
def test_scores_are_scikit_learns(table):
    clusters, labels = unroll(table)
    scores = cluster_metrics(clusters, labels)
    assert scores['nmi'] == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters), abs=1e-12)
    assert scores['ami'] == pytest.approx(metrics.adjusted_mutual_info_score(labels, clusters), abs=1e-9)
    assert scores['ari'] == pytest.approx(metrics.adjusted_rand_score(labels, clusters), abs=1e-12)

@pytest.mark.parametrize('n, k, c', [(1, 1, 1), (40, 1, 1), (40, 40, 40), (40, 1, 40), (40, 40, 1),
                                     (2000, 300, 7), (20_000, 150, 200), (200_000, 3, 3)])
@pytest.mark.parametrize('agree', [0, .5, 1])
def test_scores_are_scikit_learns_at_every_size(n, k, c, agree):
    clusters, labels = noisy(n, k, c, agree)
    scores = cluster_metrics(clusters, labels)
    assert scores['nmi'] == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters), abs=1e-10)
    assert scores['ami'] == pytest.approx(metrics.adjusted_mutual_info_score(labels, clusters), abs=1e-7)
    assert scores['ari'] == pytest.approx(metrics.adjusted_rand_score(labels, clusters), abs=1e-10)

@pytest.mark.parametrize('n', [13, 500])
@pytest.mark.parametrize('scores', [metrics.adjusted_mutual_info_score])
def test_singletons_and_one_cluster(n, scores):
    each, one = np.arange(n), np.zeros(n, int)
    for a, b in [(each, each), (one, one), (each, one), (one, each)]:
        assert mutual_info(contingency(a, b))['ami'] == pytest.approx(scores(b, a), abs=1e-9)

@pytest.mark.parametrize('sizes', [([59_999, 1], [30_000, 30_000]), ([20_000] * 3, [6000] * 10),
                                   ([50_000, 5000, 4000, 999, 1], [1, 2, 3, 59_994])])
def test_expected_information_of_unequal_sizes(sizes):
    rows, columns = (torch.tensor(s) for s in sizes)
    labels = [torch.arange(len(s)).repeat_interleave(s) for s in (rows, columns)]
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
    mixed = contingency(labels[0], labels[1][order])
    expected = metrics.cluster.expected_mutual_information(mixed.numpy(), 60_000)
    assert evaluate._expected_information(rows, columns) == pytest.approx(expected, rel=1e-8, abs=1e-12)

@given(tables, seeds)
@settings(max_examples=60, deadline=None)
def test_names_of_clusters_do_not_matter(table, seed):
    clusters, labels = unroll(table)
    renamed = np.random.default_rng(seed).permutation(len(table) + 2)[clusters]
    ours, theirs = cluster_metrics(clusters, labels), cluster_metrics(renamed, labels)
    for key in ('acc', 'majority_acc', 'purity', 'nmi', 'ami', 'ari', 'n_clusters', 'n_classes'):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-9)

@given(tables)
@settings(max_examples=60, deadline=None)
def test_scores_hang_together(table):
    clusters, labels = unroll(table)
    scores = cluster_metrics(clusters, labels)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert 0 < scores['acc'] <= scores['majority_acc'] == scores['purity'] <= 1
    assert (scores['n_clusters'], scores['n_classes']) == ((table.sum(1) > 0).sum(), (table.sum(0) > 0).sum())
    recall, sizes = scores['per_class_recall'], np.bincount(labels)
    assert [r is None for r in recall] == (sizes == 0).tolist()
    assert sum(r * s for r, s in zip(recall, sizes) if s) / len(labels) == pytest.approx(scores['acc'])

def test_unknown_labels_are_left_out():
    clusters, labels = noisy(300, 6, 4, .6)
    hidden = np.where(np.arange(300) % 3 == 0, -1, labels)
    known = hidden >= 0
    assert cluster_metrics(clusters, hidden) == cluster_metrics(clusters[known], labels[known])

def test_a_perfect_and_a_collapsed_clustering():
    labels = np.arange(60) % 3
    perfect, collapsed = cluster_metrics(labels, labels), cluster_metrics(labels * 0, labels)
    assert all(perfect[k] == pytest.approx(1) for k in ('acc', 'majority_acc', 'purity', 'nmi', 'ami', 'ari'))
    assert collapsed['acc'] == pytest.approx(1 / 3) and collapsed['per_class_recall'] == [1, 0, 0]
    assert collapsed['nmi'] == collapsed['ari'] == 0 and collapsed['ami'] == pytest.approx(0, abs=1e-12)

def test_matches_from_other_images():
    clusters, labels = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])
    crossed = contingency([0, 1, 2], [1, 0, 2])
    scores = cluster_metrics(clusters, labels, match_on=crossed)
    assert scores['acc'] == scores['majority_acc'] == 0 and scores['purity'] == scores['nmi'] == 1
    assert scores['per_class_recall'] == [0, 0, None]
    with pytest.raises(UserError, match='clusters run from 0 to 1'):
        cluster_metrics(clusters, labels, match_on=crossed[:1])

def test_as_large_as_imagenet():
    clusters, labels = noisy(1_281_167, 1000, 1000, .4)
    scores = cluster_metrics(clusters, labels)
    assert scores['acc'] == pytest.approx((clusters == labels).mean())
    assert scores['nmi'] == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert scores['ari'] == pytest.approx(metrics.adjusted_rand_score(labels, clusters), abs=1e-9)
    assert abs(cluster_metrics(*noisy(1_281_167, 1000, 1000, 0))['ami']) < 1e-3

def test_large_counts_do_not_overflow():
    table = torch.tensor([[10**7, 3], [5, 10**7]])
    assert adjusted_rand(table) == pytest.approx(1, abs=1e-5) and adjusted_rand(table) < 1

# -- the confusion matrix --

@given(tables)
@settings(max_examples=60, deadline=None)
def test_confusion_reorders_the_table(table):
    clusters, labels = unroll(table)
    matrix, order = confusion(clusters, labels)
    counts = contingency(clusters, labels)
    assert sorted(order.tolist()) == list(range(len(counts)))
    assert torch.equal(matrix, counts[order].T)
    if len(counts) != counts.shape[1]: return
    right, sizes = matrix.diagonal().tolist(), matrix.sum(1).tolist()
    assert sum(right) == best_by_trying(counts.numpy())
    recall = cluster_metrics(clusters, labels)['per_class_recall']
    assert recall == [n/size if size else None for n, size in zip(right, sizes)]

def test_confusion_of_extra_clusters_is_a_staircase():
    clusters, labels = unroll(np.array([[0, 7], [5, 0], [0, 9], [4, 0], [0, 0], [0, 1]]))
    matrix, order = confusion(clusters, labels)
    assert order.tolist() == [1, 3, 2, 0, 5, 4]
    assert matrix.tolist() == [[5, 4, 0, 0, 0, 0], [0, 0, 9, 7, 1, 0]]

# -- baselines --

def test_chance_is_above_one_in_c_and_repeats():
    labels = torch.arange(200) % 10
    first, before = random_accuracy(labels, 10), torch.get_rng_state()
    assert .15 < first < .3
    assert first == random_accuracy(labels, 10) != random_accuracy(labels, 10, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert random_accuracy(labels, 1) == pytest.approx(.1)
    assert random_accuracy(torch.cat([labels, torch.full((50,), -1)]), 10) == pytest.approx(first, abs=.03)

def test_kmeans_is_scikit_learns():
    images = digits().images
    pixels = images.flatten(1).numpy() / np.float32(255)
    for rows, options in [(pixels, {}), (normalize(pixels), dict(normalize=True))]:
        expected = KMeans(10, n_init=2, random_state=3).fit_predict(rows)
        ours = kmeans_baseline(images, 10, seed=3, n_init=2, **options)
        assert ours.dtype == torch.int64
        assert metrics.adjusted_rand_score(expected, ours) > .98

def test_kmeans_repeats_and_leaves_global_generators_alone():
    images = digits().images[:300]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(*(kmeans_baseline(images, 5, seed=1, n_init=2) for _ in range(2)))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()

def test_kmeans_assigns_other_images():
    images = digits().images
    both = kmeans_baseline(images[:500], 8, n_init=1, on=images)
    ours = kmeans_baseline(images[:500], 8, n_init=1, on=images[:500])
    assert len(both) == len(images) and torch.equal(both[:500], ours)

def test_kmeans_takes_embeddings_of_any_kind():
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    z[:30] += 9
    expected = kmeans_baseline(z, 2)
    assert set(expected[:30].tolist()).isdisjoint(expected[30:].tolist())
    assert torch.equal(kmeans_baseline(z.numpy(), 2), expected)
    assert torch.equal(kmeans_baseline(z.double().requires_grad_(), 2), expected)

@pytest.mark.parametrize('k', [-1, 0, 1, 6])
def test_kmeans_refuses_the_number_of_clusters(k):
    with pytest.raises(UserError, match='2 ≤ clusters ≤ images'): kmeans_baseline(torch.rand(5, 3), k)

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_kmeans_refuses_what_is_no_number(bad):
    with pytest.raises(UserError, match='finite'): kmeans_baseline(torch.tensor([[0.], [1.], [bad]]), 2)

# -- without labels --

@given(seeds, st.integers(1, 50), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_label_free_by_hand(seed, n, k):
    p = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    found = label_free_metrics(p)
    entropy = -sum(q/n * math.log(q/n) for q in found['sizes'] if q)
    assert found['effective_clusters'] == pytest.approx(math.exp(entropy))
    assert found['mean_confidence'] == pytest.approx(np.mean([max(row) for row in p.tolist()]))
    assert found['sizes'] == [sum(row.index(max(row)) == j for row in p.tolist()) for j in range(k)]
    assert json.loads(json.dumps(found)) == found

def test_label_free_takes_half_precision_and_gradients():
    p = torch.randn(500, 30).requires_grad_().softmax(1).bfloat16()
    assert 1 <= label_free_metrics(p)['effective_clusters'] <= 30

@pytest.mark.parametrize('p', [torch.randn(4, 3), torch.full((4, 3), math.nan), torch.ones(4, 3),
                               torch.ones(4), torch.zeros(0, 3), torch.tensor([[1.5, -.5]])])
def test_label_free_refuses_what_is_no_probability(p):
    with pytest.raises(UserError, match='sum to 1'): label_free_metrics(p)

# -- all scores at once --

@given(seeds, st.integers(2, 9), st.integers(1, 9), st.floats(0, .9))
@settings(max_examples=60, deadline=None)
def test_top_k_is_scikit_learns(seed, c, k, unknown):
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, c, generator=g), torch.randint(c, (40,), generator=g)
    match, hidden = torch.randperm(c, generator=g), torch.rand(40, generator=g) < unknown
    hidden[0] = False
    by_class = torch.empty_like(logits)
    by_class[:, match] = logits
    found = top_k_accuracy(logits, torch.where(hidden, -1, labels), match, k)
    if k >= c: assert found == 1
    elif c == 2: assert found == metrics.accuracy_score(labels[~hidden], by_class[~hidden].argmax(1))
    else: assert found == pytest.approx(
        metrics.top_k_accuracy_score(labels[~hidden], by_class[~hidden], k=k, labels=range(c)))

def test_guesses_are_of_clusters_that_have_a_class():
    "More clusters than classes: one without a class is no guess, and takes no place among the k."
    logits, labels = torch.tensor([[9., 2., 1.], [9., 1., 2.], [9., 2., 1.]]), torch.tensor([0, 1, 1])
    match = torch.tensor([-1, 0, 1])
    assert top_k_accuracy(logits, labels, match, 1) == pytest.approx(2/3)
    assert top_k_accuracy(logits, labels, match, 2) == top_k_accuracy(logits, labels, match, 5) == 1

@given(seeds, st.integers(1, 60), st.integers(1, 8), st.integers(1, 8), st.sampled_from([0, .4, 1]))
@settings(max_examples=60, deadline=None)
def test_a_grade_is_all_scores_together(seed, n, k, c, unknown):
    "Of any number of images, clusters and classes, with labels of all, of some or of none."
    g = torch.Generator().manual_seed(seed)
    p, labels = torch.randn(n, k, generator=g).softmax(1), torch.randint(c, (n,), generator=g)
    labels[torch.rand(n, generator=g) < unknown] = -1
    clusters, known = p.argmax(1), bool((labels >= 0).any())
    found = grade(clusters, labels, p)
    want = dict(n_images=n, n_clusters=len(set(clusters.tolist()))) | label_free_metrics(p)
    if known: want = cluster_metrics(clusters, labels) | want
    top5 = {key: found[key] for key in ('top5',) if key in found}
    assert found == want | top5 and json.loads(json.dumps(found)) == found
    classes = int(labels.max()) + 1
    assert bool(top5) == (known and min(k, classes) >= 5)
    if top5: assert found['acc'] <= top5['top5'] <= 1
    assert grade(clusters, labels) == {key: v for key, v in found.items()
                                       if key not in ('top5', *label_free_metrics(p))}

def test_grades_without_or_with_few_labels():
    p = (torch.eye(6)[torch.arange(60) % 6]*9).softmax(1)
    none = grade(p.argmax(1), None, p)
    assert none.keys() == {'n_images', 'n_clusters', 'effective_clusters', 'mean_confidence', 'sizes'}
    assert (none['n_images'], none['n_clusters'], none['sizes']) == (60, 6, [10]*6)
    assert none['effective_clusters'] == pytest.approx(6)
    labels = torch.full((60,), -1)
    assert grade(p.argmax(1), labels, p) == none
    labels[:6] = torch.arange(6).roll(2)
    few = grade(p.argmax(1), labels, p)
    assert few | none == few and few['acc'] == few['top5'] == few['nmi'] == 1 and few['n_classes'] == 6
    labels[3:] = -1
    assert grade(p.argmax(1), labels, p)['acc'] == 1 and 'top5' in grade(p.argmax(1), labels, p)

def test_a_grade_counts_clusters_of_all_images():
    "Also of those without a label."
    found = grade(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, -1, -1]))
    assert found['n_images'] == 4 and found['n_clusters'] == 4

@pytest.mark.parametrize('kind', [torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_grade_takes_clusters_of_any_kind(kind):
    clusters, labels = torch.arange(12) % 3, torch.arange(12) % 3
    assert grade(kind(clusters), labels) == grade(clusters, labels) and grade(clusters, labels)['acc'] == 1

def test_a_grade_leaves_its_input_alone():
    clusters, labels = torch.arange(12).int() % 3, torch.arange(12) % 3 - 1
    p = torch.eye(3)[clusters.long()]
    before = [x.clone() for x in (clusters, labels, p)]
    grade(clusters, labels, p)
    assert all(torch.equal(a, b) for a, b in zip((clusters, labels, p), before))

def test_a_grade_refuses_what_does_not_fit():
    for labels, p, said in ((torch.zeros(5).long(), None, '12 clusters but 5 labels'),
                            (None, torch.randn(12, 3), 'sum to 1')):
        with pytest.raises(UserError, match=said): grade(torch.zeros(12).long(), labels, p)
