"Images from anywhere: every kind of file, every layout of array, every fault, and the cache under stress."
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from run_notebooks import ROOT
from sklearn.datasets import load_digits, load_sample_image

from scan_nb import data
from scan_nb.data import (
    DEBIAN_FASHION, ImageSet, UserError, as_image_set, atomic_write, cache_dir, decode_image, digits,
    fashion_mnist, find_images, image_folder, image_grid, read_images, show_images, to_uint8)

matplotlib.use('agg')
seeds = st.integers(0, 2**32 - 1)

@pytest.fixture
def cache(tmp_path): return tmp_path/'cache'

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'images').mkdir()
    return tmp_path/'images'

def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path

def refused(words, f, *args, **kwargs):
    "`f` raises a `UserError` of one sentence that holds `words`."
    with pytest.raises(UserError, match=words) as e: f(*args, **kwargs)
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and not text[0].islower()

# -- ImageSet --

def numbered(n, c=1):
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, c, 2, 3)
    return ImageSet(x, torch.arange(n) % 3, ['a', 'b', 'c'], [f'{i}.png' for i in range(n)])

def index_of(n):
    position = st.integers(-n, n - 1)
    forward = st.slices(n).filter(lambda s: s.step is None or s.step > 0)
    row = st.lists(position, min_size=1)
    mask = st.lists(st.booleans(), min_size=n, max_size=n)
    kinds = list, np.array, torch.tensor
    return st.one_of(position, forward, *(many.map(kind) for many in (row, mask) for kind in kinds))

@given(st.data(), st.integers(1, 8))
def test_indexing_keeps_what_belongs_together(draw, n):
    index = draw.draw(index_of(n))
    got = numbered(n)[index]
    want = np.arange(n)[index if isinstance(index, slice) else np.asarray(index)].reshape(-1)
    assert got.images[:, 0, 0, 0].tolist() == want.tolist()
    assert got.labels.tolist() == (want % 3).tolist()
    assert got.paths == [f'{i}.png' for i in want]
    assert got.images.shape[1:] == (1, 2, 3) and got.classes == ['a', 'b', 'c'] and len(got) == len(want)

WRONG = [5, -6, np.int64(5), [0, 5], torch.tensor([-6]), torch.ones(4, dtype=bool), 'x', 1.5]

@pytest.mark.parametrize('index', WRONG, ids=str)
def test_wrong_index(index):
    with pytest.raises((IndexError, TypeError)): numbered(5)[index]

def test_choosing_none():
    assert len(numbered(3)[[]]) == len(numbered(3)[3:]) == len(numbered(3)[torch.zeros(3, dtype=bool)]) == 0

def test_iterates_over_sets_of_one(): assert [int(s.images[0, 0, 0, 0]) for s in numbered(4)] == [0, 1, 2, 3]

def test_slices_share_memory():
    x = numbered(6)
    assert x[2:].images.data_ptr() == x.images[2:].data_ptr()

def test_repr_is_one_line():
    assert repr(numbered(5, 3)) == 'ImageSet(5 images of 3×2×3, 3 classes)'
    one = ImageSet(numbered(1).images, skipped=[('x.png', 'an empty file')])
    assert repr(one) == 'ImageSet(1 image of 1×2×3, no labels, 1 skipped)'

def test_classes():
    x = numbered(4).images
    assert ImageSet(x).n_classes is None
    assert ImageSet(x, [0, 1, 1, 6]).n_classes == 7
    assert ImageSet(x, [0, 1, 1, 0], list('abc')).n_classes == 3
    assert ImageSet(x[:0], []).n_classes == 0

def test_labels_become_int64():
    for labels in ([0, 1], np.array([0, 1], np.uint8), torch.tensor([0, 1], dtype=torch.int32)):
        assert ImageSet(numbered(2).images, labels).labels.dtype == torch.int64

def test_moves():
    there = numbered(3).to('cpu')
    assert there.images.device == there.labels.device == torch.device('cpu')
    assert there.paths == numbered(3).paths
    assert ImageSet(numbered(3).images).to('meta').images.device.type == 'meta'

@pytest.mark.parametrize('words, change', [
    ('must be a tensor', dict(images=np.zeros((4, 1, 2, 2), np.uint8))),
    ('must be uint8', dict(images=torch.rand(4, 1, 2, 2))),
    ('not 4×2×2', dict(images=torch.zeros(4, 2, 2, dtype=torch.uint8))),
    ('not 4×2×2×2', dict(images=torch.zeros(4, 2, 2, 2, dtype=torch.uint8))),
    ('not 4×1×0×2', dict(images=torch.zeros(4, 1, 0, 2, dtype=torch.uint8))),
    ('need 4 labels', dict(labels=[0, 1, 2])),
    ('need 4 labels', dict(labels=torch.zeros(4, 1, dtype=int))),
    ('whole numbers', dict(labels=[0., 1., 2., 3.])),
    ('one of them is -2', dict(labels=[0, -2, 1, 1])),
    ('Label 3 has no name', dict(labels=[0, 1, 2, 3], classes=['a', 'b', 'c'])),
    ('need 4 paths', dict(paths=['a.png']))])
def test_inconsistent_set(words, change):
    refused(words, ImageSet, **{'images': torch.zeros(4, 1, 2, 2, dtype=torch.uint8), **change})

# -- digits --

def test_digits():
    x, raw = digits(), load_digits()
    assert x.images.shape == (1797, 1, 8, 8) and x.n_classes == 10
    assert (x.images[:, 0].numpy() == np.floor(raw.images*255/16 + .5)).all()
    assert (x.labels.numpy() == raw.target).all() and x.classes == list('0123456789')

# -- arrays and tensors --

@given(seeds)
def test_bytes_survive_floats(seed):
    x = torch.from_numpy(noise(3, 1, 4, 4, seed=seed))
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert to_uint8(x.to(dtype)/255).equal(x)

def test_rounds_to_the_nearest_byte():
    x = torch.rand(5000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = np.rint(x.numpy().astype(np.float32)*np.float32(255))
    assert (to_uint8(x).numpy() == want).all() and to_uint8(x).dtype == torch.uint8

def test_floats_may_miss_the_range_by_rounding():
    assert to_uint8(torch.tensor([[-1e-7], [1 + 2e-7]])).flatten().tolist() == [0, 255]

@pytest.mark.parametrize('layout', ['NHW', 'NCHW gray', 'NHWC gray', 'NCHW', 'NHWC'])
@pytest.mark.parametrize('kind', [torch.from_numpy, np.asarray])
def test_layouts(layout, kind):
    x = noise(4, 1 if 'gray' in layout or layout == 'NHW' else 3, 6, 5)
    given_ = x[:, 0] if layout == 'NHW' else x.transpose(0, 2, 3, 1) if 'NHWC' in layout else x
    got = as_image_set(kind(given_))
    assert (got.images.numpy() == x).all() and got.images.is_contiguous() and got.labels is None

@pytest.mark.parametrize('change', [
    lambda x: x[::-1], lambda x: x[..., ::2], np.asfortranarray, lambda x: x.astype('>f4')/255,
    lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape)],
    ids=['backwards', 'strided', 'fortran', 'big-endian', 'read-only'])
def test_unusual_arrays(change, recwarn):
    x = change(noise(4, 3, 6, 6))
    want = np.rint(x.astype(np.float64)*255) if x.dtype.kind == 'f' else x
    assert (as_image_set(x).images.numpy() == want).all()
    assert not recwarn.list

def test_gradients_and_sets_pass():
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    assert not as_image_set(x).images.requires_grad
    assert as_image_set(whole := numbered(3)) is whole

def float_with(value):
    x = np.full((2000, 1, 2, 2), .5, np.float32)
    x[1500, 0, 1, 1] = value
    return x

@pytest.mark.parametrize('words, source', [
    ('Image 1500 holds NaN', float_with(np.nan)), ('Image 1500 holds NaN', float_with(np.inf)),
    ('from 0.5 to 1.01', float_with(1.01)), ('from -0.01 to 0.5', float_with(-.01)),
    ('from 0 to 255', np.linspace(0, 255, 16).reshape(4, 1, 2, 2)),
    ('torch.int64', np.ones((2, 1, 2, 2), int)), ('torch.bool', np.ones((2, 1, 2, 2), bool)),
    ('torch.uint16', np.ones((2, 1, 2, 2), np.uint16)),
    ('torch.complex64', np.ones((2, 1, 2, 2), np.complex64)),
    ('<U1', np.full((2, 1, 2, 2), 'a')), ('object', np.full((2, 1, 2, 2), None)),
    ('1797×64', np.ones((1797, 64))), ('shape 8', np.ones(8)), ('shape 1 are', np.ones(())),
    ('5×4×6×6', np.ones((5, 4, 6, 6))), ('5×6×6×4', np.ones((5, 6, 6, 4))),
    ('2×1×1×2×2', np.ones((2, 1, 1, 2, 2))),
    ('no image', np.ones((0, 8, 8))), ('no image', np.ones((3, 0, 8))), ('no image', np.ones((0, 3, 8, 8))),
    ('not as list', [1, 2]), ('not as NoneType', None), ('not as dict', {}),
    ('no image in this set', numbered(3)[:0])],
    ids=lambda v: v if isinstance(v, str) else '')
def test_bad_arrays(words, source): refused(words, as_image_set, source)

def test_asks_for_the_right_shape():
    refused('2×3 pixels', as_image_set, numbered(3), size=2)
    refused('have 1 channels', as_image_set, numbered(3), channels=3)
    assert as_image_set(np.zeros((2, 3, 8, 8)), size=8, channels=3).images.shape == (2, 3, 8, 8)

# -- one file --

photo = load_sample_image('china.jpg')[100:200, 150:250]   # 100×100×3

def decoded(path, channels, size=100): return decode_image(path, size, channels).transpose(1, 2, 0).squeeze()

def luma(x): return np.rint(x @ np.array([.299, .587, .114]))

def test_color_and_gray(folder):
    color, gray = save(folder/'c.png', photo), save(folder/'g.png', photo[..., 0])
    assert (decoded(color, 3) == photo).all()
    assert np.abs(decoded(color, 1) - luma(photo)).max() <= 1
    assert (decoded(gray, 1) == photo[..., 0]).all()
    assert (decoded(gray, 3) == photo[..., :1]).all()

def test_one_bit(folder):
    x = photo[..., 0] > 128
    assert (decoded(save(folder/'x.png', x), 1) == x*255).all()

@pytest.mark.parametrize('name', ['x.png', 'x.tif'])
def test_16_bits(folder, name):
    x = (photo[..., 0].astype(np.uint16)*257 + noise(100, 100) % 100).clip(max=65535).astype(np.uint16)
    assert np.abs(decoded(save(folder/name, x), 1) - x/257).max() <= .5 + 1e-6

def test_16_bits_big_endian(folder):
    x = photo[..., 0].astype('>u2')*257
    (folder/'x.pgm').write_bytes(b'P5 100 100 65535\n' + x.astype('>u2').tobytes())
    assert (decoded(folder/'x.pgm', 1) == photo[..., 0]).all()

def test_float_tiff(folder):
    x = photo[..., 0].astype(np.float32)/255
    assert (decoded(save(folder/'x.tif', x), 1) == photo[..., 0]).all()
    for bad in (x*255, x - .5, np.where(x > .9, np.nan, x), x + np.inf):
        path = save(folder/'bad.tif', bad.astype(np.float32))
        assert 'where 0 to 1 is understood' in data.try_decode(path, 8, 1)

def test_wide_integers(folder):
    for value in (70_000, -1):
        path = save(folder/'x.tif', np.full((8, 8), value, np.int32))
        assert 'where 0 to 65535 is understood' in data.try_decode(path, 8, 1)

def over_white(color, alpha):
    a = alpha[..., None]/255
    return color*a + 255*(1 - a)

def test_transparency_shows_white(folder):
    alpha = noise(100, 100)
    rgba = save(folder/'rgba.png', np.dstack([photo, alpha]))
    assert np.abs(decoded(rgba, 3) - over_white(photo, alpha)).max() <= 1
    la = save(folder/'la.png', np.dstack([photo[..., 0], alpha]))
    assert np.abs(decoded(la, 1) - over_white(photo[..., :1], alpha)[..., 0]).max() <= 1
    assert data.is_gray(Image.open(la)) and not data.is_gray(Image.open(rgba))

def test_transparent_color(folder):
    Image.fromarray(photo).save(folder/'rgb.png', transparency=tuple(int(v) for v in photo[3, 4]))
    want = np.where((photo == photo[3, 4]).all(-1, keepdims=True), 255, photo)
    assert (decoded(folder/'rgb.png', 3) == want).all()
    Image.fromarray(photo[..., 0]).save(folder/'l.png', transparency=int(photo[3, 4, 0]))
    want = np.where(photo[..., 0] == photo[3, 4, 0], 255, photo[..., 0])
    assert (decoded(folder/'l.png', 1) == want).all()

def test_palette(folder):
    indexed = Image.fromarray(photo).quantize(16)
    want = np.asarray(indexed.convert('RGB'))
    for name in ('x.png', 'x.gif', 'x.bmp', 'x.tif'):
        indexed.save(folder/name)
        assert (decoded(folder/name, 3) == want).all() and not data.is_gray(Image.open(folder/name))
    indexed.save(folder/'t.png', transparency=int(np.asarray(indexed)[0, 0]))
    assert (decoded(folder/'t.png', 3)[np.asarray(indexed) == np.asarray(indexed)[0, 0]] == 255).all()

def test_gray_palette_is_gray(folder):
    indexed = Image.fromarray((photo[..., 0]//16).astype(np.uint8), 'L').convert('L')
    p = Image.new('P', (100, 100))
    p.putpalette(sum(([255 - 17*i]*3 for i in range(16)), []))
    p.putdata(np.asarray(indexed).ravel().tolist())
    p.save(folder/'x.png')
    assert data.is_gray(Image.open(folder/'x.png'))
    assert (decoded(folder/'x.png', 1) == 255 - 17*(photo[..., 0]//16)).all()

def test_print_colors(folder):
    x = Image.fromarray(photo).convert('CMYK')
    x.save(folder/'x.tif')
    assert (decoded(folder/'x.tif', 3) == np.asarray(x.convert('RGB'))).all()
    x.save(folder/'x.jpg', quality=95)
    assert np.abs(decoded(folder/'x.jpg', 3).astype(int) - photo).mean() < 6

def test_first_frame_of_many(folder):
    frames = [Image.fromarray(np.full((9, 9), v, np.uint8)) for v in (40, 200)]
    for name in ('x.gif', 'x.tif', 'x.webp'):
        frames[0].save(folder/name, save_all=True, append_images=frames[1:])
        assert np.abs(decoded(folder/name, 1, 9).astype(int) - 40).max() <= 1, name

UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: lambda x: x.transpose(1, 0, 2),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90}

@pytest.mark.parametrize('tag', UPRIGHT)
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'tif', 'webp'])
def test_turned_upright(folder, tag, suffix):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {'jpg': dict(quality=100, subsampling=0), 'webp': dict(lossless=True)}.get(suffix, {})
    path = save(folder/f'x.{suffix}', photo, exif=exif, **options)
    assert np.abs(decoded(path, 3).astype(int) - UPRIGHT[tag](photo)).max() <= (12 if suffix == 'jpg' else 0)

def test_center_crop_cuts_pixels_and_never_blurs(folder):
    for h, w in ((28, 28), (29, 28), (28, 31), (28, 77)):
        x = noise(h, w)
        top, left = (h - 28)//2, (w - 28)//2
        assert (decoded(save(folder/'x.png', x), 1, 28) == x[top:top+28, left:left+28]).all()

@pytest.mark.parametrize('size', [25, 50, 100, 150])   # where torchvision, too, crops at whole pixels
@pytest.mark.parametrize('shape', [(100, 100), (100, 140), (180, 100)])
def test_resizes_as_torchvision(folder, size, shape):
    x = load_sample_image('flower.jpg')[:shape[0], :shape[1]].copy()
    resized = TF.resize(torch.from_numpy(x).permute(2, 0, 1).double(), size, antialias=True)
    want = TF.center_crop(resized, size).permute(1, 2, 0).numpy()
    assert np.abs(decoded(save(folder/'x.png', x), 3, size) - want).max() <= 1.1   # Pillow rounds twice

def triangle(n, start, side, size):
    "Weights size×n of an antialiased resize of `side` pixels from `start` on, of a row of n."
    centers = start + (np.arange(size)[:, None] + .5)*side/size
    weights = np.maximum(0, 1 - np.abs(np.arange(n) + .5 - centers)/max(side/size, 1))
    return weights/weights.sum(1, keepdims=True)

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), seeds)
def test_resizes_as_the_formula(tmp_path_factory, h, w, size, seed):
    x, side = noise(h, w, seed=seed), min(h, w)
    path = save(tmp_path_factory.mktemp('x')/'x.png', x)
    want = triangle(h, (h - side)//2, side, size) @ x @ triangle(w, (w - side)//2, side, size).T
    assert np.abs(decode_image(path, size, 1)[0] - want).max() <= 1.1   # Pillow rounds twice

def test_big_photos_decode_at_reduced_size_all_the_same(folder):
    big = np.asarray(Image.fromarray(load_sample_image('flower.jpg')).resize((1920, 1281)))
    exact = decoded(save(folder/'x.png', big), 3, 48).astype(int)
    assert np.abs(decoded(save(folder/'x.jpg', big, quality=95), 3, 48) - exact).mean() < 1.5

# -- finding files --

def names(folder): return [f.relative_to(folder).as_posix() for f in find_images(folder)]

def test_finds_nested_images_in_order(folder):
    images = ['b.png', 'a/z.JPG', 'a.jpeg', 'a/b/c/d.tiff', 'Ä/ö ü.webp', 'a/1.png', 'a/10.png', 'a/2.png']
    for name in images:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    for name in ('notes.txt', '.hidden.png', '.h/x.png', 'a/._z.jpg', 'a/.b/x.png', 'png', 'x.png~', '.png'):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    (folder/'folder.png').mkdir()
    assert names(folder) == sorted(images)

def test_hidden_parents_do_not_matter(tmp_path):
    save(tmp_path/'.store/images/x.png', noise(4, 4))
    assert names(tmp_path/'.store/images') == ['x.png']

def test_links(folder, tmp_path):
    save(tmp_path/'elsewhere/deep/x.png', noise(4, 4))
    (folder/'link').symlink_to(tmp_path/'elsewhere')
    (folder/'up').symlink_to(folder)                       # a loop
    (folder/'broken.png').symlink_to(tmp_path/'nowhere.png')
    (folder/'file.png').symlink_to(tmp_path/'elsewhere/deep/x.png')
    assert names(folder) == ['broken.png', 'file.png', 'link/deep/x.png']

def test_pipes_are_left_alone(folder):
    os.mkfifo(folder/'pipe.png')
    save(folder/'x.png', noise(4, 4))
    assert names(folder) == ['x.png']

def test_no_folder_no_image(folder, cache, monkeypatch):
    refused('no image', image_folder, folder, cache=cache)
    (folder/'notes.txt').touch()
    refused('no image', as_image_set, folder)
    refused('no folder', image_folder, folder/'nowhere')
    refused('is a file', image_folder, folder/'notes.txt')
    assert not cache.exists()
    def closed(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(os, 'scandir', closed)
    refused('cannot be listed', image_folder, folder)

def test_paths_from_home(tmp_path, monkeypatch, cache):
    monkeypatch.setenv('HOME', str(tmp_path))
    save(tmp_path/'mine/x.png', noise(4, 4))
    assert len(as_image_set('~/mine', cache=cache)) == 1

# -- many files, some damaged --

def damaged(folder):
    "A good image and one of each kind of damage."
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, 'jpeg')
    save(folder/'good.png', photo)
    (folder/'empty.png').touch()
    (folder/'text.jpg').write_text('<html>404 not found</html>')
    (folder/'cut.jpg').write_bytes(buffer.getvalue()[:1500])
    (folder/'cut.png').write_bytes((folder/'good.png').read_bytes()[:2000])
    (folder/'head.png').write_bytes((folder/'good.png').read_bytes()[:20])
    flipped = bytearray((folder/'good.png').read_bytes())
    flipped[3000:3040] = bytes(40)
    (folder/'flipped.png').write_bytes(flipped)
    (folder/'broken.png').symlink_to(folder/'nowhere.png')

def test_damaged_files_are_listed_and_skipped(folder, cache):
    damaged(folder)
    bad = {'empty.png': 'empty', 'text.jpg': 'not an image', 'cut.jpg': 'truncated', 'cut.png': 'truncated',
           'head.png': '', 'flipped.png': '', 'broken.png': 'no such file'}
    for x in (image_folder(folder, size=100, cache=cache), image_folder(folder, size=100, cache=cache)):
        assert x.paths == ['good.png'] and (x.images[0].permute(1, 2, 0).numpy() == photo).all()
        assert {path for path, _ in x.skipped} == bad.keys()
        assert all(reason and bad[path] in reason and '\n' not in reason and str(folder) not in reason
                   for path, reason in x.skipped), x.skipped
    images, skipped = read_images(find_images(folder), 100, 3)
    assert len(images) == 1 and sorted(p for p, _ in skipped) == sorted(str(folder/b) for b in bad)

def test_nothing_readable(folder, cache):
    damaged(folder)
    (folder/'good.png').unlink()
    for _ in range(2): refused(r"can be read \('broken.png': no such file", image_folder, folder, cache=cache)

def test_a_bomb_is_skipped(folder, cache, monkeypatch):
    save(folder/'bomb.png', noise(100, 100))
    save(folder/'x.png', noise(8, 8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    x = image_folder(folder, cache=cache)
    assert x.paths == ['x.png'] and 'bomb' in x.skipped[0][1].lower()

def test_reads_in_order_with_gaps(folder):
    files = [save(folder/f'{i}.png', np.full((4, 4), i, np.uint8)) for i in range(60)]
    for i in (0, 7, 8, 59): files[i].write_bytes(b'')
    images, skipped = read_images([str(f) for f in files[::-1]], 4, 1)
    want = [i for i in range(59, -1, -1) if i not in (0, 7, 8, 59)]
    assert images[:, 0, 0, 0].tolist() == want and [Path(p).stem for p, _ in skipped] == ['59', '8', '7', '0']
    assert read_images([], 4, 3)[0].shape == (0, 3, 4, 4)
    refused('size', read_images, files, 0, 1)
    refused('channels', read_images, files, 4, 2)

def test_bar_only_when_asked(folder, cache, capfd):
    for i in range(3): save(folder/f'{i}.png', noise(4, 4))
    image_folder(folder, cache=cache)
    assert capfd.readouterr() == ('', '')
    image_folder(folder, size=5, cache=cache, progress=True)
    assert '3/3' in capfd.readouterr().err

# -- a folder --

def test_five_thousand_gray_files(folder, cache):
    x = noise(5000, 28, 28)
    for i, image in enumerate(x): save(folder/f'{i:04}.png', image, compress_level=1)
    got = image_folder(folder, cache=cache)
    assert got.images.shape == (5000, 1, 28, 28) and (got.images[:, 0].numpy() == x).all()
    assert got.labels is None and got.paths[4321] == '4321.png'

def test_mixed_modes_and_sizes(folder, cache):
    save(folder/'a.png', noise(40, 60))
    save(folder/'b/c.png', noise(30, 50, 3))
    save(folder/'d.jpg', noise(70, 20, 3))
    x = image_folder(folder, cache=cache)
    assert x.images.shape == (3, 3, 30, 30) and x.paths == ['a.png', 'b/c.png', 'd.jpg'] and x.labels is None
    assert image_folder(folder, size=16, channels=1, cache=cache).images.shape == (3, 1, 16, 16)
    assert as_image_set(str(folder), 9, cache=cache).images.shape == (3, 3, 9, 9)

def test_size_is_at_most_96_unless_asked(folder, cache):
    save(folder/'a.png', noise(300, 200))
    assert image_folder(folder, cache=cache).images.shape == (1, 1, 96, 96)
    assert image_folder(folder, size=120, cache=cache).images.shape == (1, 1, 120, 120)

@pytest.mark.parametrize('words, options', [
    ('size must', dict(size=0)), ('size must', dict(size=-3)), ('size must', dict(size=2.5)),
    ('size must', dict(size='28')), ('size must', dict(size=(28, 28))), ('channels must', dict(channels=2)),
    ('channels must', dict(channels='gray'))])
def test_bad_options(folder, cache, words, options):
    save(folder/'a.png', noise(4, 4))
    refused(words, image_folder, folder, cache=cache, **options)

def test_subfolders_as_classes(folder, cache):
    for name in ('dog/1.png', 'dog/deep/2.png', 'cat/3.png', 'emu/4.png'): save(folder/name, noise(4, 4))
    (folder/'empty class').mkdir()
    x = image_folder(folder, cache=cache)
    assert x.paths == ['cat/3.png', 'dog/1.png', 'dog/deep/2.png', 'emu/4.png']
    assert x.labels.tolist() == [0, 1, 1, 2] and x.classes == ['cat', 'dog', 'emu']
    off = image_folder(folder, cache=cache, labels=False)
    assert off.labels is None and off.classes is None
    save(folder/'loose.png', noise(4, 4))
    assert image_folder(folder, cache=cache).labels is None
    refused('two subfolders', image_folder, folder, cache=cache, labels=True)

def test_one_subfolder_is_no_class(folder, cache):
    save(folder/'all/1.png', noise(4, 4))
    assert image_folder(folder, cache=cache).labels is None

def test_labels_skip_what_is_skipped(folder, cache):
    for name in ('a/1.png', 'b/2.png', 'c/3.png'): save(folder/name, noise(4, 4))
    (folder/'b/2.png').write_bytes(b'')
    x = image_folder(folder, cache=cache)
    assert x.labels.tolist() == [0, 1] and x.classes == ['a', 'c']
    assert x.skipped == [('b/2.png', 'an empty file')]

# -- the cache --

@pytest.fixture
def pair(folder):
    for i in (1, 2): save(folder/f'{i}.png', noise(6, 6, seed=i))
    return folder

@pytest.fixture
def decodes(monkeypatch):
    "The files decoded so far."
    seen, real = [], data.decode_image
    monkeypatch.setattr(data, 'decode_image', lambda file, *a: seen.append(Path(file).name) or real(file, *a))
    return seen

def test_decodes_once(pair, cache, decodes):
    first = image_folder(pair, cache=cache)
    again = image_folder(str(pair) + '/', cache=str(cache))
    assert sorted(decodes) == ['1.png', '2.png']
    assert first.images.equal(again.images) and first.paths == again.paths

def rewrite(f): save(f, noise(6, 6, seed=9))

def same_times(f):
    "Another image of the same length, with its old times put back."
    s, raw = f.stat(), bytearray(f.read_bytes())
    raw[-20] ^= 1
    f.write_bytes(raw)
    os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))

CHANGES = {'rewrite': rewrite, 'same times': same_times, 'touch': os.utime, 'delete': os.unlink,
           'rename': lambda f: f.rename(f.with_name('3.png')),
           'add': lambda f: save(f.with_name('4.png'), noise(6, 6))}

@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(pair, cache, decodes, change):
    image_folder(pair, cache=cache)
    decodes.clear()
    change(pair/'2.png')
    x = image_folder(pair, cache=cache)
    assert sorted(decodes) == [f.name for f in find_images(pair)]
    want, _ = read_images(find_images(pair), 6, 1)
    assert x.images.equal(want)

def test_options_have_caches_of_their_own(pair, cache):
    shapes = {tuple(image_folder(pair, s, c, cache).images.shape) for s in (None, 4, 9) for c in (None, 3)}
    assert shapes == {(2, c, s, s) for s in (6, 4, 9) for c in (1, 3)}

DAMAGE = {
    'cut': lambda f: f.write_bytes(f.read_bytes()[:-1]), 'empty': lambda f: f.write_bytes(b''),
    'gone': os.unlink,
    'garbage': lambda f: f.write_bytes(b'x'*300), 'other': lambda f: np.save(f, noise(5, 1, 6, 6)),
    'json cut': lambda f: f.with_suffix('.json').write_text('[[0'),
    'json other': lambda f: f.with_suffix('.json').write_text('[3]'),
    'json gone': lambda f: f.with_suffix('.json').unlink()}

@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_anew(pair, cache, damage):
    want = image_folder(pair, cache=cache).images.clone()
    damage(next(cache.glob('*.npy')))
    assert image_folder(pair, cache=cache).images.equal(want)
    assert len(list(cache.iterdir())) == 2

def test_writing_to_images_never_reaches_the_cache(pair, cache):
    x = image_folder(pair, cache=cache)
    want = x.images.clone()
    x.images[:] = 0
    assert image_folder(pair, cache=cache).images.equal(want)

def test_an_interrupted_write_leaves_nothing(pair, cache, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(data, 'try_decode', stop)
        with pytest.raises(KeyboardInterrupt): image_folder(pair, cache=cache)
    assert list(cache.iterdir()) == []
    assert len(image_folder(pair, cache=cache)) == 2

def test_a_full_disk_is_one_sentence(pair, cache, monkeypatch):
    def full(_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    refused('No space left', image_folder, pair, cache=cache)
    assert list(cache.iterdir()) == []

def test_an_impossible_cache_is_one_sentence(pair, tmp_path):
    (tmp_path/'file').touch()
    for bad in (tmp_path/'file', tmp_path/'file/below'):
        refused('cannot be written', image_folder, pair, cache=bad)

def test_default_cache(pair, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    image_folder(pair)
    assert len(list((tmp_path/'xdg/scan_nb').glob('images-*.npy'))) == 1
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cache_dir() == tmp_path/'.cache/scan_nb'

def test_the_cache_is_an_ordinary_file(folder, cache):
    damaged(folder)
    image_folder(folder, size=10, cache=cache)
    file = next(cache.glob('*.npy'))
    x, skipped = np.load(file), json.loads(file.with_suffix('.json').read_text())
    assert x.shape == (8, 3, 10, 10) and len(skipped) == 7 and x[0].any() and not x[1:].any()

def test_two_processes_write_at_once(folder, cache):
    for i in range(300): save(folder/f'{i:03}.png', noise(12, 12, seed=i))
    (folder/'007.png').write_bytes(b'')
    code = ('import sys, hashlib; from scan_nb.data import image_folder; sys.stdin.readline();'
            'x = image_folder(sys.argv[1], cache=sys.argv[2]);'
            'print(len(x), len(x.skipped), hashlib.sha256(x.images.numpy().tobytes()).hexdigest())')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command, pipe = [sys.executable, '-c', code, folder, cache], subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) for _ in range(2)]
    for r in runs:
        r.stdin.write('go\n')
        r.stdin.flush()
    x, _ = read_images(find_images(folder), 12, 1)
    want = f'299 1 {hashlib.sha256(x.numpy().tobytes()).hexdigest()}\n'
    assert [r.communicate()[0] for r in runs] == [want]*2
    assert len(list(cache.iterdir())) == 2

def test_atomic_write(tmp_path):
    (tmp_path/'x').write_text('old')
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path/'x') as f:
        f.write(b'half')
        1/0  # noqa: B018
    assert (tmp_path/'x').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path/'x') as f: f.write(b'new')
    assert (tmp_path/'x').read_text() == 'new' and len(list(tmp_path.iterdir())) == 1

# -- Fashion-MNIST --

def idx(x): return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, '>u4').tobytes() + x.tobytes()

FAKE = {f'{part}-{what}-ubyte': idx(x) for part, n in (('train', 20), ('t10k', 10))
        for what, x in (('images-idx3', noise(n, 28, 28, seed=n)),
                        ('labels-idx1', np.arange(n, dtype=np.uint8) % 10))}

@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No copy on this machine, no internet, two mirrors; the addresses asked for."
    from torchvision.datasets import FashionMNIST
    monkeypatch.setattr(FashionMNIST, 'mirrors', ['https://one.test/', 'https://two.test/'])
    asked = []
    def urlopen(url, timeout):
        asked.append(url)
        raise OSError('no route to host')
    monkeypatch.setattr('urllib.request.urlopen', urlopen)
    monkeypatch.setattr(data, 'DEBIAN_FASHION', str(tmp_path/'debian'))
    return asked

@pytest.mark.parametrize('end', ['', '.gz'])
@pytest.mark.parametrize('place', ['root/FashionMNIST/raw', 'debian'])
def test_fashion_from_files(tmp_path, offline, place, end):
    (tmp_path/place).mkdir(parents=True)
    for name, raw in FAKE.items():
        (tmp_path/place/(name + end)).write_bytes(gzip.compress(raw) if end else raw)
    train, test, both = (fashion_mnist(s, tmp_path/'root') for s in ('train', 'test', 'all'))
    assert (train.images[:, 0].numpy() == noise(20, 28, 28, seed=20)).all() and len(test) == 10
    assert both.images.equal(torch.cat([train.images, test.images]))
    assert both.labels.tolist() == [*range(10)]*3
    assert both.n_classes == 10 and both.labels.dtype == torch.int64
    assert not offline

def test_fashion_nowhere(tmp_path, offline):
    refused('apt install dataset-fashion-mnist', fashion_mnist, 'test', tmp_path)
    assert offline == [f'https://{n}.test/t10k-images-idx3-ubyte.gz' for n in ('one', 'two')]
    refused("not 'valid'", fashion_mnist, 'valid')

def test_fashion_downloads(tmp_path, offline, monkeypatch):
    from torchvision.datasets import FashionMNIST
    packed = {f'{name}.gz': gzip.compress(raw) for name, raw in FAKE.items()}
    def urlopen(url, timeout):
        raw = packed[url.rsplit('/', 1)[1]]
        return io.BytesIO(b'damaged on the way' if 'one.test' in url else raw)
    monkeypatch.setattr('urllib.request.urlopen', urlopen)
    resources = [(k, hashlib.md5(v).hexdigest()) for k, v in packed.items()]
    monkeypatch.setattr(FashionMNIST, 'resources', resources)
    assert len(fashion_mnist('test', tmp_path)) == 10
    raw = tmp_path/'FashionMNIST/raw'
    assert {f.name for f in raw.iterdir()} == {'t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'}
    monkeypatch.setattr('urllib.request.urlopen', None)   # from now on, from the files
    assert len(fashion_mnist('test', tmp_path)) == 10

@pytest.mark.parametrize('damage', [
    lambda b: b[:-1], lambda b: b[:2], lambda b: b'', lambda b: b + b'x', lambda b: b'\0\0\x0d' + b[3:],
    lambda b: bytes(3) + b'\xff' + b[4:]], ids=['cut', 'head cut', 'empty', 'too long', 'type', 'axes'])
@pytest.mark.parametrize('end', ['', '.gz'])
def test_fashion_damaged(tmp_path, offline, damage, end):
    raw = tmp_path/'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for name, b in FAKE.items():
        (raw/(name + end)).write_bytes(gzip.compress(damage(b)) if end else damage(b))
    refused('is damaged', fashion_mnist, 'test', tmp_path)

@pytest.mark.parametrize('at', [5, 12, -12, -4])
def test_fashion_damaged_gz(tmp_path, offline, at):
    raw = tmp_path/'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for name, b in FAKE.items():
        packed = bytearray(gzip.compress(b))
        (raw/f'{name}.gz').write_bytes(packed[:at] if at < 0 else packed[:at] + bytes(20) + packed[at+20:])
    refused('is damaged', fashion_mnist, 'test', tmp_path)

@pytest.mark.skipif(not Path(DEBIAN_FASHION).exists(), reason='Fashion-MNIST is not installed')
def test_the_real_fashion(tmp_path):
    x = fashion_mnist('test', tmp_path)
    assert x.images.shape == (10_000, 1, 28, 28) and x.labels.bincount().tolist() == [1000]*10
    assert [x.classes[i] for i in x.labels[:3]] == ['Ankle boot', 'Pullover', 'Trouser']

# -- looking --

@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_grid_holds_every_image(n, columns, c, down, across):
    x = noise(n, c, 4, 5)
    grid = image_grid(torch.from_numpy(x), columns, (down, across))
    columns = min(n, columns)
    assert grid.shape == (-(-n//columns)*(4 + down), columns*(5 + across), 3) and grid.dtype == np.uint8
    left = grid.astype(int).copy()
    for i in range(n):
        r, k = i//columns*(4 + down) + down, i % columns*(5 + across) + across
        assert (grid[r:r+4, k:k+5] == x[i].transpose(1, 2, 0)).all()
        left[r:r+4, k:k+5] = 255
    assert (left == 255).all()

def test_show_images():
    import matplotlib.pyplot as plt
    ax = show_images(digits()[:7], columns=3)
    assert len(ax.images) == 1 and not ax.texts and not ax.axison
    ax = show_images(torch.rand(5, 3, 8, 8), titles=torch.arange(3).tolist(), columns=10)
    assert [t.get_text() for t in ax.texts] == ['0', '1', '2']
    _, mine = plt.subplots()
    assert show_images(numbered(1), titles=['x'], ax=mine) is mine
    plt.close('all')

def test_titles_stand_above_their_images():
    import matplotlib.pyplot as plt
    n, columns, h, w = 7, 3, 16, 32
    ax = show_images(torch.zeros(n, 1, h, w), titles=range(n), columns=columns)
    grid = ax.images[0].get_array()
    for t in ax.texts:
        x, y = t.get_position()
        assert (grid[round(y) + 2, round(x)] == 0).all() and (grid[round(y) - 1, round(x)] == 255).all()
    plt.close('all')
