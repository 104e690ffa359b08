"Images as one tensor: every kind of file, every layout of array, every fault."
import io
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from scan_nb import data, datasets
from scan_nb.data import (
    ImageSet, UserError, decode_image, digits, find_images, image_grid, read_images,
    show_images, to_uint8)

as_image_set, image_folder = datasets.as_image_set, data.image_folder   # this one is the lesson's

matplotlib.use('agg')
seeds = st.integers(0, 2**32 - 1)

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
    ('must be a uint8 tensor, not ndarray', dict(images=np.zeros((4, 1, 2, 2), np.uint8))),
    ('must be a uint8 tensor, not torch.float32', dict(images=torch.rand(4, 1, 2, 2))),
    ('not 4×2×2', dict(images=torch.zeros(4, 2, 2, dtype=torch.uint8))),
    ('not 4×17×2×2', dict(images=torch.zeros(4, 17, 2, 2, dtype=torch.uint8))),
    ('not 4×1×0×2', dict(images=torch.zeros(4, 1, 0, 2, dtype=torch.uint8))),
    ('need 4 labels', dict(labels=[0, 1, 2])),
    ('need 4 labels', dict(labels=torch.zeros(4, 1, dtype=int))),
    ('one value per image', dict(labels=[[0], [1, 2], 3, 4])),
    ("'e' is none of the classes", dict(labels=['a', 'b', 'e', 'a'], classes=['a', 'b', 'c'])),
    ('Label 3 has no name', dict(labels=[0, 1, 2, 3], classes=['a', 'b', 'c'])),
    ('need 4 paths', dict(paths=['a.png']))])
def test_inconsistent_set(words, change):
    refused(words, ImageSet, **{'images': torch.zeros(4, 1, 2, 2, dtype=torch.uint8), **change})

# -- unknown labels and times --

def tiny(n=4, **more): return ImageSet(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), **more)

@given(st.lists(st.integers(-1, 5), min_size=1, max_size=9), st.data())
def test_unknown_labels(labels, draw):
    x = tiny(len(labels), labels=labels)
    unknown = labels.count(-1)
    assert x.n_classes == max(labels) + 1
    assert (f', {unknown} unlabeled)' in repr(x)) == (unknown > 0)
    where = draw.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1))
    assert x[where].labels.tolist() == [labels[i] for i in where]

def test_unknown_labels_need_no_name():
    assert tiny(labels=[-1, 1, 0, -1], classes=['a', 'b']).n_classes == 2

NAN, BIG = float('nan'), 10_000_019
@pytest.mark.parametrize('labels, positions, classes', [
    (['owl', 'cat', None, 'owl'], [1, 0, -1, 1], ['cat', 'owl']),
    (['b', '', 'a', NAN], [1, -1, 0, -1], ['a', 'b']),
    (np.array(['b', 'a', 'b', 'a']), [1, 0, 1, 0], ['a', 'b']),
    ([b'x', 'y', b'x', 'y'], [0, 1, 0, 1], ['x', 'y']),
    ([BIG, 7, 7, -1], [1, 0, 0, -1], ['7', str(BIG)]),
    (torch.tensor([BIG, 7, 7, -1]), [1, 0, 0, -1], ['7', str(BIG)]),
    (np.array([2**63, 1, 1, 2**63], np.uint64), [1, 0, 0, 1], ['1', str(2**63)]),
    ([2**70, 1, 1, 2**70], [1, 0, 0, 1], ['1', str(2**70)]), ([0, -2, 1, 1], [1, 0, 2, 2], ['-2', '0', '1']),
    ([1., 2., NAN, 1.], [0, 1, -1, 0], ['1', '2']),
    (torch.tensor([.5, 10., 9., .5]), [0, 2, 1, 0], ['0.5', '9', '10']),
    ([True, False, None, True], [1, 0, -1, 1], ['False', 'True']),
    ([3 + 1j, 3 + 1j, None, 1], [1, 1, -1, 0], None),
    (np.array(['2020-01-01', 'NaT', '2020-01-01', '2019-01-01'], 'datetime64[D]'), [1, -1, 1, 0], None),
    ((2, np.int8(0), 1, -1), [2, 0, 1, -1], [None]),
    (np.array([2, 0, 1, 255], np.uint8), [2, 0, 1, 255], [None])])
def test_labels_of_any_kind(labels, positions, classes):
    "Distinct values are the classes, and their names; small whole numbers stay as they are."
    x = tiny(labels=labels)
    assert x.labels.tolist() == positions and x.labels.dtype == torch.int64
    assert classes is None or x.classes == (None if classes == [None] else classes)
    assert x[[2, 0]].labels.tolist() == [positions[2], positions[0]] and x[[2, 0]].classes == x.classes

@given(st.lists(st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.booleans(),
    st.binary(max_size=3)),
                min_size=1, max_size=9))
def test_equal_labels_are_one_class(labels):
    x = tiny(len(labels), labels=labels)
    assert int(x.labels.max()) < (x.n_classes or 1) and int(x.labels.min()) >= -1
    for i, a in enumerate(labels):
        for j, b in enumerate(labels):
            if a == b and type(a) is type(b): assert x.labels[i] == x.labels[j]

def test_sets_share_their_classes():
    a, b = tiny(labels=['dog', 'cat', None, 'dog']), tiny(2, labels=['owl', 'cat'])
    both = datasets.share_classes(dict(train=a, test=b, more=tiny(3)))
    assert both['train'].classes == both['test'].classes == ['cat', 'dog',
        'owl'] and both['more'].labels is None
    assert both['train'].labels.tolist() == [1, 0, -1, 1] and both['test'].labels.tolist() == [2, 0]
    same = dict(train=tiny(labels=[0, 1, 2, 5]), test=tiny(labels=[1, 1, 0, 0]))
    assert datasets.share_classes(same) is same
    mixed = datasets.share_classes(dict(a=tiny(labels=[0, 1, 2, 2]), b=tiny(2, labels=[BIG, 1])))
    assert mixed['a'].classes == ['0', '1', '2', str(BIG)] and mixed['b'].labels.tolist() == [3, 1]

seconds = st.floats(-1e11, 1e11)

@given(st.lists(seconds, min_size=1, max_size=9), st.data())
def test_times_go_with_their_images(times, draw):
    kind = draw.draw(st.sampled_from([list, np.array, lambda t: torch.tensor(t, dtype=torch.float64)]))
    x = tiny(len(times), times=kind(times)).to('cpu')
    where = draw.draw(st.lists(st.integers(0, len(times) - 1), min_size=1))
    assert x.times.dtype == torch.float64 and x[where].times.tolist() == [times[i] for i in where]
    assert x[:1].times.tolist() == times[:1] and x[torch.ones(len(times), dtype=bool)].times.tolist() == times

def test_new_fields_come_last():
    assert list(vars(tiny()))[-2:] == ['facts', 'embeddings'] and tiny().times is None

@pytest.mark.parametrize('words, times', [
    ('need 4 times', [1, 2]), ('need 4 times', np.ones((4, 1))), ('image 2 is nan', [0, 1, np.nan, 2]),
    ('image 3 is -inf', [0, 1, 2, -np.inf]), ('float64', torch.tensor([0, 1e9, 2, 3])),
    ('must be numbers', ['a', 'b', 'c', 'd']), ('must be numbers', [0, 1, 2, None]),
    ('must be numbers', np.array(['2020-01-01']*4, 'datetime64[s]'))])
def test_wrong_times(words, times): refused(words, tiny, times=times)

# -- digits --

def test_digits():
    x, raw = digits(), load_digits()
    assert x.images.shape == (1797, 1, 8, 8) and x.n_classes == 10
    assert (x.images[:, 0].numpy() == np.floor(raw.images*255/16 + .5)).all()
    assert (x.labels.numpy() == raw.target).all() and x.classes == list('0123456789')

# -- names --

def test_closest():
    known = ['cifar-10', 'cifar-100', 'digits', 'scan.epochs', 'scan.lr']
    near = [datasets.closest(n, known) for n in ('cifar10', 'digit', 'epoch', 'scan.l')]
    assert near == ['cifar-10', 'digits', 'scan.epochs', 'scan.lr'] and datasets.closest('', known) in known

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
    x = change(noise(4, 3, 6, 8))
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
    ('between 0 and 65535', np.full((2, 1, 2, 2), 70_000)),
    ('from -1 to 9', np.arange(-1, 10).repeat(8).reshape(-1, 2, 4)),
    ('torch.complex64', np.ones((2, 1, 2, 2), np.complex64)),
    ('<U1', np.full((2, 1, 2, 2), 'a')), ('object', np.full((2, 1, 2, 2), None)),
    ('1797×64', np.ones((1797, 64))), ('shape 8', np.ones(8)), ('shape 1 are', np.ones(())),
    ('5×17×18×18', np.ones((5, 17, 18, 18))), ('can be read as', np.ones((5, 4, 8, 6))),
    ('2×1×1×2×2', np.ones((2, 1, 1, 2, 2))),
    ('no image', np.ones((0, 8, 8))), ('no image', np.ones((3, 0, 8))), ('no image', np.ones((0, 3, 8, 8))),
    ('not as list', [1, 2]), ('not as NoneType', None), ('not as dict', {}),
    ('no image in this set', numbered(3)[:0])],
    ids=lambda v: v if isinstance(v, str) else '')
def test_bad_arrays(words, source): refused(words, as_image_set, source)

STEPS = {1: 1, 2: 16, 16: 16, 17: 255, 255: 255, 256: 1023, 1023: 1023, 1024: 4095, 4096: 16383, 16384: 65535}

@given(st.sampled_from([*STEPS]), st.sampled_from(['uint16', 'int32', 'int64', 'uint32', 'float32', '>u2']),
       st.integers(0, 2**32 - 1))
def test_the_highest_value_of_the_set_decides_what_white_is(high, dtype, seed):
    x = np.random.default_rng(seed).integers(0, high + 1, (5, 1, 2, 2))
    x[seed % 5, 0, 1, 0] = high
    found = as_image_set(x.astype(dtype))
    assert found.facts['white'] == STEPS[high]
    assert (found.images.numpy() == np.rint(x*(255/STEPS[high]))).all()
    one = as_image_set(x[:1].astype(dtype), white=STEPS[high])   # as for training, whatever is in it
    assert one.images.equal(found.images[:1])

def test_numbers_that_say_black_or_white():
    x = np.arange(8).reshape(2, 1, 2, 2) % 2 == 0
    assert as_image_set(x).images.unique().tolist() == [0, 255]
    assert not as_image_set(np.zeros((2, 4, 4), int)).images.any()
    assert 'white' not in as_image_set(np.zeros((2, 4, 4), np.uint8)).facts
    refused('between 0 and 1,', as_image_set, np.full((2, 4, 4), 300), white=1)

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

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('kind', ['tif', 'png', 'float'])
def test_counts_of_few_bits_in_deep_files(folder, bits, kind):
    x = np.random.default_rng(bits).integers(0, 2**bits, (4, 8, 8))
    x[2, 0, 0] = 2**bits - 1   # the brightest of all; the others alone would ask for another step
    dark = [[[1]], [[9]], [[1]], [[5]]]
    for i, image in enumerate(x//dark):
        if kind == 'float': save(folder/f'{i}.tif', image.astype(np.float32))
        else: save(folder/f'{i}.{kind}', image.astype(np.uint16))
    for found in (image_folder(folder), datasets.image_folder(folder, cache=folder.parent/'cache')):
        assert found.facts['white'] == 2**bits - 1
        want = np.rint(x//dark*(255/(2**bits - 1)))
        assert np.abs(found.images[:, 0].numpy() - want).max() <= 1
    alone = image_folder(folder, white=2**bits - 1)
    assert alone.images.equal(found.images)

def test_beyond_white_is_left_out(folder):
    for i, high in enumerate((200, 5000)): save(folder/f'{i}.png', np.full((4, 4), high, np.uint16))
    found = image_folder(folder, white=255)
    assert found.images.unique().tolist() == [200] and 'where 0 to 255 is understood' in found.skipped[0][1]
    (folder/'0.png').unlink()
    refused('can be read', image_folder, folder, white=255)

def test_gray_saved_in_color_is_gray(folder):
    for i in range(70): save(folder/f'{i:02}.jpg', np.repeat(noise(9, 9)[..., None], 3, -1))
    for i in range(3): save(folder/f'x{i}.png', np.dstack([noise(9, 9)]*3 + [noise(9, 9)]))
    assert image_folder(folder).images.shape[1] == 1
    assert image_folder(folder, channels=3).images.shape[1] == 3
    x = np.repeat(noise(9, 9)[..., None], 3, -1)
    x[4, 4, 1] ^= 1
    save(folder/'y.png', x)
    assert image_folder(folder).images.shape[1] == 3

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

def test_no_folder_no_image(folder, monkeypatch):
    refused('no image', image_folder, folder)
    (folder/'notes.txt').touch()
    refused('no image', image_folder, folder)
    refused('no folder', image_folder, folder/'nowhere')
    refused('is a file', image_folder, folder/'notes.txt')
    def closed(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(os, 'scandir', closed)
    refused('cannot be listed', image_folder, folder)

def test_paths_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save(tmp_path/'mine/x.png', noise(4, 4))
    assert image_folder('~/mine').paths == ['x.png']

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

BAD = {'empty.png': 'empty', 'text.jpg': 'not an image', 'cut.jpg': 'truncated', 'cut.png': 'truncated',
       'head.png': '', 'flipped.png': '', 'broken.png': 'no such file'}

def test_damaged_files_are_listed_and_skipped(folder):
    damaged(folder)
    x = image_folder(folder, size=100)
    assert x.paths == ['good.png'] and (x.images[0].permute(1, 2, 0).numpy() == photo).all()
    assert {path for path, _ in x.skipped} == BAD.keys()
    assert all(reason and BAD[path] in reason and '\n' not in reason and str(folder) not in reason
               for path, reason in x.skipped), x.skipped
    images, skipped = read_images(find_images(folder), 100, 3)
    assert len(images) == 1 and sorted(p for p, _ in skipped) == sorted(str(folder/b) for b in BAD)

def test_nothing_readable(folder):
    damaged(folder)
    (folder/'good.png').unlink()
    refused(r"can be read \('broken.png': no such file", image_folder, folder)

def test_a_bomb_is_skipped(folder, monkeypatch):
    save(folder/'bomb.png', noise(100, 100))
    save(folder/'x.png', noise(8, 8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    x = image_folder(folder)
    assert x.paths == ['x.png'] and 'bomb' in x.skipped[0][1].lower()

LARGE = {'RGBA': lambda x, a: np.dstack([x, a]), 'LA': lambda x, a: np.dstack([x[..., 0], a]),
         'RGB': lambda x, a: x, 'L': lambda x, a: x[..., 0],
         '16 bits': lambda x, a: x[..., 0].astype(np.uint16)*257}

@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('shape', [(1500, 750), (555, 2001)])   # several strips; a remainder at each end
def test_a_large_picture_is_reduced_in_strips(folder, monkeypatch, kind, shape):
    x = np.asarray(Image.fromarray(load_sample_image('china.jpg')).resize(shape[::-1]))
    a = np.asarray(Image.fromarray(noise(20, 20)).resize(shape[::-1]))
    path = save(folder/'x.png', LARGE[kind](x, a), compress_level=1)
    image, turned = Image.open(path), Image.Exif()
    image.load()
    turned[274] = 6
    whole = image if kind == '16 bits' else image.convert('RGBA' if kind[-1] == 'A' else kind)
    if kind == '16 bits': whole = data._to_8bit(image, None)
    want = data.upright_8bit(whole.reduce(7), None)
    strips, crop = [], Image.Image.crop
    def cut(self, box):
        strips.append(box)
        return crop(self, box)
    monkeypatch.setattr(Image.Image, 'crop', cut)
    found = data.upright_8bit(image, None, 7)
    assert len(strips) > 1 and (np.asarray(found.convert('RGB')) == np.asarray(want.convert('RGB'))).all()
    image.info['exif'] = turned.tobytes()   # turned after it was reduced
    image._exif = None
    turned = np.asarray(data.upright_8bit(image, None, 7).convert('RGB'))
    assert (turned == np.rot90(np.asarray(want.convert('RGB')), -1)).all()
    ordinary = decode_image(path, 48, 3).astype(int)
    monkeypatch.setattr(data, '_in_turn', lambda image: data.LARGE)
    assert np.abs(decode_image(path, 48, 3) - ordinary).mean() < 2   # of what is averaged twice

def test_memory_of_large_pictures_and_their_warning(folder, monkeypatch, recwarn):
    save(folder/'x.png', noise(40, 40))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)   # warns from there, refuses from twice as much
    assert len(image_folder(folder)) == 1 and not recwarn.list
    assert Image.core.get_block_size() >= 2**25   # what malloc of glibc always gives back

def test_strips_tell_gray_from_color(folder):
    x = np.full((1200, 1000, 3), 7, np.uint8)
    assert data._only_gray(save(folder/'x.png', x))
    x[-1, -1, 0] = 8
    assert not data._only_gray(save(folder/'x.png', x))

def test_reads_in_order_with_gaps(folder):
    files = [save(folder/f'{i}.png', np.full((4, 4), i, np.uint8)) for i in range(60)]
    for i in (0, 7, 8, 59): files[i].write_bytes(b'')
    images, skipped = read_images([str(f) for f in files[::-1]], 4, 1)
    want = [i for i in range(59, -1, -1) if i not in (0, 7, 8, 59)]
    assert images[:, 0, 0, 0].tolist() == want and [Path(p).stem for p, _ in skipped] == ['59', '8', '7', '0']
    assert read_images([], 4, 3)[0].shape == (0, 3, 4, 4)
    refused('size', read_images, files, 0, 1)
    refused('channels', read_images, files, 4, 2)

# -- a folder --

def test_mixed_modes_and_sizes(folder):
    save(folder/'a.png', noise(40, 60))
    save(folder/'b/c.png', noise(30, 50, 3))
    save(folder/'d.jpg', noise(70, 20, 3))
    x = image_folder(folder)
    assert x.images.shape == (3, 3, 30, 30) and x.paths == ['a.png', 'b/c.png', 'd.jpg'] and x.labels is None
    assert image_folder(folder, size=16, channels=1).images.shape == (3, 1, 16, 16)
    assert image_folder(str(folder), 9).images.shape == (3, 3, 9, 9)

def test_size_is_at_most_96_unless_asked(folder):
    save(folder/'a.png', noise(300, 200))
    assert image_folder(folder).images.shape == (1, 1, 96, 96)
    assert image_folder(folder, size=120).images.shape == (1, 1, 120, 120)

@pytest.mark.parametrize('words, options', [
    ('size must', dict(size=0)), ('size must', dict(size=-3)), ('size must', dict(size=2.5)),
    ('size must', dict(size='28')), ('size must', dict(size=(28, 28))), ('channels must', dict(channels=2)),
    ('channels must', dict(channels='gray'))])
def test_bad_options(folder, words, options):
    save(folder/'a.png', noise(4, 4))
    refused(words, image_folder, folder, **options)

def test_subfolders_as_classes(folder):
    for name in ('dog/1.png', 'dog/deep/2.png', 'cat/3.png', 'emu/4.png'): save(folder/name, noise(4, 4))
    (folder/'empty class').mkdir()
    x = image_folder(folder)
    assert x.paths == ['cat/3.png', 'dog/1.png', 'dog/deep/2.png', 'emu/4.png']
    assert x.labels.tolist() == [0, 1, 1, 2] and x.classes == ['cat', 'dog', 'emu']
    off = image_folder(folder, labels=False)
    assert off.labels is None and off.classes is None
    save(folder/'loose.png', noise(4, 4))
    assert image_folder(folder).labels is None
    refused('two subfolders', image_folder, folder, labels=True)

@pytest.mark.parametrize('paths, classes, splits', [
    (['train/cat/1.png', 'train/dog/1.png', 'val/cat/2.png'], ['cat', 'dog', 'cat'], ['train', 'train',
        'test']),
    (['cat/train/1.png', 'dog/Validation/1.png'], ['cat', 'dog'], ['train', 'test']),
    (['pets/Train/cat/1.png', 'pets/TEST/dog/a/2.png'], ['cat', 'dog'], ['train', 'test']),
    (['a/b/cat/1.png', 'a/b/dog/2.png'], ['cat', 'dog'], None),
    (['train/1.png', 'test/2.png'], None, ['train', 'test']),
    (['cat/1.png', 'train/2.png'], ['cat', 'train'], None),
    (['train/1.png', 'bus/2.png'], ['train', 'bus'], None),
    (['train/cat/1.png', 'train/dog/2.png'], ['cat', 'dog'], None), (['cat/1.png', '2.png'], None, None),
    (['test/cat/1.png', 'val/dog/2.png'], ['test', 'val'], None)])
def test_what_subfolders_mean(paths, classes, splits):
    found, split = data.read_layout(paths)
    assert split == splits and (found == classes if classes else None in found or len({*found}) == 1)
    y, names = data.class_labels(paths)
    assert y is None if not classes or len({*classes}) < 2 else [names[i] for i in y] == classes

def test_results_of_a_run_are_no_data(folder):
    for name in ('a/1.png', 'runs/x/figures/map.png', 'results/y/scan/confusion.png', 'scan/2.png',
        'pretext/3.png'):
        save(folder/name, noise(4, 4))
    for stage in ('runs/x/pretext/simclr', 'results/y/scan'):
        (folder/stage).mkdir(parents=True, exist_ok=True)
        (folder/stage/'stage.json').write_text('{}')
    assert [f.relative_to(folder).as_posix() for f in find_images(folder)] == ['a/1.png', 'pretext/3.png',
        'scan/2.png']

def test_one_subfolder_is_no_class(folder):
    save(folder/'all/1.png', noise(4, 4))
    assert image_folder(folder).labels is None

def test_labels_skip_what_is_skipped(folder):
    for name in ('a/1.png', 'b/2.png', 'c/3.png'): save(folder/name, noise(4, 4))
    (folder/'b/2.png').write_bytes(b'')
    x = image_folder(folder)
    assert x.labels.tolist() == [0, 1] and x.classes == ['a', 'c']
    assert x.skipped == [('b/2.png', 'an empty file')]

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
