"Images of every kind: 1 to 16 channels, numbers of every type, lists, Datasets, tables."
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from test_data import noise, refused, save
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.transforms.functional import adjust_contrast

from scan_nb import augment as lesson, report
from scan_nb.augment import Normalize, to_float
from scan_nb.views import SimCLRAugment, StrongAugment, WeakAugment
from scan_nb.data import ImageSet, UserError, image_folder, image_grid, to_color
from scan_nb.datasets import describe
from scan_nb.pipeline import SCAN
from scan_nb.recipes import FOLDER, Recipe, ScanRecipe
from scan_nb.report import _caption_images
from scan_nb.sources import as_image_set, holds_pictures

some = settings(max_examples=60, deadline=None)
small = st.integers(1, 24)

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'

# -- the layout of an array --

def found(x, **options):
    "The images as they were understood; None: it was asked how they are meant."
    try: return as_image_set(x, **options).images.numpy()
    except UserError as e: assert 'say how many `channels`' in str(e) and '\n' not in str(e)

@some
@given(small, small, small)
def test_no_layout_is_preferred(a, b, c):
    "Where both are possible there is a sign for the one taken, and none for the other."
    assume(min(a, c) <= 16)
    x = noise(2, a, b, c)
    y, mirrored = found(x), found(x.transpose(0, 3, 2, 1))
    assert (y is None) == (mirrored is None)
    if y is not None: assert (y.transpose(0, 1, 3, 2) == mirrored).all()
    first, last = (a, b, c), (c, a, b)
    if max(a, c) > 16: assert y.shape[1:] == (first if a <= 16 else last)
    elif y is not None and (a, b, c) != (1, 1, 1):
        taken, other = (first, last) if np.array_equal(x, y) else (last, first)
        square, color = (lambda s: s[1] == s[2]), (lambda s: s[0] in (1, 3))
        signs = [int(sign(taken)) - int(sign(other)) for sign in (square, color)]
        assert y.shape[1:] == taken and max(signs) == 1 and min(signs) >= 0

@some
@given(st.integers(1, 16), small, small)
def test_both_layouts_are_understood(c, h, w):
    x = noise(2, c, h, w)
    for given_, other in ((x, w), (x.transpose(0, 2, 3, 1), h)):
        if other != c: assert (found(given_, channels=c) == x).all()
        if min(h, w) > 16: assert (found(given_) == x).all()
        if h == w and h != c and h not in (1, 3): assert (found(given_) == x).all()

@pytest.mark.parametrize('shape, images', [
    ((6, 8, 11, 11), (6, 8, 11, 11)), ((6, 11, 11, 8), (6, 8, 11, 11)), ((6, 2, 8, 8), (6, 2, 8, 8)),
    ((6, 8, 8, 1), (6, 1, 8, 8)), ((6, 1, 7, 9), (6, 1, 7, 9)), ((6, 7, 9, 3), (6, 3, 7, 9)),
    ((6, 13, 64, 64), (6, 13, 64, 64)), ((6, 64, 50, 13), (6, 13, 64, 50)),
    ((6, 16, 17, 18), (6, 16, 17, 18)),
    ((6, 3, 8, 9), (6, 3, 8, 9)), ((6, 1, 1, 1), (6, 1, 1, 1)),
    ((6, 5, 7), (6, 1, 5, 7)), ((6, 3, 3), (6, 1, 3, 3))], ids=str)
def test_shapes_that_tell(shape, images): assert as_image_set(noise(*shape)).images.shape == images

@pytest.mark.parametrize('shape', [(6, 3, 32, 3), (6, 8, 12, 10), (6, 8, 8, 8), (6, 3, 3, 3), (6, 8, 3, 3),
                                   (6, 5, 1, 1), (6, 1, 32, 3)], ids=str)
def test_shapes_that_do_not_tell_are_asked_about(shape):
    refused('say how many `channels`', as_image_set, noise(*shape))
    one = ImageSet(torch.from_numpy(noise(*shape)))   # as the sentence says
    assert as_image_set(one) is one

def test_the_number_of_channels_decides():
    x = noise(6, 8, 12, 10)
    assert as_image_set(x, channels=8).images.shape == (6, 8, 12, 10)
    assert as_image_set(x, channels=10).images.shape == (6, 10, 8, 12)
    refused('say how many', as_image_set, x, channels=9)
    refused('have 5 channels, but 3', as_image_set, noise(6, 5, 20, 20), channels=3)
    refused('from 1 to 16', as_image_set, x, channels=17)
    refused('from 1 to 16', as_image_set, x, channels='gray')
    refused('at most 16 channels', as_image_set, noise(6, 17, 20, 20))
    for c in (0, 17): refused('1 to 16 channels', ImageSet, torch.zeros(2, c, 4, 4, dtype=torch.uint8))

# -- numbers --

@some
@given(st.sampled_from([1, 2, 5, 13, 16]),
       st.sampled_from(['uint8', 'uint16', '>u2', 'int32', 'float32', 'float64']),
       st.integers(1, 65535), st.booleans(), st.integers(0, 999))
def test_values_of_every_type_become_bytes(c, dtype, high, last, seed):
    "Rounded shares of the white of the whole set, a step above its highest value."
    high = min(high, 255) if dtype == 'uint8' else high
    x = np.random.default_rng(seed).integers(0, high + 1, (4, c, 20, 18))
    x[1, 0, 2, 3] = high
    given_ = (x.transpose(0, 2, 3, 1) if last else x).astype(dtype)
    found = as_image_set(given_)
    white = 255 if dtype == 'uint8' else found.facts['white']
    assert found.images.shape == x.shape and white >= high and (white <= 255 or white < 4.1*high)
    want = [round(Fraction(255*v, int(white))) for v in (0, high)]
    assert found.images.min() >= want[0] and found.images.max() == want[1]
    assert (found.images.numpy() == np.rint(x.astype(np.float64)*255/white)).mean() > .99

def test_dark_counts_keep_their_range():
    "A microscope of 12 bits in files of 16: not black, and what is measured is the images, not the type."
    x = np.random.default_rng(0).gamma(2, 200, (20, 2, 24, 24)).clip(0, 4000).astype(np.uint16)
    x[:, 1] //= 4
    x[0, 0, 0, 0] = 4000
    data = as_image_set(x)
    assert data.facts['white'] == 4095
    seen = Normalize.fit(data.images)(data.images)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-3 and (seen.std((0, 2, 3)) - 1).abs().max() < .05

# -- false colors --

@some
@given(st.integers(1, 5), st.integers(1, 16), st.integers(0, 999))
def test_colors_of_any_number_of_channels(n, c, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, c, 3, 4), dtype=torch.uint8, generator=g)
    y = to_color(x)
    assert y.shape == (n, 3, 3, 4) and y.dtype == torch.uint8
    assert torch.cat([to_color(one[None]) for one in x]).equal(y)      # of one image alone
    assert to_color(x[:, :1].expand(-1, c, -1, -1)).equal(to_color(x[:, :1]))   # equal channels are gray
    assert (x.amin(1) <= y.amin(1)).all() and (y.amax(1) <= x.amax(1)).all()
    groups = np.array_split(np.arange(c), 3) if c > 2 else [[0], [c - 1], [*range(c)]]
    want = np.stack([x.double().numpy()[:, g].mean(1) for g in groups], 1)
    assert np.abs(y.numpy() - want).max() <= .5 + 1e-6
    if c in (1, 3): assert y.equal(x.expand(-1, 3, -1, -1))

@pytest.mark.parametrize('c', [2, 5, 13])
def test_mosaics_and_thumbnails_are_in_false_colors(c, tmp_path):
    x = torch.from_numpy(noise(6, c, 9, 7))
    assert (image_grid(x, 3, (0, 0))[:9, :7] == to_color(x)[0].permute(1, 2, 0).numpy()).all()
    assert (image_grid(to_float(x), 3) == image_grid(x, 3)).all()
    few = dict(index=np.arange(6), images=x.numpy()//16, path=np.array(['a']*6), cluster=np.zeros(6, int),
               second=np.ones(6, int), confidence=np.ones(6))
    found = _caption_images(dict(examples=few, metrics={}, folder=tmp_path))
    from base64 import b64decode
    from io import BytesIO
    shown = [np.asarray(Image.open(BytesIO(b64decode(found[i]['src'].split(',')[1])))) for i in range(6)]
    assert all(image.shape == (9, 7, 3) for image in shown)
    assert np.stack(shown).max() == 255 and few['images'].max() < 16   # dark images are stretched
    assert len({image.tobytes() for image in shown}) == 6

# -- views --

@pytest.mark.parametrize('c', [2, 4, 13, 16])
def test_channels_that_are_no_colors_are_not_mixed(c):
    "What one channel becomes does not depend on the others, but for the silhouette."
    x = torch.from_numpy(noise(40, c, 16, 16))
    other = torch.cat([x[:, :1], torch.from_numpy(noise(40, c - 1, 16, 16)).flip(0)], 1)
    kinds = (lambda room: room.SimCLRAugment(12, rotation=20, blur_p=.5, brightness=.9, contrast=.9, erase=2),
             lambda room: room.StrongAugment(12), lambda room: room.WeakAugment(12))
    from scan_nb import views as fast
    for room in (lesson, fast):
        for kind in kinds:
            a, b = (kind(room)(y, torch.Generator().manual_seed(3)) for y in (x, other))
            assert a.shape == (40, c, 12, 12) and 0 <= a.min() and a.max() <= 1
            assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1], b[:, 1])

@pytest.mark.parametrize('c', [2, 5])
def test_contrast_of_a_channel_is_that_of_a_gray_image(c):
    x, factor = to_float(torch.from_numpy(noise(3, c, 9, 9))), torch.tensor([.3, 1., 1.7])
    found = lesson.contrast(x, factor)
    for i in range(3):
        for k in range(c):
            torch.testing.assert_close(found[i, k:k+1], adjust_contrast(x[i, k:k+1], factor[i].item()))
    assert lesson.color(x, factor).allclose(x, atol=1e-6) and lesson.hue(x, factor).equal(x)

@pytest.mark.parametrize('kind', [SimCLRAugment, StrongAugment, WeakAugment])
def test_three_channels_in_any_place_are_color_and_two_gray_ones_are_gray(kind):
    "A gray image as two equal channels sees what it sees as one: draws do not depend on their number."
    x = torch.from_numpy(noise(20, 1, 12, 12))
    one, two = (kind(12)(y, torch.Generator().manual_seed(1)) for y in (x, x.expand(-1, 2, -1, -1)))
    torch.testing.assert_close(two, one.expand(-1, 2, -1, -1))

# -- recipes --

def test_recipes_know_any_number_of_channels():
    images = ImageSet(torch.from_numpy(noise(60, 13, 8, 8)))
    assert Recipe.for_images(images).channels == 13
    assert ScanRecipe(channels='5', mean=[.1]*5, std=[.2]*5).channels == 5
    assert ScanRecipe(mean=[.1]*13, std=[.2]*13).channels is None
    for bad in (0, 17, -1, 1.5, 'gray', True):
        with pytest.raises(UserError, match='channels is .* from 1 to 16'): ScanRecipe(channels=bad)
    for n, c in ((17, None), (3, 5), (5, 3), (0, None)):
        with pytest.raises(UserError, match='one per channel'):
            ScanRecipe(channels=c, mean=[.1]*n, std=[.2]*n)
    assert describe({'all': images})[0] == '60 images of 8×8 pixels, with 13 channels.'

# -- lists --

flower = Image.fromarray(load_sample_image('flower.jpg')).crop((100, 50, 260, 170))   # 160×120

def same(a, b):
    assert torch.equal(a.images, b.images)
    assert (a.labels is None) == (b.labels is None) and (a.labels is None or torch.equal(a.labels, b.labels))

@pytest.fixture
def files(tmp_path):
    "Of many modes and sizes, one on its side; sorted by name, as a folder is."
    there = tmp_path/'files'
    there.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    flower.save(there/'a.png')
    flower.rotate(90, expand=True).save(there/'b.png', exif=exif)
    flower.convert('L').resize((60, 50)).save(there/'c.png')
    flower.convert('P', palette=Image.Palette.ADAPTIVE).save(there/'d.gif')
    flower.convert('RGBA').resize((40, 90)).save(there/'e.png')
    flower.convert('CMYK').save(there/'f.tif')
    return [there/f'{name}' for name in ('a.png', 'b.png', 'c.png', 'd.gif', 'e.png', 'f.tif')]

@pytest.mark.parametrize('how', [{}, dict(size=16), dict(channels=1), dict(size=33, channels=3)], ids=str)
def test_paths_and_pictures_become_what_a_folder_becomes(files, how, cache):
    want = image_folder(files[0].parent, **how)
    for kind in (list, tuple, lambda x: np.array([*map(str, x)]), lambda x: np.array(x, object)):
        got = as_image_set(kind(files), **how)
        same(got, want)
        assert got.paths == [*map(str, files)] and got.facts['sides'] == want.facts['sides']
    same(as_image_set([Image.open(f) for f in files], **how), want)
    back = as_image_set(files[::-1], **how)
    assert back.images.flip(0).equal(want.images) and back.paths == [*map(str, files[::-1])]

@pytest.mark.parametrize('bits', [8, 12, 16])
def test_deep_files_and_pictures_keep_their_range(tmp_path, bits, cache):
    x = np.random.default_rng(bits).integers(0, 2**bits, (4, 8, 8)).astype(np.uint16)
    x[2, 0, 0] = 2**bits - 1
    paths = [save(tmp_path/'deep'/f'{i}.png', one) for i, one in enumerate(x)]
    want = np.rint(x*(255/(2**bits - 1)))
    for source in (paths, [Image.open(p) for p in paths], [*x], x):
        found = as_image_set(source)
        assert (found.images[:, 0].numpy() == want).all() and found.facts['white'] == 2**bits - 1
    later = as_image_set(paths[:1], white=65535)   # as for training, whatever is in it
    assert (later.images[0, 0].numpy() == np.rint(x[0]*(255/65535))).all()

def test_paths_stay_as_they_were_given(tmp_path, monkeypatch, cache):
    save(tmp_path/'a b.png', noise(9, 9))
    save(tmp_path/'sub/no suffix.png', noise(9, 9)).rename(tmp_path/'sub/no suffix')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    names = ['a b.png', './sub/../a b.png', str(tmp_path/'sub/no suffix'), '~/a b.png', 'a b.png']
    found = as_image_set(names)
    assert found.paths == names and found.images[0].equal(found.images[3]) and len(found) == 5

def test_unreadable_paths_are_named_and_labels_stay_with_theirs(files, cache):
    files[1].write_bytes(b'')
    pairs = [(str(f), name) for f, name in zip(files, 'xyzxyz')]
    found = as_image_set([*pairs, ('nowhere.png', 'x'), (str(files[0].parent), 'x')])
    assert found.classes == ['x', 'y', 'z'] and found.labels.tolist() == [0, 2, 0, 1, 2]
    assert found.skipped == [(str(files[1]), 'an empty file'), ('nowhere.png', 'no such file or directory'),
                             (str(files[0].parent), 'is a directory')]
    refused("None of the 2 files can be read .'nowhere.png'", as_image_set, ['nowhere.png', 'b'])

def test_lists_are_decoded_once(files, cache):
    first = as_image_set(files)
    count = len([*cache.rglob('*.npy')])
    same(as_image_set(files), first)
    assert count == len([*cache.rglob('*.npy')]) == 1
    Image.new('RGB', (50, 50)).save(files[0])
    assert not as_image_set(files).images[0].any() and len([*cache.rglob('*.npy')]) == 2

ARRAYS = dict(numpy=np.asarray, torch=torch.from_numpy,
              bfloat16=lambda x: torch.from_numpy(x/255.).bfloat16())

@pytest.mark.parametrize('shape', [(8, 9), (5, 20, 20), (20, 20, 5), (3, 18, 20)], ids=str)
@pytest.mark.parametrize('kind', ARRAYS.values(), ids=ARRAYS)
def test_arrays_in_a_list_are_an_array(shape, kind):
    x = noise(6, *shape)
    whole = kind(x)
    whole = whole.float() if torch.is_tensor(whole) and whole.dtype == torch.bfloat16 else whole
    for sequence in (list, tuple): same(as_image_set(sequence(kind(one) for one in x)), as_image_set(whole))
    labels = [3, 1, 1, 2, 3, 1]
    assert as_image_set([(kind(one), y) for one, y in zip(x, labels)]).labels.tolist() == labels

# -- Datasets --

class Own(Dataset):
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        if not 0 <= i < len(self.items): raise IndexError(i)
        return self.items[i]

class HuggingFace:
    "What a Dataset of Hugging Face looks like: columns, features, rows as dictionaries."
    def __init__(self, features, **columns): self.features, self.columns_ = features, columns
    column_names = property(lambda self: [*self.columns_])
    def __len__(self): return len(self.columns_['img'])
    def __getitem__(self, i):
        return {k: v[i] for k, v in self.columns_.items()} if isinstance(i, int) else self.columns_[i]

def test_datasets_of_torchvision(tmp_path, cache):
    for i, name in enumerate(('cat', 'cat', 'dog', 'emu')):
        save(tmp_path/f'pets/{name}/{i}.png', noise(9, 12, 3) + i)
    want = image_folder(tmp_path/'pets')
    there = torchvision.datasets.ImageFolder(tmp_path/'pets')
    found = as_image_set(there)
    same(found, want)
    assert found.classes == want.classes == ['cat', 'dog', 'emu'] and found.paths is None
    part = as_image_set(Subset(there, [3, 0]))
    assert part.images.equal(want.images[[3, 0]]) and part.labels.tolist() == [2, 0]
    assert part.classes == want.classes
    same(as_image_set(there.samples), want)
    tensors = torchvision.datasets.ImageFolder(tmp_path/'pets', torchvision.transforms.ToTensor())
    assert as_image_set(tensors).images.shape == (4, 3, 9, 12)
    fake = torchvision.datasets.FakeData(7, (3, 8, 8), 3)
    assert as_image_set(fake).images.shape == (7, 3, 8, 8)
    assert as_image_set(fake, size=5).images.shape == (7, 3, 5, 5)

def test_datasets_of_torch():
    x, y = torch.from_numpy(noise(6, 5, 20, 20)), torch.tensor([2, 0, 1, 1, -1, 0])
    same(as_image_set(TensorDataset(x, y)), ImageSet(x, y))
    same(as_image_set(TensorDataset(x)), ImageSet(x))
    parts = TensorDataset(x[:2], y[:2]), TensorDataset(x[2:], y[2:])
    same(as_image_set(ConcatDataset(parts)), ImageSet(x, y))
    same(as_image_set(Own([*x])), ImageSet(x))
    same(as_image_set(Own([dict(Image=one, Label=int(k)) for one, k in zip(x, y)])), ImageSet(x, y))
    masks = as_image_set(Own([(one, one[0]) for one in x]))   # a mask is no label
    assert masks.labels is None and masks.images.equal(x)

def test_datasets_are_read_by_one_thread_at_a_time_in_bounded_memory():
    class Shy(Own):
        inside, alive, most = 0, 0, 0
        def __getitem__(self, i):
            self.inside += 1
            assert self.inside == 1
            picture = Image.fromarray(noise(40, 50, 3))
            self.inside -= 1
            return picture, i % 2
    found = as_image_set(Shy(range(300)))
    assert found.images.shape == (300, 3, 40, 40) and found.labels.tolist() == [0, 1]*150

@pytest.mark.parametrize('names', [['cat', 'dog'], None])
def test_datasets_of_hugging_face(names):
    pictures, y = [Image.fromarray(one) for one in noise(4, 12, 10, 3)], [1, 0, 0, 1]
    features = dict(img=SimpleNamespace(), label=SimpleNamespace(names=names), note=SimpleNamespace())
    found = as_image_set(HuggingFace(features, note=['a']*4, img=pictures, label=y))
    same(found, ImageSet(as_image_set(pictures).images, y))
    assert found.classes == names

class Frame:
    "What a data frame of pandas looks like, with rows that are not numbered from 0."
    def __init__(self, **columns): self.data, self.columns = columns, [*columns]
    shape = property(lambda self: (len(self), len(self.columns)))
    def __len__(self): return len(next(iter(self.data.values())))
    def __getitem__(self, name): return self.data[name]

@pytest.mark.parametrize('path, label', [('path', 'label'), ('File', 'Class'), ('image', 'y'),
                                         ('FILENAME', None)])
def test_tables(files, path, label, cache):
    columns = {path: [*map(str, files)], 'size': [9]*6} | ({label: [*'abcabc']} if label else {})
    found = as_image_set(Frame(**columns))
    want = image_folder(files[0].parent)
    assert found.images.equal(want.images) and found.paths == [*map(str, files)]
    assert holds_pictures(Frame(**columns))
    if label: assert found.labels.tolist() == [0, 1, 2]*2 and found.classes == ['a', 'b', 'c']
    else: assert found.labels is None

def test_a_column_of_paths(files, cache):
    class Series(list):
        def __getitem__(self, i): raise KeyError(i)   # by label, and this is none
        def tolist(self): return [*iter(self)]
    same(as_image_set(Series(files)), as_image_set(files))

# -- what is refused --

class Broken(Own):
    def __getitem__(self, i):
        if i == 2: raise RuntimeError('disk on fire')
        return super().__getitem__(i)

class Endless(IterableDataset):
    def __iter__(self): yield from [flower]*3

@pytest.mark.parametrize('words, source', [
    ('no image in this list', []), ('no image in this tuple', ()), ('not as set', {1}), ('not as int', 3),
    ('not as generator', (x for x in [flower])), ('not as Endless', Endless()),
    ('not as DataLoader', DataLoader(Own([flower]*3))), ('not as NoneType', None),
    ('train, test is not one set', dict(train=[flower], test=[flower])), ('is not one set', {}),
    ('is a int, which is no image', [1, 2]), ('is a int, which is no image', b'abc'),
    ('is a NoneType', [None]), ('is a NoneType', [()]), ('is a NoneType', [dict(cat=1)]),
    ('is a list, which', [[[0, 1], [2, 3]]]), ('is a NoneType', Own([dict(width=3)])),
    ('Image 1 is a str, but the first is a picture', [flower, 'a.png']),
    ('Image 1 is a Image, but the first is a array', [np.zeros((4, 4)), flower]),
    ('Image 1 is a float, but the first is a path', ['a.png', float('nan')]),
    ('Image 1 is 4×5 float64, but the first is 4×4 float64', [np.zeros((4, 4)), np.zeros((4, 5))]),
    ('Image 1 is 4×4 uint8, but the first is 4×4 float64', [np.zeros((4, 4)), np.zeros((4, 4), np.uint8)]),
    ('Image 2 cannot be had .RuntimeError: disk on fire', Broken([flower]*4)),
    ('Image 2 cannot be had .RuntimeError: disk on fire', Broken([np.zeros((4, 4))]*4)),
    ('Image 0 cannot be had .RuntimeError', Subset(Broken([flower]*4), [2])),
    ("needs a column 'path' or .*, but has: cat, dog", Frame(cat=[1], dog=[2])),
    ('Images of shape 2×64', [np.zeros(64), np.zeros(64)]), ('1×2×2×8×8', [np.zeros((2, 2, 8, 8))]),
    ('holds NaN', [np.full((4, 4), np.nan)]), ('rescale', [np.full((4, 4), -3.)])],
    ids=lambda v: v if isinstance(v, str) else '')
def test_wrong_sources_get_one_sentence(words, source, cache): refused(words, as_image_set, source)

def test_pictures_are_gray_or_in_color(files, cache):
    for source in (files, [flower], files[0].parent):
        refused('1 .gray. or 3', as_image_set, source, channels=5)
    refused('size must', as_image_set, [flower], size=0)
    refused('20×20 pixels, but 9×9', as_image_set, [*noise(3, 20, 20)], size=9)

# -- the whole way --

TINY = FOLDER.change({
    'backbone_options': dict(widths=(4, 8)), 'size': 8, 'pretext.epochs': 1, 'scan.epochs': 1,
    'scan.heads_epochs': 2, 'scan.tried_heads': 2, 'selflabel.epochs': 1, 'seed': 1})

def tiny(**more): return SCAN(n_clusters=3, recipe=TINY, device='cpu', **more)

def patterns(n, c, side=8, high=255):
    "Three kinds of images: which channels and rows are bright."
    rng, y = np.random.default_rng(0), np.arange(n) % 3
    x = rng.integers(0, high//4 + 1, (n, c, side, side))
    for i, k in enumerate(y): x[i, k % c, k*2:k*2 + 3] += high//2
    return x, y

@pytest.mark.parametrize('c, dtype, last', [(2, 'uint8', False), (5, 'float32', True), (13, 'uint16', False),
                                            (13, 'uint16', True), (1, 'uint16', True)], ids=str)
def test_scan_of_many_channels(c, dtype, last, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})   # maps and curves show no image
    x, y = patterns(60, c, 9 if last else 8, 1 if dtype == 'float32' else 255 if dtype == 'uint8' else 3000)
    if dtype == 'float32': x = np.random.default_rng(1).random(x.shape)*.5 + x/2
    x = x.astype(dtype)
    given_ = x.transpose(0, 2, 3, 1) if last else x
    scan = tiny(out=tmp_path/'run').fit(given_, labels=y, test=given_[:20])
    assert scan.shape_ == [c, *x.shape[2:]] and scan.recipe_.channels == c
    assert scan.white_ == {'uint8': None, 'float32': 1, 'uint16': 4095}[dtype]
    again = SCAN.load(tmp_path/'run', 'cpu')
    for source in (given_, x, [*given_], torch.from_numpy(x), given_[:7]):
        want = scan.labels_[:len(source)]
        assert (scan.predict(source) == want).all() and (again.predict(source) == want).all()
    assert (tmp_path/'run/report.html').stat().st_size > 10_000
    refused('needed|asked for|channels', scan.predict, noise(4, 3 if c != 3 else 4, 30, 31))

def test_scan_of_lists_and_datasets(tmp_path, cache):
    x, y = patterns(45, 1, 8)
    paths = [str(save(tmp_path/f'there/{i:02}.png', one[0].astype(np.uint8))) for i, one in enumerate(x)]
    pictures = [Image.open(p) for p in paths]
    pairs = Own([(picture, int(k)) for picture, k in zip(pictures, y)])
    sources = [paths, pictures, [one[0].astype(np.uint8) for one in x], pairs,
               Frame(path=paths, label=y.tolist()),
               HuggingFace(dict(label=SimpleNamespace(names=[*'abc'])), img=pictures, label=y.tolist())]
    fitted = [tiny().fit(source) for source in sources]
    want = fitted[0].labels_
    for scan in fitted:
        assert (scan.labels_ == want).all()
        for other in sources: assert (scan.predict(other) == want).all()
    assert fitted[0].paths_ == paths == fitted[4].paths_ and fitted[1].paths_ is None
    for scan in fitted[3:]: assert 'acc' in scan.scores(pairs)
    assert (tiny().fit_predict(pairs, None) == want).all()
    assert tiny().fit(pairs, test=pairs, pretext=paths).metrics_['splits'].keys() == {'train', 'test'}

def test_pictures_to_predict_are_resized_and_converted():
    x, _ = patterns(45, 1, 8)
    scan = tiny().fit(x.astype(np.uint8))
    color = [Image.fromarray(one[0].astype(np.uint8)).convert('RGB') for one in x]
    assert (scan.predict(color) == scan.labels_).all()
    big = [picture.resize((24, 24)) for picture in color]
    assert (scan.predict(big) == scan.predict(as_image_set(big, 8, 1))).all()
    assert tiny().fit(big).shape_ == [1, 8, 8]   # gray, at the size of the recipe

def test_a_layout_is_said_in_the_recipe():
    x = noise(60, 5, 12, 10)
    refused('say how many `channels`', tiny().fit, x)
    scan = tiny().set_params(recipe__channels=5).fit(x)
    assert scan.shape_ == [5, 12, 10] and (scan.predict(x) == scan.labels_).all()
    assert (scan.predict(x.transpose(0, 2, 3, 1)) == scan.labels_).all()
    assert (scan.predict([*x]) == scan.labels_).all() and scan.predict(x[3])[0] == scan.labels_[3]
