"""Neighbors against float64 brute force, scikit-learn and faiss; purity and vote against loops; wrong input.

What the lesson and its engine room both do is asked of both: `room` is one of the two modules."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scan_nb import neighbors, neighbors_fast
from scan_nb.data import UserError, digits
from scan_nb.models import ClusteringModel, ContrastiveModel, small_resnet
from scan_nb.neighbors import (cosine_blocks, embed, embed_views, mutual_neighbors, neighbor_accuracy,
                               unit_rows, whiten)
from torch import nn

both = pytest.mark.parametrize('room', [neighbors, neighbors_fast], ids=['lesson', 'fast'])

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def cosines(x, y=None):
    "In float64, with NumPy; -2 for an image with itself."
    x, alone, y = x.double().numpy(), y is None, (x if y is None else y).double().numpy()
    unit = [v/np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (x, y)]
    cosine = unit[0] @ unit[1].T
    if alone: np.fill_diagonal(cosine, -2)
    return cosine

def check(found, x, k, tolerance=1e-5):
    "Each row: k others, no one twice, nearest first, none nearer left out. Ties may stand in any order."
    cosine, found = cosines(x), found.numpy()
    assert found.shape == (len(x), k) and found.dtype == np.int64
    assert 0 <= found.min() and found.max() < len(x)
    assert not (found == np.arange(len(x))[:, None]).any()
    assert all(len(set(row)) == k for row in found.tolist())
    expected = -np.sort(-cosine, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(cosine, found, 1), expected, atol=tolerance, rtol=0)

# ---- neighbors ---------------------------------------------------------------------------------------------

@both
@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 40), d=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 10**6),
       block=st.integers(1, 200))
def test_mine_neighbors_is_the_brute_force(room, n, d, share, seed, block):
    x, k = normal(n, d, seed=seed)*torch.rand(n, 1).exp(), 1+int(share*(n-2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, 'BLOCK', block)
        check(room.mine_neighbors(x, k), x, k)

@both
def test_agrees_with_scikit_learn_and_faiss(room):
    import faiss
    from sklearn.neighbors import NearestNeighbors
    x, k = normal(700, 24), 12
    found = room.mine_neighbors(x, k)
    search = NearestNeighbors(n_neighbors=k, metric='cosine').fit(x.double().numpy())
    theirs = search.kneighbors(return_distance=False)
    assert (found.numpy() == theirs).mean() > .9999
    index = faiss.IndexFlatIP(24)
    index.add(unit_rows(x).numpy())
    theirs = index.search(unit_rows(x).numpy(), k+1)[1]
    assert (theirs[:, 0] == np.arange(700)).all() and (found.numpy() == theirs[:, 1:]).mean() > .9999

@both
@pytest.mark.parametrize('block', [1, 50, 51, 149, 150, 2500, 10**9])
def test_blocks_change_nothing(room, monkeypatch, block):
    x = normal(50, 6)
    whole = room.mine_neighbors(x, 7)
    monkeypatch.setattr(neighbors, 'BLOCK', block)
    assert torch.equal(room.mine_neighbors(x, 7), whole)
    parts = list(cosine_blocks(unit_rows(x), unit_rows(x), same=True))
    assert len(parts) == -(-50//max(1, block//50)) and max(p.numel() for p in parts) <= max(50, block)
    assert torch.cat(parts).diagonal().eq(-torch.inf).all() and torch.cat(parts).isinf().sum() == 50

@both
def test_every_other_image_can_be_asked_for(room):
    x = normal(9, 4)
    check(room.mine_neighbors(x, 8), x, 8)
    assert torch.equal(room.mine_neighbors(torch.tensor([[1., 0], [0, 1]]), 1), torch.tensor([[1], [0]]))

@both
def test_a_duplicate_is_a_neighbor_the_image_itself_is_not(room):
    x = normal(30, 5).repeat(2, 1)
    found = room.mine_neighbors(x, 3)
    assert torch.equal(found[:, 0], torch.arange(60).roll(30))
    check(found, x, 3)
    check(room.mine_neighbors(torch.ones(25, 3), 24), torch.ones(25, 3), 24)
    check(room.mine_neighbors(torch.ones(25, 3), 5), torch.ones(25, 3), 5)

@both
def test_zero_rows_have_neighbors_too(room):
    x = normal(20, 4)
    x[[0, 7, 19]] = 0
    check(room.mine_neighbors(x, 6), x, 6)
    check(room.mine_neighbors(torch.zeros(6, 4), 2), torch.zeros(6, 4), 2)

@both
@pytest.mark.parametrize('dtype, size', [
    (torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e-42), (torch.float32, 1e38),
    (torch.float64, 1e300), (torch.float64, 1e-300)])
def test_any_norm(room, dtype, size):
    x = normal(40, 6).double().clamp(-3, 3)
    scales = torch.logspace(0, 3, 40, dtype=torch.float64)[:, None] if size < 1e38 else 1
    scaled = (x*scales*size/(1000 if size > 1 else 1)).to(dtype)
    assert scaled.isfinite().all() and (scaled != 0).any(1).all()
    rows = unit_rows(scaled)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(40))
    if size > 1e-40: torch.testing.assert_close(rows, unit_rows(x), rtol=1e-5, atol=1e-6)
    check(room.mine_neighbors(scaled, 5), rows, 5)

@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_other_types(room, dtype):
    x = (normal(30, 16)*40+100).clamp(0, 255).to(dtype)
    check(room.mine_neighbors(x, 4), x.double(), 4)
    assert torch.equal(room.mine_neighbors(x.float().numpy(), 4), room.mine_neighbors(x, 4))

@both
def test_nothing_is_changed_or_tracked(room):
    x = normal(30, 4).requires_grad_()
    before = x.detach().clone()
    assert not room.mine_neighbors(x, 3).requires_grad and torch.equal(x, before)
    unit = unit_rows(before).clone()
    room.mine_neighbors(unit, 3)
    assert torch.equal(unit, unit_rows(before))

@both
@pytest.mark.parametrize('n, k, most', [(20, 20, 19), (20, 0, 19), (20, -1, 19), (1, 1, 0), (5, 20, 4)])
def test_impossible_numbers_of_neighbors(room, n, k, most):
    with pytest.raises(UserError, match=f'^{k} neighbors are asked for, but an image can have 1 to {most}'):
        room.mine_neighbors(normal(n, 3), k)

@both
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_embeddings_must_be_finite(room, bad):
    x = normal(20, 3)
    x[4, 1] = bad
    labels = torch.zeros(20, dtype=torch.int64)
    for call in (lambda: room.mine_neighbors(x, 3), lambda: room.weighted_knn(x, labels),
                 lambda: room.weighted_knn(normal(20, 3), labels, x)):
        with pytest.raises(UserError, match='must be finite'): call()

@both
@pytest.mark.parametrize('shape', [(20,), (20, 3, 2), (0, 3), (20, 0), ()])
def test_embeddings_must_be_rows(room, shape):
    with pytest.raises(UserError, match='must be N×D'): room.mine_neighbors(torch.zeros(shape), 3)

# ---- purity ------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 20), k=st.integers(1, 5), c=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_purity_is_the_loop(n, k, c, seed):
    g = torch.Generator().manual_seed(seed)
    near, labels = torch.randint(n, (n, k), generator=g), torch.randint(-1, c, (n,), generator=g)
    pairs = [(labels[i], labels[j]) for i in range(n) for j in near[i] if labels[i] >= 0 and labels[j] >= 0]
    if pairs:
        expected = sum(int(a == b) for a, b in pairs)/len(pairs)
        assert abs(neighbor_accuracy(near, labels)-expected) < 1e-12
    else:
        with pytest.raises(UserError, match='nothing to compare'): neighbor_accuracy(near, labels)

def test_purity_takes_arrays_and_lists():
    near = torch.tensor([[1], [0], [0]])
    for labels in ([0, 0, 1], np.array([0, 0, 1]), torch.tensor([0, 0, 1], dtype=torch.uint8)):
        assert neighbor_accuracy(near, labels) == pytest.approx(2/3)

# ---- vote --------------------------------------------------------------------------------------------------

def votes(cosine, labels, k, temperature):
    "Each row's votes per class, by loops over float64."
    out = np.zeros((len(cosine), int(max(labels))+1))
    for i, row in enumerate(cosine):
        for j in np.argsort(-row)[:k]: out[i, labels[j]] += np.exp((row[j]-1)/temperature)
    return out

def check_vote(found, expected):
    "The class with most votes, or one that ties with it."
    best = np.take_along_axis(expected, found.numpy()[:, None], 1)[:, 0]
    np.testing.assert_allclose(best, expected.max(1), rtol=1e-3)

@both
@settings(deadline=None, max_examples=40)
@given(n=st.integers(3, 30), m=st.integers(1, 9), c=st.integers(1, 5), k=st.integers(1, 8),
       seed=st.integers(0, 10**6), temperature=st.floats(.05, 5), block=st.integers(1, 200))
def test_vote_is_the_loop(room, n, m, c, k, seed, temperature, block):
    x, y, k = normal(n, 4, seed=seed), normal(m, 4, seed=seed+1), min(k, n-1)
    labels = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, 'BLOCK', block)
        by_others = room.weighted_knn(x, labels, k=k, temperature=temperature)
        new = room.weighted_knn(x, labels, y, k, temperature)
    assert by_others.shape == (n,) and new.shape == (m,) and new.dtype == torch.int64
    check_vote(by_others, votes(cosines(x), labels.numpy(), k, temperature))
    check_vote(new, votes(cosines(y, x), labels.numpy(), k, temperature))

@both
def test_vote_agrees_with_scikit_learn(room):
    from sklearn.neighbors import KNeighborsClassifier
    data = digits()
    x, y = unit_rows(data.images.flatten(1)), data.labels
    model = KNeighborsClassifier(20, metric='cosine', algorithm='brute', weights=lambda d: np.exp(-d/.07))
    model.fit(x[:1000], y[:1000])
    ours = room.weighted_knn(x[:1000], y[:1000], x[1000:])
    assert (ours.numpy() == model.predict(x[1000:].numpy())).mean() > .998
    assert (ours == y[1000:]).double().mean() > .95

@both
def test_leave_one_out_leaves_one_out(room):
    x, labels = normal(25, 4), torch.arange(25) % 3
    for i in (0, 11, 24):
        others = torch.arange(25) != i
        alone = room.weighted_knn(x[others], labels[others], x[i:i+1], k=6)[0]
        assert room.weighted_knn(x, labels, k=6)[i] == alone
    assert torch.equal(room.weighted_knn(x, torch.arange(25), x, k=1), torch.arange(25))    # as new: itself
    assert not (room.weighted_knn(x, torch.arange(25), k=1) == torch.arange(25)).any()

@both
def test_temperature_goes_from_the_nearest_to_the_majority(room):
    x = torch.tensor([[1., 0], [.99, .1], [.9, .4], [.9, .41], [.9, .42]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert room.weighted_knn(x, labels, x[:1], k=5, temperature=1e-4) == 0
    assert room.weighted_knn(x, labels, x[:1], k=5, temperature=100.) == 1

@both
@pytest.mark.parametrize('change, message', [
    (dict(k=20), '20 neighbors are asked for, but an image can have 1 to 19'), (dict(k=0), '0 neighbors'),
    (dict(k=21, embeddings=normal(4, 3)), '21 neighbors are asked for, but an image can have 1 to 20'),
    (dict(temperature=0), 'temperature must be above 0'), (dict(temperature=-1.), 'must be above 0'),
    (dict(train_labels=torch.zeros(19)), '20 embeddings need 20 labels'),
    (dict(train_labels=torch.full((20,), -1)), 'needs a label from 0 up'),
    (dict(embeddings=normal(4, 5)), 'of 5 and 3 numbers: they must be of one model')])
def test_impossible_votes(room, change, message):
    arguments = dict(train_embeddings=normal(20, 3), train_labels=torch.zeros(20, dtype=torch.int64), k=5)
    with pytest.raises(UserError, match=message): room.weighted_knn(**{**arguments, **change})

# ---- embed -------------------------------------------------------------------------------------------------

IMAGES = digits().images[:70]

def contrastive(): return ContrastiveModel(small_resnet(1, (4, 8)))

@pytest.mark.parametrize('model', [contrastive(), ClusteringModel(small_resnet(1, (4, 8)), 3)])
def test_embed(model):
    model.train()
    model.backbone.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = embed(model, IMAGES)
    assert whole.shape == (70, 8) and whole.dtype == torch.float32 and not whole.requires_grad
    for size in (1, 32, 69): torch.testing.assert_close(embed(model, IMAGES, size), whole)
    assert model.training and not model.backbone.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad(): torch.testing.assert_close(model.eval().embed(IMAGES), whole)

def test_embed_with_any_module():
    class Pixels(nn.Module):
        def forward(self, x): return x.double().flatten(1)
    found = embed(Pixels(), IMAGES, 16)
    assert found.dtype == torch.float32 and torch.equal(found, IMAGES.flatten(1).float())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    torch.testing.assert_close(embed(linear, IMAGES/255., 16), linear(IMAGES/255.).detach())

def test_embed_memory_mapped_images(tmp_path):
    np.save(tmp_path/'x.npy', IMAGES.numpy())
    mapped, model = torch.from_numpy(np.load(tmp_path/'x.npy', mmap_mode='c')), contrastive()
    assert torch.equal(embed(model, mapped, 32), embed(model, IMAGES, 32))

def test_embed_nothing():
    with pytest.raises(UserError, match='no image'): embed(contrastive(), IMAGES[:0])

@both
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_on_cuda(room):
    x = normal(500, 16)
    found = room.mine_neighbors(x.cuda(), 7)
    assert found.device.type == 'cuda'
    check(found.cpu(), x, 7)
    labels = torch.arange(500) % 4
    assert (room.weighted_knn(x.cuda(), labels) == room.weighted_knn(x, labels)).float().mean() > .99
    assert 0 <= neighbor_accuracy(found, labels) <= 1
    features = embed(contrastive().cuda(), IMAGES)
    assert features.device.type == 'cpu' and features.dtype == torch.float32

# ---- mutual ------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 25), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_mutual_is_the_loop(n, share, seed):
    near = neighbors.mine_neighbors(normal(n, 3, seed=seed), 1+int(share*(n-2)))
    k, found = near.shape[1], mutual_neighbors(near)
    assert found.shape == near.shape and found.dtype == torch.int64
    for i, row in enumerate(near.tolist()):
        own = [j for j in row if i in near[j].tolist()] or row[:1]
        assert found[i].tolist() == (own*k)[:k]

def test_mutual_of_everybody_changes_nothing():
    near = neighbors.mine_neighbors(normal(12, 3), 11)
    assert torch.equal(mutual_neighbors(near), near)
    assert torch.equal(mutual_neighbors(mutual_neighbors(near)), near)

@pytest.mark.parametrize('wrong', [torch.tensor([0, 1]), torch.tensor([[1], [2]]), torch.tensor([[1], [-1]]),
                                   torch.zeros(3, 0, dtype=torch.int64)])
def test_mutual_of_no_table(wrong):
    with pytest.raises(UserError, match='Neighbors must be N×k'): mutual_neighbors(wrong)

# ---- whitening ---------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(n=st.integers(20, 200), d=st.integers(1, 8), power=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_whitening_is_that_of_numpy(n, d, power, seed):
    "Each axis of the covariance of the unit rows, divided by a power of its standard deviation."
    x = np.random.default_rng(seed).normal(size=(n, d))*np.geomspace(1, .1, d) + .3
    unit = x/np.linalg.norm(x, axis=1, keepdims=True)
    unit = unit - unit.mean(0)
    variances, axes = np.linalg.eigh(unit.T @ unit/n)
    scale = np.maximum(variances, max(1e-6*variances[-1], 1e-12))**(-power/2)
    gram = unit @ (axes*scale**2) @ axes.T @ unit.T   # products of rows: no matter which way an axis points
    found = whiten(torch.from_numpy(x), power).double().numpy()
    np.testing.assert_allclose(found @ found.T, gram, atol=2e-3*max(1, abs(gram).max()))

def test_whitening_evens_out_the_axes():
    x = normal(500, 6)*torch.tensor([9., 3, 1, .5, .2, .1])
    spread = [whiten(x, p).std(0) for p in (0., .5, 1.)]
    ratios = [float(s.max()/s.min()) for s in spread]
    assert ratios[0] > 10 and ratios[1] == pytest.approx(ratios[0]**.5, rel=.01) and ratios[2] < 1.01

def test_whitening_of_rows_that_are_all_alike():
    assert (whiten(torch.ones(5, 3), 1.).abs() < 1e-3).all()

@pytest.mark.parametrize('power', [-.1, 1.1, float('nan')])
def test_a_wrong_power_of_whitening_is_named(power):
    with pytest.raises(UserError, match='power of whitening must be from 0 to 1'): whiten(torch.eye(3), power)

# ---- near copies in time -----------------------------------------------------------------------------------

@both
@settings(deadline=None, max_examples=60)
@given(n=st.integers(3, 30), span=st.integers(1, 40), window=st.integers(0, 12), seed=st.integers(0, 10**6),
       block=st.integers(1, 200))
def test_the_window_is_the_brute_force(room, n, span, window, seed, block):
    x = normal(n, 4, seed=seed)
    times = torch.randint(span, (n,), generator=torch.Generator().manual_seed(seed))
    near = (times[:, None]-times).abs() <= window
    k = int((~near).sum(1).min())
    if k == 0:
        with pytest.raises(UserError, match='1 neighbors are asked for, but image'):
            room.mine_neighbors(x, 1, times=times, window=window)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, 'BLOCK', block)
        found = room.mine_neighbors(x, k, times=times, window=float(window))
    cosine = np.where(near.numpy(), -3, cosines(x))
    assert found.shape == (n, k) and not near.gather(1, found).any()
    ours = np.take_along_axis(cosine, found.numpy(), 1)
    np.testing.assert_allclose(ours, -np.sort(-cosine, 1)[:, :k], atol=1e-5)

@both
def test_seconds_since_1970_keep_their_tenths(room):
    x, times = torch.ones(4, 2), 1.7e9 + torch.tensor([0., .1, .3, .4], dtype=torch.float64)
    assert room.mine_neighbors(x, 1, times=times, window=.15).flatten().tolist()[0] in (2, 3)
    assert room.mine_neighbors(x, 2, times=times.numpy(), window=.15)[0].sort().values.tolist() == [2, 3]

@both
def test_a_window_of_nothing_parts_images_of_the_same_second(room):
    x = normal(10, 4)
    assert torch.equal(room.mine_neighbors(x, 3, times=torch.arange(10), window=0), room.mine_neighbors(x, 3))
    times = torch.arange(10)//2
    assert (times[room.mine_neighbors(x, 8, times=times)] != times[:, None]).all()

@both
@pytest.mark.parametrize('change, message', [
    (dict(times=None), 'A window of 2 s needs `times`'), (dict(times=torch.arange(19)), '20 finite numbers'),
    (dict(times=torch.full((20,), torch.nan)), '20 finite numbers'),
    (dict(window=-1.), 'must be at least 0'), (dict(window=float('nan')), 'must be at least 0'),
    (dict(k=18), '18 neighbors are asked for, but image 2 has only 15 others more than 2 s away')])
def test_impossible_windows(room, change, message):
    arguments = dict(embeddings=normal(20, 3), k=5, times=torch.arange(20), window=2.)
    with pytest.raises(UserError, match=message): room.mine_neighbors(**{**arguments, **change})

# ---- views -------------------------------------------------------------------------------------------------

def noise(x, generator): return (x/255. + .1*torch.rand(x.shape, generator=generator)).clamp(0, 1)

def test_mean_of_views_is_the_mean_of_unit_views():
    model, g = contrastive().train(), lambda: torch.Generator().manual_seed(3)
    views = embed_views(model, IMAGES, noise, 3, 32, g())
    assert views.shape == (3, 70, 8) and views.dtype == torch.float32 and not torch.equal(views[0], views[1])
    mean = embed(model, IMAGES, 32, augment=noise, n_views=3, generator=g())
    torch.testing.assert_close(mean, torch.stack([unit_rows(v) for v in views]).mean(0))
    assert model.training and not mean.requires_grad
    with torch.no_grad(): first = model.eval().embed(noise(IMAGES[:32], g()))
    torch.testing.assert_close(views[0, :32], first)

def test_views_are_the_same_each_time_without_a_generator():
    model, before = contrastive(), torch.get_rng_state()
    assert torch.equal(embed_views(model, IMAGES, noise, 2), embed_views(model, IMAGES, noise, 2))
    assert torch.equal(embed(model, IMAGES, augment=noise), embed(model, IMAGES, augment=noise))
    assert torch.equal(before, torch.get_rng_state())

def test_views_that_change_nothing():
    model = contrastive()
    same = embed_views(model, IMAGES, lambda x, g: x, 2)
    assert torch.equal(same[0], embed(model, IMAGES)) and torch.equal(same[1], same[0])

def test_impossible_views():
    with pytest.raises(UserError, match='4 views of each image need `augment`'):
        embed(contrastive(), IMAGES, n_views=4)
    for call in (embed, embed_views):
        with pytest.raises(UserError, match='n_views must be at least 1, not 0'):
            call(contrastive(), IMAGES, augment=noise, n_views=0)
    with pytest.raises(UserError, match='no image'): embed_views(contrastive(), IMAGES[:0], noise)
