"The public data sets in their true formats, read as torchvision reads them; tables of labels; times."
import hashlib
import io
import os
import pickle
import tarfile
from datetime import datetime, timedelta, timezone
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scan_nb.data import (
    ImageSet, UserError, cifar10, cifar20, cifar100, decode_image, find_images, image_folder, imagenet_subset,
    parse_time, split_by_day, stl10)

def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

def refused(words, f, *args, **kwargs):
    "`f` raises a `UserError` of one sentence that holds `words`."
    with pytest.raises(UserError, match=words) as e: f(*args, **kwargs)
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and not text[0].islower()

@pytest.fixture
def root(tmp_path): return tmp_path/'root'

@pytest.fixture
def cache(tmp_path): return tmp_path/'cache'

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "No internet, and torchvision reads small files in spite of its checksums; the addresses asked for."
    asked = []
    def urlopen(request, *_, **__):
        asked.append(request.full_url)
        raise URLError('no route to host')
    monkeypatch.setattr('urllib.request.urlopen', urlopen)
    for module in ('cifar', 'stl10'):
        monkeypatch.setattr(f'torchvision.datasets.{module}.check_integrity', lambda *_: True)
    return asked

def same(ours, theirs):
    "Pixels, labels and classes of a set are those of torchvision's."
    for i, (image, label) in enumerate(theirs):
        assert (ours.images[i].permute(1, 2, 0).numpy() == np.asarray(image)).all()
        assert ours.labels[i] == label
    assert len(ours) == len(theirs) and ours.labels.dtype == torch.int64 and ours.images.dtype == torch.uint8

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
    refused('one of them is -2', tiny, labels=[-2, 0, 0, 0])

seconds = st.floats(-1e11, 1e11)

@given(st.lists(seconds, min_size=1, max_size=9), st.data())
def test_times_go_with_their_images(times, draw):
    kind = draw.draw(st.sampled_from([list, np.array, lambda t: torch.tensor(t, dtype=torch.float64)]))
    x = tiny(len(times), times=kind(times)).to('cpu')
    where = draw.draw(st.lists(st.integers(0, len(times) - 1), min_size=1))
    assert x.times.dtype == torch.float64 and x[where].times.tolist() == [times[i] for i in where]
    assert x[:1].times.tolist() == times[:1] and x[torch.ones(len(times), dtype=bool)].times.tolist() == times

def test_times_are_the_last_field(): assert list(vars(tiny()))[-1] == 'times' and tiny().times is None

@pytest.mark.parametrize('words, times', [
    ('need 4 times', [1, 2]), ('need 4 times', np.ones((4, 1))), ('image 2 is nan', [0, 1, np.nan, 2]),
    ('image 3 is -inf', [0, 1, 2, -np.inf]), ('float64', torch.tensor([0, 1e9, 2, 3])),
    ('must be numbers', ['a', 'b', 'c', 'd']), ('must be numbers', [0, 1, 2, None]),
    ('must be numbers', np.array(['2020-01-01']*4, 'datetime64[s]'))])
def test_wrong_times(words, times): refused(words, tiny, times=times)

# -- CIFAR --

class Python2(pickle._Pickler):
    "Writes what Python 2 and its NumPy wrote: texts and bytes alike are byte strings."
    dispatch = dict(pickle._Pickler.dispatch)
    def save_string(self, text):
        raw = text if isinstance(text, bytes) else text.encode('latin1')
        self.write(b'T' + len(raw).to_bytes(4, 'little') + raw)
        self.memoize(text)
    dispatch[str] = dispatch[bytes] = save_string

def python2(content):
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b'numpy._core.', b'numpy.core.')

def write_cifar10(root, n=7, write=python2):
    folder = root/'cifar-10-batches-py'
    folder.mkdir(parents=True)
    names = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    for i, name in enumerate(names):
        batch = {'batch_label': name, 'filenames': [f'{j}.png' for j in range(n)],
                 'data': noise(n, 3072, seed=i), 'labels': [(i + j) % 10 for j in range(n)]}
        (folder/name).write_bytes(write(batch))
    meta = {'label_names': [f'c{i}' for i in range(10)], 'num_vis': 3072}
    (folder/'batches.meta').write_bytes(write(meta))
    return folder

def write_cifar100(root, n=7):
    folder = root/'cifar-100-python'
    folder.mkdir(parents=True)
    for i, name in enumerate(('train', 'test')):
        batch = {'data': noise(n, 3072, seed=i), 'fine_labels': [(13*j + i) % 100 for j in range(n)],
                 'coarse_labels': [(3*j + i) % 20 for j in range(n)], 'filenames': ['x']*n}
        (folder/name).write_bytes(python2(batch))
    meta = {f'{kind}_label_names': [f'{kind}{i}' for i in range(k)]
            for kind, k in (('fine', 100), ('coarse', 20))}
    (folder/'meta').write_bytes(python2(meta))
    return folder

def dump(protocol): return lambda content: pickle.dumps(content, protocol)

@pytest.mark.parametrize('write', [python2, dump(2), dump(4), dump(5)], ids=['py2', '2', '4', '5'])
def test_cifar10_as_torchvision(root, write, offline):
    write_cifar10(root, write=write)
    for split in ('train', 'test'):
        theirs = tv.CIFAR10(root, train=split == 'train')
        same(cifar10(split, root), theirs)
        assert cifar10(split, str(root)).classes == theirs.classes
    both, parts = cifar10('all', root), [cifar10(s, root).images for s in ('train', 'test')]
    assert both.images.equal(torch.cat(parts)) and len(both) == 42
    assert cifar10(root=root).images.equal(both.images[:35]) and not offline

def test_cifar100_as_torchvision(root):
    folder = write_cifar100(root)
    for split in ('train', 'test'):
        theirs = tv.CIFAR100(root, train=split == 'train')
        fine, coarse = cifar100(split, root), cifar20(split, root)
        same(fine, theirs)
        assert fine.classes == theirs.classes and coarse.images.equal(fine.images)
        raw = pickle.loads((folder/split).read_bytes(), encoding='latin1')
        assert coarse.labels.tolist() == raw['coarse_labels']
        assert coarse.n_classes == 20 and coarse.classes[3] == 'coarse3'
    assert len(cifar20('all', root)) == 14

def test_only_what_is_needed_must_be_there(root, offline):
    folder = write_cifar10(root)
    for i in range(1, 6): (folder/f'data_batch_{i}').unlink()
    assert len(cifar10('test', root)) == 7 and not offline
    refused('data_batch_1', cifar10, 'train', root)

@pytest.mark.parametrize('get, address', [
    (cifar10, tv.CIFAR10.url), (cifar20, tv.CIFAR100.url), (cifar100, tv.CIFAR100.url),
    (stl10, tv.STL10.url)])
def test_missing_and_offline(root, offline, get, address):
    refused(f'go online, or get {address} and unpack it in .*root', get, 'test', root)
    assert offline[0] == address

def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    write_cifar10(tmp_path/'scan_nb')
    assert len(cifar10('test')) == 7

def packed(folder):
    "The folder as a .tar.gz."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar: tar.add(folder, folder.name)
    return buffer.getvalue()

class Answer(io.BytesIO):
    length, url = None, 'https://mirror.test/x'
    def __enter__(self): return self

def test_downloads_and_unpacks(root, tmp_path, monkeypatch, capfd):
    raw = packed(write_cifar10(tmp_path/'elsewhere'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: Answer(raw))
    monkeypatch.setattr(tv.CIFAR10, 'tgz_md5', hashlib.md5(raw).hexdigest())
    assert len(cifar10('train', root)) == 35
    monkeypatch.setattr('urllib.request.urlopen', None)   # from now on, from the files
    assert len(cifar10('test', root)) == 7

def test_a_damaged_download(root, tmp_path, monkeypatch, capfd):
    raw = packed(write_cifar10(tmp_path/'elsewhere'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: Answer(raw[:-9]))
    monkeypatch.setattr(tv.CIFAR10, 'tgz_md5', hashlib.md5(raw).hexdigest())
    refused('cannot be downloaded', cifar10, 'train', root)
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: Answer(raw))
    assert len(cifar10('train', root)) == 35                 # tried again, and whole

def test_an_archive_at_hand_is_unpacked(root, tmp_path, monkeypatch, offline):
    root.mkdir()
    (root/tv.CIFAR10.filename).write_bytes(raw := packed(write_cifar10(tmp_path/'elsewhere')))
    monkeypatch.setattr(tv.CIFAR10, 'tgz_md5', hashlib.md5(raw).hexdigest())
    assert len(cifar10('test', root)) == 7 and not offline

class Trap:
    def __reduce__(self): return os.mkdir, ('trapped',)

GOOD = {'data': noise(4, 3072), 'labels': [0, 1, 2, 3]}

@pytest.mark.parametrize('raw', [
    b'', b'hello', python2(GOOD)[:-1], python2(GOOD)[:999], pickle.dumps(Trap()), pickle.dumps([1, 2]),
    *(pickle.dumps({**GOOD, **change}) for change in (
        {'data': Trap()}, {'data': noise(4, 3071)}, {'data': noise(3, 3072)}, {'data': noise(4, 3, 32, 32)},
        {'data': noise(4, 3072).astype(float)}, {'data': [1, 2, 3, 4]}, {'labels': None},
        {'labels': ['a']*4}))],
    ids=range(14))
def test_damaged_cifar(root, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (write_cifar10(root)/'test_batch').write_bytes(raw)
    refused('test_batch.* is damaged', cifar10, 'test', root)
    assert not (tmp_path/'trapped').exists()
    assert len(cifar10('train', root)) == 35

def test_damaged_names(root):
    folder = write_cifar100(root)
    (folder/'meta').write_bytes(python2({'coarse_label_names': ['a']*20}))
    refused('meta.* is damaged', cifar100, 'test', root)
    assert cifar20('test', root).n_classes == 20
    (folder/'meta').write_bytes(python2({'coarse_label_names': ['a']*2}))
    refused('has no name', cifar20, 'test', root)

@pytest.mark.parametrize('get', [cifar10, cifar20, cifar100, stl10])
def test_wrong_split(get, root, offline):
    for split in ('valid', None, ''): refused('The split is', get, split, root)
    assert not offline

# -- STL-10 --

STL_CLASSES = ['airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship', 'truck']

def write_stl(root, **counts):
    folder = root/'stl10_binary'
    folder.mkdir(parents=True)
    for i, (part, n) in enumerate({'train': 6, 'test': 4, 'unlabeled': 5, **counts}.items()):
        noise(n, 3, 96, 96, seed=i).tofile(folder/f'{part}_X.bin')
        if part != 'unlabeled': (np.arange(n, dtype=np.uint8)*3 % 10 + 1).tofile(folder/f'{part}_y.bin')
    (folder/'class_names.txt').write_text('\n'.join(STL_CLASSES) + '\n')
    return folder

@pytest.mark.parametrize('split', ['train', 'test', 'unlabeled', 'train+unlabeled'])
def test_stl_as_torchvision(root, cache, split, offline):
    write_stl(root)
    theirs = tv.STL10(root, split)
    for _ in range(2):                                        # decoded, and from the cache
        ours = stl10(split, root, cache)
        same(ours, theirs)
        assert ours.classes == theirs.classes == STL_CLASSES and not offline
    assert len(list(cache.glob('stl10-*.npy'))) == 1
    assert (ours.labels == -1).sum() == (5 if 'unlabeled' in split else 0)

def test_stl_turns_once_and_notices_a_change(root, cache):
    folder = write_stl(root)
    first = stl10('test', root, cache).images.clone()
    noise(4, 3, 96, 96, seed=9).tofile(folder/'test_X.bin')
    assert not stl10('test', root, cache).images.equal(first)
    assert len(list(cache.glob('stl10-*.npy'))) == 2

@pytest.mark.parametrize('name, damage', [
    ('train_X', lambda b: b[:-1]), ('train_X', lambda b: b[:-3*96*96]), ('train_X', lambda b: b''),
    ('train_y', lambda b: b[:-1]), ('train_y', lambda b: b''), ('train_y', lambda b: bytes([0]) + b[1:]),
    ('train_y', lambda b: bytes([11]) + b[1:]), ('unlabeled_X', lambda b: b[:-5])])
def test_damaged_stl(root, cache, name, damage):
    file = write_stl(root)/f'{name}.bin'
    file.write_bytes(damage(file.read_bytes()))
    refused('is damaged', stl10, 'train+unlabeled', root, cache)

# -- ImageNet --

FOLDERS = ['n01440764', 'n01443537', 'n02999410']

def photo(path, seed, size=(90, 120)):
    "A JPEG of one color with a brighter side."
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.ones((*size, 3), np.uint8)*noise(3, seed=seed)//2
    x[:, size[1]//2:] *= 2
    Image.fromarray(x).save(path, 'JPEG')

@pytest.fixture
def imagenet(root):
    for split, n in (('train', 3), ('val', 2)):
        for i, folder in enumerate(FOLDERS):
            for j in range(n): photo(root/split/folder/f'{folder}_{j}.JPEG', 10*i + j)
    return root

@pytest.mark.parametrize('split', ['train', 'val'])
def test_imagenet_as_image_folder(imagenet, cache, split):
    theirs = tv.ImageFolder(imagenet/split)
    ours = imagenet_subset(imagenet, split, size=48, cache=cache)
    assert ours.paths == [p[len(str(imagenet/split)) + 1:] for p, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets and ours.classes == theirs.classes == FOLDERS
    for image, (path, _) in zip(ours.images, theirs.samples):
        assert (image.numpy() == decode_image(path, 48, 3)).all()

def test_imagenet_defaults(imagenet, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    Image.fromarray(noise(40, 40)).save(imagenet/'train'/FOLDERS[0]/'gray.JPEG')
    x = imagenet_subset(imagenet)
    assert x.images.shape == (10, 3, 256, 256) and len(list((tmp_path/'scan_nb').glob('*.npy'))) == 1

def test_imagenet_lists(imagenet, cache, tmp_path):
    listed = tmp_path/'two.txt'
    listed.write_text('n02999410 chain\n\n n01443537 goldfish, Carassius auratus \r\n')
    x = imagenet_subset(imagenet, 'val', listed, 32, cache)
    assert x.classes == ['chain', 'goldfish, Carassius auratus'] and x.labels.tolist() == [0, 0, 1, 1]
    assert {p.split('/')[0] for p in x[x.labels == 1].paths} == {'n01443537'}
    y = imagenet_subset(imagenet, 'val', FOLDERS[:0:-1], 32, cache)
    assert y.classes == FOLDERS[:0:-1] and y.images.equal(x.images)
    listed.write_text('n02999410\nn01443537')
    assert imagenet_subset(imagenet, 'val', str(listed), 32, cache).classes == FOLDERS[:0:-1]

def test_imagenet_decodes_once_and_skips(imagenet, cache, monkeypatch):
    (imagenet/'val'/FOLDERS[0]/'cut.JPEG').write_bytes(b'\xff\xd8\xff')
    first = imagenet_subset(imagenet, 'val', size=32, cache=cache)
    assert [p for p, _ in first.skipped] == [f'{FOLDERS[0]}/cut.JPEG']
    assert len(first) == len(first.labels) == 6
    monkeypatch.setattr('scan_nb.data.decode_image', None)
    again = imagenet_subset(imagenet, 'val', size=32, cache=cache)
    assert again.images.equal(first.images) and again.labels.equal(first.labels)

def test_wrong_imagenet(imagenet, cache, tmp_path):
    refused("'train' or 'val'", imagenet_subset, imagenet, 'test', cache=cache)
    refused('above train and val', imagenet_subset, imagenet/'val', 'val', cache=cache)
    lost = [f'n{i}' for i in range(6)]
    some = [*lost[:2], FOLDERS[0]]
    refused('2 of 3 class folders are missing .*: n0, n1', imagenet_subset, imagenet, 'val', some)
    refused(r'6 of 6 .*: n0, n1, n2, n3, n4, \.\.\.', imagenet_subset, imagenet, 'val', lost)
    refused('twice', imagenet_subset, imagenet, 'val', [FOLDERS[0]]*2)
    refused('no class', imagenet_subset, imagenet, 'val', [])
    refused('cannot be read', imagenet_subset, imagenet, 'val', tmp_path/'nowhere.txt')
    (tmp_path/'x.txt').write_bytes(b'\xff\xfe\x00')
    refused('text file', imagenet_subset, imagenet, 'val', tmp_path/'x.txt')
    (imagenet/'val/n3').mkdir()
    refused('no image', imagenet_subset, imagenet, 'val', cache=cache)
    refused('size must', imagenet_subset, imagenet, 'val', FOLDERS, 0, cache)
    assert not cache.exists()

# -- a folder with tables --

@pytest.fixture
def folder(tmp_path):
    "Four images: a/1.png, a/2.png, b/2.png and top.png."
    for i, name in enumerate(('a/1.png', 'a/2.png', 'b/2.png', 'top.png')):
        (tmp_path/'images'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path/'images'/name)
    return tmp_path/'images'

@pytest.fixture
def table(tmp_path):
    def write(text, name='t.csv', encoding='utf-8'):
        (tmp_path/name).write_text(text, encoding)
        return tmp_path/name
    return write

def labels(x): return [None if y < 0 else x.classes[y] for y in x.labels]

@pytest.mark.parametrize('text', [
    'path,label\na/1.png,cat\na/2.png,dog\nb/2.png,cat\ntop.png,dog',
    'File;Class\r\nb/2.png;cat\r\ntop.png;dog\r\na/1.png;cat\r\na/2.png;dog\r\n',
    'id\ty\tfilename\n9\tcat\t1.png\n8\tdog\ta/2.png\n7\tcat\tb/2.png\n6\tdog\ttop.png\n',
    'image, label \n "1" , cat\n./a/2.png,dog\nb\\2.png,cat\n\ntop,dog\n,\n',
    '1.png,cat\na/2.png,dog\nb/2.png,cat\ntop,dog\nelsewhere.png,emu\n',
    '\ufeffname,label\n1,cat\na/2.png,dog\na/2.png,dog\nb/2.png,cat\ntop,dog\n'],
    ids=['path', 'semicolon', 'tab', 'names and stems', 'no header', 'mark and a row twice'])
def test_labels_from_a_table(folder, cache, table, text):
    x = image_folder(folder, cache=cache, labels=table(text))
    assert x.paths == ['a/1.png', 'a/2.png', 'b/2.png', 'top.png']
    assert labels(x) == ['cat', 'dog', 'cat', 'dog'] and x.classes == ['cat', 'dog']
    assert x.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert labels(image_folder(folder, cache=cache, labels=str(table(text)))) == labels(x)

def test_the_rest_is_unknown(folder, cache, table):
    x = image_folder(folder, cache=cache, labels=table('path,label\n1,cat\nb/2.png,\n'))
    assert labels(x) == ['cat', None, None, None] and x.classes == ['cat'] and '3 unlabeled' in repr(x)
    x = image_folder(folder, cache=cache, labels=table('1,10\na/2.png,9\nb/2.png,-1\ntop,2\n'))
    assert x.classes == ['2', '9', '10'] and labels(x) == ['10', '9', None, '2']
    x = image_folder(folder, cache=cache, labels=table('1,-1\ntop,b\n'))
    assert x.classes == ['-1', 'b']                            # a name like any other among names

def test_an_exact_path_comes_before_a_bare_name(folder, cache, table):
    (folder/'1.png').write_bytes((folder/'top.png').read_bytes())
    x = image_folder(folder, cache=cache, labels=table('path,label\n1.png,x\n'))
    assert x.paths[0] == '1.png' and labels(x) == ['x', None, None, None, None]

def test_a_table_and_a_damaged_file(folder, cache, table):
    (folder/'a/2.png').write_bytes(b'')
    x = image_folder(folder, cache=cache, labels=table('1,u\na/2.png,v\nb/2.png,w'))
    assert x.paths == ['a/1.png', 'b/2.png', 'top.png'] and labels(x) == ['u', 'w', None]
    assert x.classes == ['u', 'v', 'w'] and x.skipped == [('a/2.png', 'an empty file')]

@pytest.mark.parametrize('words, text', [
    ("column 'label' or 'class' or 'y', but its first row is: path, weather", 'path,weather\n1,sun\n'),
    ("column 'path' or .*first row is: id, label", 'id,label\n1,sun\n'),
    ('first row is: 1, sun, 3', '1,sun,3\n'), ('first row is: just', 'just\nlines\n'),
    ("No row .* has 'x', the folder 'a/1.png'", 'path,label\nx,cat\ny,dog\n'), ('No row', 'path,label\n'),
    ('fits a/2.png and b/2.png', 'path,label\n2.png,cat\n'), ('fits a/2.png and b/2.png', '2,cat\n'),
    ("'1.png' both 'cat' and 'dog'", 'path,label\na/1.png,cat\n1.png,dog\n'), ('is empty', ' \n\n'),
    ('has 2 columns, but a row of 3: 1,cat,dog', 'path,label\n1,cat,dog\n'),
    ('No image has a label', 'path,label\n1,\ntop,\n'), ('No image has a label', '1,-1\ntop,-1\n')])
def test_wrong_tables(folder, cache, table, words, text):
    refused(words, image_folder, folder, cache=cache, labels=table(text))
    assert not cache.exists()                                  # refused before anything is decoded

def test_no_table(folder, cache, tmp_path):
    refused('cannot be read: No such file', image_folder, folder, cache=cache, labels=tmp_path/'nowhere.csv')
    refused('cannot be read', image_folder, folder, cache=cache, labels=tmp_path)
    (tmp_path/'x.csv').write_bytes(bytes(range(256)))
    refused('is not a CSV file', image_folder, folder, cache=cache, labels=tmp_path/'x.csv')

SPLITS = 'path,split\na/1.png,train\na/2.png,test\nb/2.png,test\n'

def test_splits(folder, cache, table):
    splits, names = table(SPLITS), table('1,u\nb/2.png,w\ntop,v', 'labels.csv')
    train, test = (image_folder(folder, cache=cache, labels=names, split=s, splits=splits)
                   for s in ('train', 'test'))
    assert train.paths == ['a/1.png'] and test.paths == ['a/2.png', 'b/2.png']
    assert test.images[:, 0, 0, 0].tolist() == [1, 2]
    assert labels(test) == [None, 'w'] and labels(train) == ['u']
    assert train.classes == test.classes == ['u', 'v', 'w']     # the same numbers mean the same classes
    plain = table('1,train\na/2.png,test', 'plain.csv')
    plain = image_folder(folder, cache=cache, split='test', splits=plain)
    assert plain.paths == ['a/2.png'] and plain.labels is None

def test_splits_keep_the_classes_of_subfolders(folder, cache, table):
    (folder/'top.png').unlink()
    test = image_folder(folder, cache=cache, split='test', splits=table('b/2.png,test'))
    assert test.classes == ['a', 'b'] and labels(test) == ['b']

def test_one_table_for_all(folder, cache, table):
    t = table('file,class,subset,timestamp\n1,u,train,10\na/2.png,v,test,20.5\n'
              'b/2.png,,test,2003-12-23T08:00:10Z\n')
    x = image_folder(folder, cache=cache, labels=t, split='test', times=t)
    assert labels(x) == ['v', None] and x.times.tolist() == [20.5, 1072166410] and x.classes == ['u', 'v']

@pytest.mark.parametrize('words, options', [
    ("'val', only of: test, train", dict(split='val', splits='t.csv')),
    ('None, only of: test, train', dict(splits='t.csv')), ('give `splits`', dict(split='test')),
    ("'label' or 'class'", dict(split='test', labels='t.csv')),
    ("'split' or 'subset'", dict(split='a', labels='labels.csv'))])
def test_wrong_splits(folder, cache, table, monkeypatch, words, options):
    table(SPLITS)
    table('path,y\n1,a\n', 'labels.csv')
    monkeypatch.chdir(folder.parent)
    refused(words, image_folder, folder, cache=cache, **options)
    assert not cache.exists()

# -- times --

FORMS = ['%Y%m%d_%H%M%S', '%Y-%m-%dT%H-%M-%S', 'N%Y%m%dG%H%M%S', '%Y%m%d%H%M%S', '%Y-%m-%d %H:%M:%S',
         'yrs.%Y.%m.%d.%H.%M.%S', '%Y_%m_%d_%H_%M_%S_557', 'ASI-%Y%m%d-%H%M%SZ', 'kho_%Y%m%d_UT%H%M%S.full',
         'Image at %Y-%m-%d at %H.%M.%S', '0042_%Y%m%dT%H%M%S_0001']

@given(st.datetimes(datetime(1900, 1, 1), datetime(2099, 12, 31)), st.sampled_from(FORMS))
def test_times_in_names(time, form):
    time = time.replace(microsecond=0)
    assert parse_time(time.strftime(form) + '.png') == (time - datetime(1970, 1, 1)).total_seconds()

@pytest.mark.parametrize('name', [
    '', 'x.png', '20031223.png', '20031223_0800.png', 'IMG_20031223_0001.jpg', '20031323_080010',
    '20030231_080010', '20031223_250010', '20031223_086010', '120031223_080010', '20031223_0800101',
    '18991231_080010', '2003-1223_080010', '1072166410', '20031223_____080010', '12345678901234'])
def test_no_time_in_a_name(name): assert parse_time(name) is None

def test_the_first_valid_time_counts():
    assert parse_time('20039999_999999_20031223_080010_20041223_080010') == 1072166410

def sky(folder, names):
    folder.mkdir()
    for i, name in enumerate(names): Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder/name)
    return folder

def test_times_from_names(tmp_path, cache):
    names = ['20031223_080010.png', '20031223_080020.png']
    x = image_folder(sky(tmp_path/'s', names), cache=cache, times='names')
    assert x.times.tolist() == [1072166410, 1072166420] and x.times.dtype == torch.float64

@pytest.mark.parametrize('text', [
    '1072166410', '1072166410.0', '2003-12-23T08:00:10', '2003-12-23 08:00:10Z', '2003-12-23T09:30:10+01:30',
    '20031223080010', '20031223_080010', '2003-12-23T08:00:10.000+00:00', '2003-12-23T08-00-10'])
def test_times_from_a_table(folder, cache, table, text):
    rows = ''.join(f'{n},{text}\n' for n in ('1', 'a/2.png', 'b/2.png', 'top'))
    for t in (table('path,time\n' + rows), table(rows)):
        assert image_folder(folder, cache=cache, times=t).times.tolist() == [1072166410]*4

def test_numbers_and_dates_in_a_table(folder, cache, table):
    t = table('1,-10\na/2.png,0.25\nb/2.png,1970-01-02\ntop,1e3\n')
    refused("'top.png' cannot be read from '1e3'", image_folder, folder, cache=cache, times=t)
    t = table('1,-10\na/2.png,0.25\nb/2.png,1970-01-02\ntop,1000\n')
    assert image_folder(folder, cache=cache, times=t).times.tolist() == [-10, .25, 86400, 1000]

def test_wrong_times_of_a_folder(folder, cache, table):
    words = r"'a/1.png' cannot be read from '1.png' \(4 of 4 images\)"
    refused(words, image_folder, folder, cache=cache, times='names')
    for text in ('noon', '1072166410000', 'nan', 'inf', '', '2003-13-01T00:00:00'):
        t = table(f'path,datetime\n1,5\na/2.png,5\nb/2.png,"{text}"\ntop,6\n')
        refused(f"'b/2.png' cannot be read from '{text}' .1 of 4", image_folder, folder, cache=cache, times=t)
    refused("from '' .3 of 4", image_folder, folder, cache=cache, times=table('1,5\n'))
    assert not cache.exists()

# -- whole days --

def day(t): return (datetime.fromtimestamp(t, timezone.utc) - timedelta(hours=12)).date()

@settings(deadline=None)
@given(st.lists(st.integers(0, 20*86400), min_size=2, max_size=60), st.floats(.05, .95), st.integers(0, 9))
def test_no_day_is_on_both_sides(times, share, seed):
    days = [day(t) for t in times]
    if len(set(days)) < 2: return refused('one day', split_by_day, times, share, seed)
    train, test = split_by_day(times, share, seed)
    assert sorted(train.tolist() + test.tolist()) == list(range(len(times)))
    assert train.tolist() == sorted(train.tolist()) and test.tolist() == sorted(test.tolist())
    assert len(train) and len(test) and not {days[i] for i in train} & {days[i] for i in test}
    again = split_by_day(np.array(times, float), share, seed)
    assert again[0].equal(train) and again[1].equal(test)
    biggest = max(days.count(d) for d in days)
    assert abs(len(test) - share*len(times)) <= biggest       # within one day of the share

def test_a_night_stays_whole():
    dusk = parse_time('20031223_180000')
    times = torch.tensor([dusk + 86400*n + 3600*h for n in range(10) for h in range(12)], dtype=torch.float64)
    train, test = split_by_day(times)
    assert len(test) == 24 and len(train) == 96
    for part in (train, test): assert len({i // 12 for i in part.tolist()})*12 == len(part)
    assert len({tuple(split_by_day(times, seed=s)[1].tolist()) for s in range(20)}) > 5

@pytest.mark.parametrize('words, times, options', [
    ('test share', [0, 1e5], dict(test_share=0)), ('test share', [0, 1e5], dict(test_share=1)),
    ('test share', [0, 1e5], dict(test_share=np.nan)), ('no times', None, {}), ('one day', [], {}),
    ('image 1 is nan', [0, np.nan], {}), ('one day', [50_000, 60_000], {}),
    ('float64', torch.tensor([0, 1e9]), {})])
def test_wrong_days(words, times, options): refused(words, split_by_day, times, **options)

def test_find_images_knows_imagenets_suffix(imagenet): assert len(find_images(imagenet)) == 15
