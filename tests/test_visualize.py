"Pictures: what stands where, which image is chosen, the same map each time, and no screen needed."
import io
import math
import warnings
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from sklearn.decomposition import PCA

from scan_nb import visualize
from scan_nb.data import UserError, digits
from scan_nb.evaluate import confusion
from scan_nb.visualize import (
    PALETTE, STYLE, cluster_color, embed_2d, pick_examples, plot_confusion, plot_embedding, plot_history,
    prototypes, set_style, show_clusters, show_neighbors)

matplotlib.use('agg')
import matplotlib.pyplot as plt

seeds = st.integers(0, 2**32 - 1)

@pytest.fixture(autouse=True)
def no_screen_no_warnings_no_leak(monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('plt.show was called'))
    with warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter('error')
        yield
    plt.close('all')

def drawn(ax):
    "The figure as a PNG, which runs the layout and all drawing."
    png = io.BytesIO()
    ax.figure.savefig(png, format='png')
    return png.getvalue()

def flat_images(n, channels=1, side=12):
    "Image i is a plain square of gray i+1."
    gray = torch.arange(1, n + 1, dtype=torch.uint8).view(n, 1, 1, 1)
    return gray.expand(n, channels, side, side).contiguous()

def tiles(ax):
    "The gray at the center of each tile of a mosaic, read back from the picture."
    (picture,) = ax.get_images()
    pixels, (x0, x1, y1, y0) = picture.get_array(), picture.get_extent()
    rows, columns = round(y1 - y0), round(x1 - x0)
    height, width = pixels.shape[0] / rows, pixels.shape[1] / columns
    return [[int(pixels[int((r + .6) * height), int((c + .6) * width), 0]) for c in range(columns)]
            for r in range(rows)]

def y_names(ax): return [t.get_text() for t in ax.get_yticklabels()]

def frames(ax): return [(round(p.get_x() - 1.5), round(p.get_y())) for p in ax.patches]

# -- style --

def test_style_is_set_in_one_place():
    set_style()
    assert all(plt.rcParams[k] == v or list(plt.rcParams[k]) == list(v) for k, v in STYLE.items())
    assert plt.rcParams['figure.dpi'] == 72
    assert plt.rcParams['axes.prop_cycle'].by_key()['color'] == PALETTE

def lab(rgb):
    "CIE L*a*b* of linear RGB."
    xyz = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]) @ rgb
    xyz = xyz / [.9505, 1, 1.089]
    x, y, z = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

def test_palette_is_safe_for_color_blindness():
    "No two of ten colors look alike with all cones, or without the red or green ones (Machado 2009)."
    deuteranopia = [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]
    protanopia = [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]
    rgb = np.array([to_rgb(h) for h in PALETTE])
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055)**2.4)
    for sight in (np.eye(3), np.array(deuteranopia), np.array(protanopia)):
        seen = [lab(np.clip(sight @ c, 0, 1)) for c in linear]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen[:10], 2)) > 15
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 8

def test_colors_repeat_after_the_palette():
    assert len(set(PALETTE)) == len(PALETTE) == 20
    assert cluster_color(23) == PALETTE[3] and cluster_color(-1) not in PALETTE

# -- choosing images --

@given(seeds, st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_examples_belong_to_the_cluster(seed, n, count):
    g = torch.Generator().manual_seed(seed)
    clusters, confidence = torch.randint(3, (n,), generator=g), torch.rand(n, generator=g)
    for k in range(4):
        members = [i for i, c in enumerate(clusters.tolist()) if c == k]
        even = pick_examples(clusters, k, count).tolist()
        assert len(even) == len(set(even)) == min(count, len(members)) and set(even) <= set(members)
        assert even == sorted(even)
        if even and count > 1: assert (even[0], even[-1]) == (members[0], members[-1])
        best = sorted(members, key=lambda i: -confidence[i])[:count]
        assert pick_examples(clusters, k, count, confidence).tolist() == best

@given(seeds, st.integers(1, 60), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_prototypes_by_loop(seed, n, k, top):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 4, generator=g)
    p = torch.randn(n, k, generator=g, dtype=torch.float64).softmax(1)
    for cluster, found in enumerate(prototypes(z, p, top).tolist()):
        members = [i for i in range(n) if max(range(k), key=lambda j: p[i, j]) == cluster]
        if not members:
            assert found == -1
            continue
        confident = sorted(members, key=lambda i: -p[i, cluster])[:top]
        center = z[confident].mean(0)
        assert found in confident
        assert (z[found] - center).norm() <= min((z[i] - center).norm() for i in confident) + 1e-6

# -- mosaics --

def test_clusters_stand_in_their_rows():
    clusters = torch.tensor([0, 2, 0, 2, 2, 0, 0, 0])
    ax = show_clusters(flat_images(8), clusters, per_cluster=3)
    assert tiles(ax) == [[1, 6, 8], [255, 255, 255], [2, 4, 5]]
    assert y_names(ax) == ['cluster 0\n5 images', 'cluster 1\n0 images', 'cluster 2\n3 images']
    assert drawn(ax)

def test_most_confident_come_first():
    confidence = torch.tensor([.1, .9, .5, .7])
    ax = show_clusters(flat_images(4), [0, 0, 0, 1], confidence, per_cluster=2, names=['cats', 'dogs'])
    assert tiles(ax) == [[2, 3], [4, 255]]
    assert y_names(ax) == ['cats\n3 images', 'dogs\n1 images']

def test_rows_are_no_longer_than_the_largest_cluster():
    assert tiles(show_clusters(flat_images(3), [0, 1, 1], per_cluster=50)) == [[1, 255], [2, 3]]

def test_images_without_a_cluster_are_left_out():
    assert tiles(show_clusters(flat_images(3), [0, -1, 0])) == [[1, 3]]

def test_mosaics_take_sets_floats_color_and_large_images():
    data = digits()[:40]
    for images in (data, data.images.float() / 255, torch.rand(40, 3, 9, 14), flat_images(40, 3, 100)):
        ax = show_clusters(images, torch.arange(40) % 4)
        assert len(tiles(ax)) == 4 and drawn(ax)

def test_mosaics_leave_the_images_alone():
    images = flat_images(3)
    show_clusters(images, [0, 1, 1])
    assert torch.equal(images, flat_images(3))

def test_neighbors_stand_behind_their_anchor():
    neighbors = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 1, 0]])
    ax = show_neighbors(flat_images(4), neighbors, anchors=[2, 0], count=2)
    assert tiles(ax) == [[3, 255, 4, 1], [1, 255, 2, 3]]
    assert y_names(ax) == ['2', '0'] and not frames(ax)
    assert len(tiles(show_neighbors(flat_images(4), neighbors))) == 4
    assert tiles(show_neighbors(flat_images(4), neighbors[:, :1], anchors=1)) == [[1, 255, 2]]

def test_neighbors_of_another_class_are_framed():
    neighbors = torch.tensor([[1, 2], [0, 3], [3, 0], [2, 1]])
    ax = show_neighbors(flat_images(4), neighbors, anchors=4, labels=[0, 0, 1, -1])
    assert frames(ax) == [(1, 0), (1, 2)]
    assert ax.get_title(loc='left') + ax.get_title() == '2 of 4 neighbors belong to another class (framed)'
    assert drawn(ax)

# -- confusion --

def texts(ax): return {tuple(map(round, t.get_position())): t.get_text() for t in ax.texts}

def test_confusion_is_in_percent_of_the_class():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 299]])
    ax = plot_confusion(matrix, order=[2, 0, 1], classes=['a', 'b', 'c'])
    assert texts(ax) == {(0, 0): '75', (1, 0): '25', (2, 2): '100'}
    assert [t.get_text() for t in ax.get_xticklabels()] == ['2', '0', '1'] and y_names(ax) == ['a', 'b', 'c']
    assert drawn(ax)

@pytest.mark.parametrize('k, c', [(1, 1), (2, 9), (30, 3), (200, 10), (300, 300)])
def test_confusion_of_any_shape(k, c):
    g = torch.Generator().manual_seed(0)
    clusters, labels = torch.randint(k, (3000,), generator=g), torch.randint(c, (3000,), generator=g)
    ax = plot_confusion(*confusion(clusters, labels))
    assert bool(ax.texts) == (k * c <= 900) and drawn(ax)
    assert max(ax.figure.get_size_inches()) <= 16

# -- maps --

def test_map_by_principal_components():
    x = digits().images[:400]
    ours, theirs = embed_2d(x, method='pca').numpy(), PCA(2).fit_transform(x.flatten(1).double().numpy())
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours, theirs * signs, atol=1e-2)

def test_map_keeps_neighbors_together():
    g = torch.Generator().manual_seed(0)
    kinds = torch.arange(90) % 3
    z = torch.randn(90, 60, generator=g) + 20 * torch.eye(60)[kinds]
    points = embed_2d(z)
    near = torch.cdist(points, points).fill_diagonal_(math.inf).topk(5, largest=False).indices
    assert points.shape == (90, 2) and points.dtype == torch.float32
    assert (kinds[near] == kinds[:, None]).all()

def test_map_repeats_and_leaves_global_generators_alone():
    z = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(embed_2d(z, seed=5), embed_2d(z, seed=5))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()

def test_map_of_many_points_is_linear():
    z = torch.randn(5001, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(embed_2d(z), embed_2d(z, method='pca'))

@pytest.mark.parametrize('shape', [(1, 3), (2, 3), (4, 1), (5, 1), (6, 2), (7, 300), (12, 1, 8, 8)])
@pytest.mark.parametrize('constant', [False, True])
def test_map_of_little(shape, constant):
    x = torch.ones(shape) if constant else torch.randn(shape, generator=torch.Generator().manual_seed(0))
    points = embed_2d(x)
    assert points.shape == (shape[0], 2) and points.isfinite().all()

def test_map_of_repeated_points():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).repeat(30, 1)
    assert embed_2d(x).isfinite().all()

def test_map_refuses():
    with pytest.raises(UserError, match="'pca' or 'tsne'"): embed_2d(torch.rand(9, 3), method='umap')
    with pytest.raises(UserError, match='finite'): embed_2d(torch.tensor([[1., math.nan]]))

def test_names_stand_at_the_medians():
    points = torch.tensor([[0., 0], [0, 2], [0, 1], [5, 5], [9, 9]])
    ax = plot_embedding(points, [0, 0, 0, 1, -1], names=['cats', 'dogs'])
    assert {t.get_text(): t.get_position() for t in ax.texts} == {'cats': (0, 1), 'dogs': (5, 5)}
    (scatter,) = ax.collections
    np.testing.assert_array_equal(scatter.get_offsets(), points)
    assert [to_hex(c).upper() for c in scatter.get_facecolors()] == [PALETTE[0]] * 3 + [PALETTE[1], '#BBBBBB']
    assert drawn(ax)

def test_embeddings_are_mapped_first():
    z = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    (scatter,) = plot_embedding(z, torch.arange(40) % 3, seed=2).collections
    np.testing.assert_allclose(scatter.get_offsets(), embed_2d(z, seed=2), rtol=1e-6)

@pytest.mark.parametrize('k, named', [(25, 25), (60, 60), (100, 0)])
def test_map_of_many_clusters(k, named):
    points = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    ax = plot_embedding(points, torch.arange(300) % k)
    assert len(ax.texts) == named and drawn(ax)

# -- curves --

HISTORY = [dict(epoch=e, loss=5. - e, note='text', knn=None if e % 2 else .8 + e / 100) for e in range(6)]

def test_history_draws_each_number():
    loss, knn = plot_history(HISTORY)
    assert loss.lines[0].get_xydata().tolist() == [[e, 5. - e] for e in range(6)]
    assert knn.lines[0].get_xydata().tolist() == [[e, .8 + e / 100] for e in (0, 2, 4)]
    assert (knn.get_title('left'), knn.get_title('right')) == ('knn', '0.84')
    assert loss.figure is knn.figure and drawn(loss)

def test_history_of_chosen_numbers():
    assert [ax.get_title('left') for ax in plot_history(HISTORY, ['knn'])] == ['knn']
    with pytest.raises(UserError, match="has .*'loss', 'knn'.*not .*'acc'"): plot_history(HISTORY, ['acc'])
    with pytest.raises(UserError): plot_history([])

@pytest.mark.parametrize('history', [
    [dict(loss=1.)], [dict(epoch=0, loss=math.nan), dict(epoch=1, loss=math.inf)],
    [{f'number_{i}': i * e for i in range(9)} for e in range(3)], [dict(loss=np.float64(2)), dict(loss=1)]])
def test_history_of_any_kind(history):
    axes = plot_history(history)
    assert len(axes) == len(history[0]) - ('epoch' in history[0]) and drawn(axes[0])

# -- as part of a larger figure --

def test_draws_into_the_axes_given():
    axes = plt.subplots(2, 2)[1].ravel()
    images, clusters = digits().images[:60], torch.arange(60) % 3
    assert show_clusters(images, clusters, ax=axes[0]) is axes[0]
    assert show_neighbors(images, torch.ones(60, 4).long(), ax=axes[1]) is axes[1]
    assert plot_confusion(torch.eye(3), ax=axes[2]) is axes[2]
    assert plot_embedding(torch.rand(60, 2), clusters, ax=axes[3]) is axes[3]
    assert len(plt.get_fignums()) == 1 and drawn(axes[0])

def test_nothing_is_drawn_at_import():
    assert not plt.get_fignums() and 'plt' not in vars(visualize)
