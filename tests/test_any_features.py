"Heads on any matrix of embeddings and any frozen module, with the features by hand of lesson 07a."

import copy

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from run_notebooks import NBS
from safetensors.torch import load_file, save_file
from torch import nn

from scan_nb.augment import Normalize, to_float
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics, kmeans_baseline
from scan_nb.models import ClusteringModel, feature_dim, small_resnet
from scan_nb.neighbors import embed, embed_views
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import train_heads
from scan_nb.training import make_generator

pytestmark = pytest.mark.usefixtures('one_thread')
PAGE = NBS / '07a_frozen.ipynb'
QUICK = dict(n_heads=4, epochs=10, batch_size=64)


def gradients_of_page():
    "The class `Gradients` of the lesson."
    cells = [c.source for c in nbformat.read(PAGE, as_version=4).cells if c.cell_type == 'code']
    space = dict(torch=torch, nn=nn, F=nn.functional, to_float=to_float)
    for begin in ('def share_directions', 'class Gradients'):
        (source,) = [s for s in cells if s.startswith(begin)]
        exec(source.split('\n\n')[0], space)
    return space['Gradients']


def assemble(module, heads, best):
    "Module and chosen head as one model of images, as notebook 09 does it."
    module.dim = heads.weight.shape[1]
    model = ClusteringModel(module, heads.weight.shape[2], len(heads.weight))
    model.cluster_head.load_state_dict(heads.state_dict())
    return model.select(best).eval()


def blobs(seed, n=90, d=6, c=3):
    "c clouds far apart, and which of them each point is of."
    g = make_generator(seed)
    which = torch.arange(n) % c
    return 8 * torch.randn(c, d, generator=g)[which] + torch.randn(n, d, generator=g), which


@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    dead=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_units_and_dead_columns_of_a_matrix_do_not_matter(seed, scale, shift, dead):
    "The same neighbors, the same heads: features are standardized, and a constant column adds nothing."
    z, _ = blobs(seed)
    near = mine_neighbors(z, 5)
    other = z * scale + shift * scale
    a = train_heads(z, near, 3, **QUICK)
    b = train_heads(other, near, 3, **QUICK)
    same = (a.heads(z).argmax(-1) == b.heads(other).argmax(-1)).float().mean()
    assert same > 0.97 and a.losses.sub(b.losses).abs().max() < 0.02
    if dead:
        padded = torch.cat([z, torch.full((len(z), 1), 7.0)], 1)
        logits = train_heads(padded, near, 3, **QUICK).heads(padded)
        assert logits.isfinite().all()


@pytest.mark.parametrize('seed', range(3))
def test_a_numpy_matrix_is_enough(seed):
    z, which = blobs(seed)
    matrix = z.numpy().astype(np.float32)
    near = mine_neighbors(matrix, 5)
    z = torch.from_numpy(matrix)
    trained = train_heads(z, near, 3, n_heads=8, epochs=30, batch_size=64)
    assert cluster_metrics(trained.heads(z)[trained.best].argmax(1), which)['acc'] > 0.98


class Squares(nn.Module):
    "No weights, no attribute `dim`; counts its images."

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        x = to_float(x).flatten(1)
        return torch.cat([x, x.square()], 1)


def test_views_cost_one_pass_each_and_training_none():
    images, module = digits()[:200].images, Squares()
    views = embed_views(module, images, SimCLRAugment(8, scale=(0.8, 1.2), flip_p=0.0), 3)
    assert views.shape == (3, 200, 128) and module.seen == 3 * 200
    z = embed(module, images)
    train_heads(z, mine_neighbors(z, 5), 10, views=views, **QUICK)
    assert module.seen == 4 * 200


def test_views_equal_to_the_images_give_the_same_clusters():
    z, which = blobs(1)
    near = mine_neighbors(z, 5)
    trained = train_heads(z, near, 3, views=torch.stack([z, z]), n_heads=8, epochs=30, batch_size=64)
    assert cluster_metrics(trained.heads(z)[trained.best].argmax(1), which)['acc'] > 0.98


@pytest.mark.parametrize('shape', [(200, 128), (2, 199, 128), (2, 200, 127)])
def test_views_of_other_images_are_refused(shape):
    z = torch.randn(200, 128, generator=make_generator(0))
    with pytest.raises(UserError, match='do not belong to embeddings'):
        train_heads(z, mine_neighbors(z, 5), 10, views=torch.zeros(shape), **QUICK)


def modules():
    gradients = gradients_of_page()
    torch.manual_seed(0)
    frozen = nn.Sequential(Normalize([0.3], [0.4]), small_resnet(1, (8, 16))).eval().requires_grad_(False)
    return dict(squares=Squares(), gradients=gradients(), network=frozen)


@pytest.mark.parametrize('name', ['squares', 'gradients', 'network'])
def test_module_and_head_are_one_model_that_survives_a_file(tmp_path, name):
    "Predictions equal those on the cached matrix, on images as bytes or floats, before and after the file."
    data, module = digits(), modules()[name]
    known, later = data[:300].images, data[300:350].images
    z, before = embed(module, known), copy.deepcopy(module.state_dict())
    trained = train_heads(z, mine_neighbors(z, 5), 10, **QUICK)
    model = assemble(module, trained.heads, trained.best)
    expected = trained.heads(z)[trained.best].softmax(-1)
    torch.testing.assert_close(model.predict_proba(known), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.predict_proba(known / 255), expected, rtol=1e-4, atol=1e-4)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    fresh = modules()[name]
    fresh.dim = feature_dim(fresh, later)
    again = ClusteringModel(fresh, 10).eval()
    again.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    assert torch.equal(again.predict_proba(later), model.predict_proba(later))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values()))


def brute_gradients(image, cell, bins):
    "Pixel by pixel in float64: each gradient is shared by the two nearest of `bins` directions."
    x = np.pad(image.astype(float) / 255, 1, mode='edge')
    h, w = image.shape
    maps = np.zeros((bins, h // cell, w // cell))
    for i in range(h):
        for j in range(w):
            down, right = x[i + 2, j + 1] - x[i, j + 1], x[i + 1, j + 2] - x[i + 1, j]
            turn = np.arctan2(down, right) * bins / (2 * np.pi)
            low = int(np.floor(turn))
            for b, share in ((low, low + 1 - turn), (low + 1, turn - low)):
                maps[b % bins, i // cell, j // cell] += share * np.hypot(down, right) / cell**2
    return np.sqrt(maps).ravel()


@given(seed=st.integers(0, 10**6), cell=st.sampled_from([1, 2, 4]), bins=st.integers(2, 9))
@settings(max_examples=15, deadline=None)
def test_gradients_equal_brute_force(seed, cell, bins):
    gradients = gradients_of_page()
    images = np.random.default_rng(seed).integers(0, 256, (2, 1, 8, 8), dtype=np.uint8)
    found = gradients(cell, bins)(torch.from_numpy(images)).numpy()
    expected = np.stack([brute_gradients(x[0], cell, bins) for x in images])
    np.testing.assert_allclose(found**2, expected**2, atol=1e-5)


def test_heads_beat_kmeans_on_gradients_of_digits():
    "Mean over seeds, with few heads: by a wide margin, so that no rounding can turn it."
    gradients = gradients_of_page()
    data = digits()[:900]
    z = embed(gradients(), data.images)
    near = mine_neighbors(z, 10)

    def heads(seed):
        trained = train_heads(z, near, 10, n_heads=16, epochs=40, batch_size=64, seed=seed)
        return trained.heads(z)[trained.best].argmax(1)

    score = lambda run: np.mean([cluster_metrics(run(s), data.labels)['acc'] for s in range(2)])
    assert score(heads) > score(lambda seed: kmeans_baseline(z, 10, seed)) + 0.02
