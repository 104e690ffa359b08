"What is fast about mining: the two shortcuts, the coarse look, the indexes; all give what the lesson gives."
import inspect
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scan_nb import neighbors, neighbors_fast
from scan_nb.data import ImageSet, UserError
from scan_nb.neighbors import unit_rows
from scan_nb.neighbors_fast import mine_neighbors, score_neighbors, weighted_knn
from test_neighbors import check, cosines, normal, one_thread   # noqa: F401

# ---- the two shortcuts -------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(b=st.integers(1, 6), n=st.integers(1, 400), share=st.floats(0, 1), levels=st.integers(1, 50),
       seed=st.integers(0, 10**6))
def test_the_largest_are_those_of_topk(b, n, share, levels, seed):
    "Also with many ties, and with -∞."
    x, k = (normal(b, n, seed=seed)*levels).round(), 1+int(share*(n-1))
    x[:, ::7] = -torch.inf
    values, columns = neighbors_fast._largest(x, k)
    assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())

def same(n, d, seed): return torch.ones(n, d)
def copies(n, d, seed): return normal(5, d, seed=seed)[torch.arange(n) % 5]
def near_copies(n, d, seed): return 1+1e-3*normal(n, d, seed=seed)
def zeros(n, d, seed): return normal(n, d, seed=seed)*(torch.arange(n) % 3 > 0)[:, None]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize('make', [lambda n, d, seed: normal(n, d, seed=seed), same, copies, near_copies,
                                  zeros])
@pytest.mark.parametrize('n, k', [(300, 7), (700, 20), (40, 39)])
def test_coarse_cosines_change_nothing(monkeypatch, dtype, make, n, k):
    monkeypatch.setattr(neighbors_fast, '_coarse_type', lambda: dtype)
    monkeypatch.setattr(neighbors, 'BLOCK', 64*n)
    monkeypatch.setattr(neighbors_fast, 'SIDE', 130)
    x = make(n, 24, 1)
    check(mine_neighbors(x, k), x, k, 1e-6)
    assert torch.equal(mine_neighbors(x, k), mine_neighbors(x, k))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_row_is_sure_only_when_it_is_right(dtype):
    for seed, spread in ((0, 1.), (1, .1), (2, .01)):
        x = unit_rows(1+spread*normal(600, 16, seed=seed))
        found, sure = neighbors_fast._coarse_neighbors(x, 5, dtype)
        cosine = cosines(x)
        ours = np.take_along_axis(cosine, found.numpy(), 1)
        exact = -np.sort(-cosine, 1)[:, :5]
        np.testing.assert_allclose(ours[sure], exact[sure], atol=3e-7, rtol=0)
        if spread == 1.: assert sure.float().mean() > .5
        if spread == .01: assert not sure.all()

@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 200), d=st.integers(1, 20), m=st.integers(1, 30), side=st.integers(1, 90),
       threads=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_every_cosine_is_offered_to_both_images(n, d, m, side, threads, seed):
    x, m, before = unit_rows(normal(n, d, seed=seed)), min(m, n-1), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors_fast, 'SIDE', side)
        torch.set_num_threads(threads)
        try: values, places = neighbors_fast._collect(x, m)
        finally: torch.set_num_threads(before)
    expected = (x @ x.T).fill_diagonal_(0).clamp_min(0).topk(m).values
    torch.testing.assert_close(values.sort(1, descending=True).values, expected, atol=1e-6, rtol=0)
    enough = values[:, 0] > 0
    torch.testing.assert_close((x[:, None]*x[places])[enough].sum(2), values[enough], atol=1e-6, rtol=0)
    assert all(len({i, *places[i].tolist()}) == m+1 for i in enough.nonzero().flatten().tolist())

# ---- approximate -------------------------------------------------------------------------------------------

def recall(found, exact): return (found[:, :, None] == exact[:, None]).any(1).float().mean().item()

@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
@pytest.mark.parametrize('noise', [.7, 1.5])
def test_recall_of_an_approximate_index(index, noise):
    g = torch.Generator().manual_seed(0)
    x = normal(40, 32)[torch.randint(40, (6000,), generator=g)]+noise*normal(6000, 32, seed=1)
    exact, found = mine_neighbors(x, 20), mine_neighbors(x, 20, index)
    assert found.shape == (6000, 20) and found.dtype == torch.int64 and found.min() >= 0
    assert not (found == torch.arange(6000)[:, None]).any()
    assert all(len(set(row)) == 20 for row in found[::50].tolist())
    assert recall(found, exact) > .9
    unit = unit_rows(x)
    similar = (unit[:, None]*unit[found]).sum(2)
    assert (similar.diff(dim=1) < 1e-5).all()                                  # nearest first

@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
@pytest.mark.parametrize('n', [2, 3, 30, 79])
def test_an_approximate_index_of_few_images_is_exact(index, n):
    x = normal(n, 8)
    check(mine_neighbors(x, min(5, n-1), index), x, min(5, n-1))

@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
def test_an_approximate_index_never_gives_the_image_itself(index):
    found = mine_neighbors(normal(20, 4).repeat(6, 1), 5, index)
    assert not (found == torch.arange(120)[:, None]).any()

def test_the_image_itself_is_dropped_wherever_it_stands():
    found = torch.tensor([[0, 1, 2], [2, 0, 3], [3, 1, 2]])
    assert neighbors_fast._drop_itself(found).tolist() == [[1, 2], [2, 0], [3, 1]]
    with pytest.raises(UserError, match='fewer than 2 neighbors: use exact'):
        neighbors_fast._drop_itself(torch.tensor([[0, 1, -1], [1, 0, 2]]))

@pytest.mark.parametrize('index', ['flat', 'IVF', '', None])
def test_unknown_index(index):
    with pytest.raises(UserError, match="must be 'exact', 'ivf' or 'hnsw'"):
        mine_neighbors(normal(20, 3), 3, index)

@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
@pytest.mark.parametrize('n, k, most', [(20, 20, 19), (20, 0, 19), (20, -1, 19), (1, 1, 0), (5, 20, 4)])
def test_impossible_numbers_of_neighbors(index, n, k, most):
    with pytest.raises(UserError, match=f'^{k} neighbors are asked for, but an image can have 1 to {most}'):
        mine_neighbors(normal(n, 3), k, index)

@pytest.mark.parametrize('options', [dict(times=torch.arange(20)), dict(window=2.)])
def test_a_window_needs_the_exact_index(options):
    with pytest.raises(UserError, match="Times need the index 'exact', not 'ivf'"):
        mine_neighbors(normal(20, 3), 5, 'ivf', **options)

# ---- the lesson --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, k', [(200, 20), (900, 50), (3500, 20)])
def test_it_does_what_the_lesson_does(n, k):
    x, times, labels = normal(n, 24), torch.arange(n)*.5, torch.arange(n) % 7
    close = (mine_neighbors(x, k) == neighbors.mine_neighbors(x, k)).float().mean()
    assert close > .9999   # but for the last digits
    window = dict(times=times, window=3.)
    assert torch.equal(mine_neighbors(x, k, **window), neighbors.mine_neighbors(x, k, **window))
    assert torch.equal(weighted_knn(x, labels, k=k), neighbors.weighted_knn(x, labels, k=k))

@pytest.mark.parametrize('name', ['mine_neighbors', 'weighted_knn'])
def test_it_takes_what_the_lesson_takes(name):
    fast, lesson = (inspect.signature(getattr(m, name)).parameters for m in (neighbors_fast, neighbors))
    assert lesson.keys() - {'largest'} <= fast.keys()
    assert all(fast[p].default == lesson[p].default for p in lesson.keys() - {'largest'})

# ---- their scores ------------------------------------------------------------------------------------------

def labeled(n, labels): return ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), labels)

def hidden_labels(n, c, unknown, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=g)
    return labels.masked_fill(torch.rand(n, generator=g) < unknown, -1)

def brute_force(y, z, near, voters, voters_z, alone):
    "Both scores by loops in float64: pairs of known labels; a vote of 20 among known labels."
    pairs = [y[i] == y[j] for i in range(len(y)) for j in near[i].tolist() if y[i] >= 0 and y[j] >= 0]
    scores = dict(n_images=len(y)) | (dict(neighbor_accuracy=np.mean(pairs)) if pairs else {})
    cosine, right = cosines(z, voters_z), []
    for i in range(len(y)):
        may = [j for j in range(len(voters)) if voters[j] >= 0 and not (alone and i == j)]
        if y[i] < 0 or not may: continue
        votes = np.zeros(voters.max() + 1)
        for j in sorted(may, key=lambda j: -cosine[i, j])[:20]: votes[voters[j]] += np.exp(cosine[i, j]/.07)
        right.append(votes.argmax() == y[i])
    return scores | (dict(knn_accuracy=np.mean(right)) if right else {})

@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 45), c=st.integers(1, 4), unknown=st.sampled_from([0, .3, .9, 1]),
       share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_scores_are_the_brute_force(n, c, unknown, share, seed):
    y, z = hidden_labels(n, c, unknown, seed), normal(n, 6, seed=seed)
    near, data = mine_neighbors(z, 1 + int(share*(n - 2))), labeled(n, y)
    found = score_neighbors(data, z, near, data, z)
    assert found == pytest.approx(brute_force(y, z, near, y, z, True)) and all(0 <= v for v in found.values())

@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 30), m=st.integers(1, 45), unknown=st.sampled_from([0, .3, 1]),
       silent=st.sampled_from([0, .3, .95, 1]), seed=st.integers(0, 10**6))
def test_scores_of_held_out_images_are_the_brute_force(n, m, unknown, silent, seed):
    "Those learned from vote, and only those whose label is known."
    y, z = hidden_labels(n, 3, unknown, seed), normal(n, 6, seed=seed)
    voters, voters_z = hidden_labels(m, 3, silent, seed + 1), normal(m, 6, seed=seed + 1)
    near = mine_neighbors(z, min(3, n - 1))
    found = score_neighbors(labeled(n, y), z, near, labeled(m, voters), voters_z)
    assert found == pytest.approx(brute_force(y, z, near, voters, voters_z, False))

def test_scores_without_or_with_few_labels():
    n, z = 30, normal(30, 4)
    near, some = mine_neighbors(z, 5), torch.arange(30) % 3
    def score(labels, voters=...):
        data = labeled(n, labels)
        return score_neighbors(data, z, near, data if voters is ... else labeled(n, voters), z)
    assert score(None) == score(None, some) == score(some, None) == dict(n_images=30)
    nothing = torch.full((30,), -1)
    assert score(nothing) == score(nothing, some) == dict(n_images=30)
    one = nothing.clone()
    one[4] = 2
    assert score(one) == dict(n_images=30)                      # nobody to ask, no pair to compare
    assert score(one, some).keys() == {'n_images', 'knn_accuracy'}
    assert score(one, one) == dict(n_images=30, knn_accuracy=1)  # another set: its image may vote for itself
    two = one.clone()
    two[int(near[4, 0])] = 2
    assert score(two) == dict(n_images=30, neighbor_accuracy=1, knn_accuracy=1)

def test_a_set_votes_without_the_image_itself():
    "Pairs of equal images with unequal labels: each is told the other's."
    z, labels = normal(10, 4).repeat_interleave(2, 0), torch.arange(20) % 2
    data, near = labeled(20, labels), mine_neighbors(z, 1)
    found = score_neighbors(data, z, near, data, z)
    assert found['neighbor_accuracy'] == 0 and found['knn_accuracy'] < .9
    assert found == pytest.approx(brute_force(labels, z, near, labels, z, True))

def test_scores_leave_their_input_alone():
    z, labels = normal(20, 4), torch.arange(20) % 3 - 1
    data, near = labeled(20, labels), mine_neighbors(z, 3)
    before = [x.clone() for x in (z, near, labels)]
    score_neighbors(data, z, near, data, z)
    assert all(torch.equal(a, b) for a, b in zip((z, near, data.labels), before))
