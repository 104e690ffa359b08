"Folders with a cache and tables, the public data sets in their true formats, and the door to all of them."
import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.error import URLError

from dataclasses import replace
import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shell import forked, server
from test_data import damaged, noise, refused, save

from scan_nb import data, datasets
from scan_nb.data import decode_image, digits, find_images, read_images
from scan_nb.datasets import (
    DATASETS, DEBIAN_FASHION, as_image_set, atomic_write, cache_dir, cifar10, cifar20, cifar100, dataset_name,
    fashion_mnist, fingerprint_images, image_folder, imagenet_subset, load_splits, open_images, parse_time,
    split_by_day, stl10, synthetic_aurora)

@pytest.fixture
def root(tmp_path): return tmp_path/'root'

@pytest.fixture
def cache(tmp_path): return tmp_path/'cache'

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'images').mkdir()
    return tmp_path/'images'

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

# -- writing --

def test_atomic_write(tmp_path):
    (tmp_path/'x').write_text('old')
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path/'x') as f:
        f.write(b'half')
        1/0  # noqa: B018
    assert (tmp_path/'x').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path/'x') as f: f.write(b'new')
    assert (tmp_path/'x').read_text() == 'new' and len(list(tmp_path.iterdir())) == 1

# -- a folder --

def messy(folder):
    save(folder/'a.png', noise(40, 60))
    save(folder/'b/c.png', noise(30, 50, 3))
    save(folder/'d.jpg', noise(70, 20, 3))

def three_classes(folder):
    for name in ('dog/1.png', 'dog/deep/2.png', 'cat/3.png', 'emu/4.png'): save(folder/name, noise(4, 4))
    (folder/'emu/4.png').write_bytes(b'')

@pytest.mark.parametrize('options', [{}, dict(size=16, channels=1), dict(labels=False), dict(channels=3)],
                         ids=str)
@pytest.mark.parametrize('fill', [messy, three_classes, damaged])
def test_gives_what_the_lesson_gives(folder, cache, fill, options):
    fill(folder)
    want = data.image_folder(folder, **options)
    for _ in range(2):                                        # decoded, and from the cache
        got = image_folder(folder, cache=cache, **options)
        assert got.facts == want.facts | dict(others={})   # JSON keeps them
        for name, value in vars(replace(want, facts=got.facts)).items():
            other = getattr(got, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name

def test_faults_come_before_the_cache(folder, cache):
    refused('no image', image_folder, folder, cache=cache)
    refused('no folder', as_image_set, folder/'nowhere', cache=cache)
    save(folder/'a.png', noise(4, 4))
    refused('size must', image_folder, folder, size=2.5, cache=cache)
    refused('channels must', image_folder, folder, size=3, channels=2, cache=cache)
    refused('two subfolders', image_folder, folder, labels=True, cache=cache.parent/'other')
    assert not cache.exists()

def test_nothing_readable(folder, cache):
    damaged(folder)
    (folder/'good.png').unlink()
    for _ in range(2): refused(r"can be read \('broken.png': no such file", image_folder, folder, cache=cache)

def test_whatever_holds_images(folder, cache, monkeypatch):
    monkeypatch.setenv('HOME', str(folder.parent))
    save(folder/'x.png', noise(4, 4))
    assert as_image_set('~/images', 9, cache=cache).images.shape == (1, 1, 9, 9) and cache.exists()
    assert as_image_set(np.zeros((2, 3, 8, 8)), size=8, channels=3).images.shape == (2, 3, 8, 8)
    assert as_image_set(whole := digits()) is whole
    refused('8×8 pixels', as_image_set, whole, 9)
    refused('not as list', as_image_set, [1, 2])

def test_bar_only_when_asked(folder, cache, capfd):
    for i in range(3): save(folder/f'{i}.png', noise(4, 4))
    image_folder(folder, cache=cache)
    assert capfd.readouterr() == ('', '')
    image_folder(folder, size=5, cache=cache, progress=True)
    assert '3/3' in capfd.readouterr().err

def test_more_files_than_are_decoded_at_a_time(folder, cache):
    x = noise(2100, 28, 28)
    for i, image in enumerate(x): save(folder/f'{i:04}.png', image, compress_level=1)
    got = image_folder(folder, cache=cache)
    assert got.images.shape == (2100, 1, 28, 28) and (got.images[:, 0].numpy() == x).all()
    assert got.labels is None and got.paths[2021] == '2021.png'

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
    x, (skipped, _) = np.load(file), json.loads(file.with_suffix('.json').read_text())
    assert x.shape == (8, 3, 10, 10) and len(skipped) == 7 and x[0].any() and not x[1:].any()

def read_when_told(folder, cache, told, said):
    told.recv()
    x = image_folder(folder, cache=cache)
    said.send((len(x), len(x.skipped), hashlib.sha256(x.images.numpy().tobytes()).hexdigest()))

def test_two_processes_write_at_once(folder, cache):
    for i in range(300): save(folder/f'{i:03}.png', noise(12, 12, seed=i))
    (folder/'007.png').write_bytes(b'')
    (told, tell), (heard, said) = (server.Pipe(duplex=False) for _ in range(2))
    both = [forked(read_when_told, folder, cache, told, said) for _ in range(2)]
    for _ in both: tell.send('go')
    x, _ = read_images(find_images(folder), 12, 1)
    want = 299, 1, hashlib.sha256(x.numpy().tobytes()).hexdigest()
    for process in both: process.join()
    assert [heard.poll() and heard.recv() for _ in both] == [want]*2
    assert len(list(cache.iterdir())) == 2

# -- a folder with tables --

@pytest.fixture
def four(folder):
    "Four images: a/1.png, a/2.png, b/2.png and top.png."
    for i, name in enumerate(('a/1.png', 'a/2.png', 'b/2.png', 'top.png')):
        save(folder/name, np.full((4, 4), i, np.uint8))
    return folder

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
def test_labels_from_a_table(four, cache, table, text):
    x = image_folder(four, cache=cache, labels=table(text))
    assert x.paths == ['a/1.png', 'a/2.png', 'b/2.png', 'top.png']
    assert labels(x) == ['cat', 'dog', 'cat', 'dog'] and x.classes == ['cat', 'dog']
    assert x.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert labels(image_folder(four, cache=cache, labels=str(table(text)))) == labels(x)

def test_the_rest_is_unknown(four, cache, table):
    x = image_folder(four, cache=cache, labels=table('path,label\n1,cat\nb/2.png,\n'))
    assert labels(x) == ['cat', None, None, None] and x.classes == ['cat'] and '3 unlabeled' in repr(x)
    x = image_folder(four, cache=cache, labels=table('1,10\na/2.png,9\nb/2.png,-1\ntop,2\n'))
    assert x.classes == ['2', '9', '10'] and labels(x) == ['10', '9', None, '2']
    x = image_folder(four, cache=cache, labels=table('1,-1\ntop,b\n'))
    assert x.classes == ['-1', 'b']                            # a name like any other among names

def test_an_exact_path_comes_before_a_bare_name(four, cache, table):
    (four/'1.png').write_bytes((four/'top.png').read_bytes())
    x = image_folder(four, cache=cache, labels=table('path,label\n1.png,x\n'))
    assert x.paths[0] == '1.png' and labels(x) == ['x', None, None, None, None]

def test_a_table_and_a_damaged_file(four, cache, table):
    (four/'a/2.png').write_bytes(b'')
    x = image_folder(four, cache=cache, labels=table('1,u\na/2.png,v\nb/2.png,w'))
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
def test_wrong_tables(four, cache, table, words, text):
    refused(words, image_folder, four, cache=cache, labels=table(text))
    assert not cache.exists()                                  # refused before anything is decoded

def test_no_table(four, cache, tmp_path):
    refused('cannot be read: No such file', image_folder, four, cache=cache, labels=tmp_path/'nowhere.csv')
    refused('cannot be read', image_folder, four, cache=cache, labels=tmp_path)
    (tmp_path/'x.csv').write_bytes(bytes(range(256)))
    refused('is not a CSV file', image_folder, four, cache=cache, labels=tmp_path/'x.csv')

SPLITS = 'path,split\na/1.png,train\na/2.png,test\nb/2.png,test\n'

def test_splits(four, cache, table):
    splits, names = table(SPLITS), table('1,u\nb/2.png,w\ntop,v', 'labels.csv')
    train, test = (image_folder(four, cache=cache, labels=names, split=s, splits=splits)
                   for s in ('train', 'test'))
    assert train.paths == ['a/1.png'] and test.paths == ['a/2.png', 'b/2.png']
    assert test.images[:, 0, 0, 0].tolist() == [1, 2]
    assert labels(test) == [None, 'w'] and labels(train) == ['u']
    assert train.classes == test.classes == ['u', 'v', 'w']     # the same numbers mean the same classes
    plain = table('1,train\na/2.png,test', 'plain.csv')
    plain = image_folder(four, cache=cache, split='test', splits=plain)
    assert plain.paths == ['a/2.png'] and plain.labels is None

def test_splits_keep_the_classes_of_subfolders(four, cache, table):
    (four/'top.png').unlink()
    test = image_folder(four, cache=cache, split='test', splits=table('b/2.png,test'))
    assert test.classes == ['a', 'b'] and labels(test) == ['b']

def test_one_table_for_all(four, cache, table):
    t = table('file,class,subset,timestamp\n1,u,train,10\na/2.png,v,test,20.5\n'
              'b/2.png,,test,2003-12-23T08:00:10Z\n')
    x = image_folder(four, cache=cache, labels=t, split='test', times=t)
    assert labels(x) == ['v', None] and x.times.tolist() == [20.5, 1072166410] and x.classes == ['u', 'v']

@pytest.mark.parametrize('words, options', [
    ("'val', only of: test, train", dict(split='val', splits='t.csv')),
    ('None, only of: test, train', dict(splits='t.csv')), ('give `splits`', dict(split='test')),
    ("'label' or 'class'", dict(split='test', labels='t.csv')),
    ("'split' or 'subset'", dict(split='a', labels='labels.csv'))])
def test_wrong_splits(four, cache, table, monkeypatch, words, options):
    table(SPLITS)
    table('path,y\n1,a\n', 'labels.csv')
    monkeypatch.chdir(four.parent)
    refused(words, image_folder, four, cache=cache, **options)
    assert not cache.exists()

def test_several_splits(four, cache, table):
    t = table('1,train\na/2.png,val\nb/2.png,test\n')
    x = image_folder(four, cache=cache, split=['train', 'test'], splits=t)
    assert x.paths == ['a/1.png', 'b/2.png']
    refused("split 'a' or 'b', only of: test, train, val", image_folder, four, split=['a', 'b'], splits=t)

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
def test_times_from_a_table(four, cache, table, text):
    rows = ''.join(f'{n},{text}\n' for n in ('1', 'a/2.png', 'b/2.png', 'top'))
    for t in (table('path,time\n' + rows), table(rows)):
        assert image_folder(four, cache=cache, times=t).times.tolist() == [1072166410]*4

def test_numbers_and_dates_in_a_table(four, cache, table):
    t = table('1,-10\na/2.png,0.25\nb/2.png,1970-01-02\ntop,1e3\n')
    refused("'top.png' cannot be read from '1e3'", image_folder, four, cache=cache, times=t)
    t = table('1,-10\na/2.png,0.25\nb/2.png,1970-01-02\ntop,1000\n')
    assert image_folder(four, cache=cache, times=t).times.tolist() == [-10, .25, 86400, 1000]

def test_wrong_times_of_a_folder(four, cache, table):
    words = r"'a/1.png' cannot be read from '1.png' \(4 of 4 images\)"
    refused(words, image_folder, four, cache=cache, times='names')
    for text in ('noon', '1072166410000', 'nan', 'inf', '', '2003-13-01T00:00:00'):
        t = table(f'path,datetime\n1,5\na/2.png,5\nb/2.png,"{text}"\ntop,6\n')
        refused(f"'b/2.png' cannot be read from '{text}' .1 of 4", image_folder, four, cache=cache, times=t)
    refused("from '' .3 of 4", image_folder, four, cache=cache, times=table('1,5\n'))
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

# -- Fashion-MNIST --

def idx(x): return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, '>u4').tobytes() + x.tobytes()

FAKE = {f'{part}-{what}-ubyte': idx(x) for part, n in (('train', 20), ('t10k', 10))
        for what, x in (('images-idx3', noise(n, 28, 28, seed=n)),
                        ('labels-idx1', np.arange(n, dtype=np.uint8) % 10))}

@pytest.fixture
def no_mirror(monkeypatch, tmp_path):
    "No copy on this machine, no internet, two mirrors; the addresses asked for."
    from torchvision.datasets import FashionMNIST
    monkeypatch.setattr(FashionMNIST, 'mirrors', ['https://one.test/', 'https://two.test/'])
    asked = []
    def urlopen(url, timeout):
        asked.append(url)
        raise OSError('no route to host')
    monkeypatch.setattr('urllib.request.urlopen', urlopen)
    monkeypatch.setattr(datasets, 'DEBIAN_FASHION', str(tmp_path/'debian'))
    return asked

@pytest.mark.parametrize('end', ['', '.gz'])
@pytest.mark.parametrize('place', ['root/FashionMNIST/raw', 'debian'])
def test_fashion_from_files(tmp_path, no_mirror, place, end):
    (tmp_path/place).mkdir(parents=True)
    for name, raw in FAKE.items():
        (tmp_path/place/(name + end)).write_bytes(gzip.compress(raw) if end else raw)
    train, test, both = (fashion_mnist(s, tmp_path/'root') for s in ('train', 'test', 'all'))
    assert (train.images[:, 0].numpy() == noise(20, 28, 28, seed=20)).all() and len(test) == 10
    assert both.images.equal(torch.cat([train.images, test.images]))
    assert both.labels.tolist() == [*range(10)]*3
    assert both.n_classes == 10 and both.labels.dtype == torch.int64
    assert not no_mirror

def test_fashion_nowhere(tmp_path, no_mirror):
    refused('apt install dataset-fashion-mnist', fashion_mnist, 'test', tmp_path)
    assert no_mirror == [f'https://{n}.test/t10k-images-idx3-ubyte.gz' for n in ('one', 'two')]
    refused("not 'valid'", fashion_mnist, 'valid')

def test_fashion_downloads(tmp_path, no_mirror, monkeypatch):
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
def test_fashion_damaged(tmp_path, no_mirror, damage, end):
    raw = tmp_path/'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for name, b in FAKE.items():
        (raw/(name + end)).write_bytes(gzip.compress(damage(b)) if end else damage(b))
    refused('is damaged', fashion_mnist, 'test', tmp_path)

@pytest.mark.parametrize('at', [5, 12, -12, -4])
def test_fashion_damaged_gz(tmp_path, no_mirror, at):
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

def photograph(path, seed, size=(90, 120)):
    "A JPEG of one color with a brighter side."
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.ones((*size, 3), np.uint8)*noise(3, seed=seed)//2
    x[:, size[1]//2:] *= 2
    Image.fromarray(x).save(path, 'JPEG')

@pytest.fixture
def imagenet(root):
    for split, n in (('train', 3), ('val', 2)):
        for i, folder in enumerate(FOLDERS):
            for j in range(n): photograph(root/split/folder/f'{folder}_{j}.JPEG', 10*i + j)
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

def test_imagenet_both_parts(imagenet, cache):
    both = imagenet_subset(imagenet, 'all', FOLDERS[1:], 32, cache)
    train, val = (imagenet_subset(imagenet, s, FOLDERS[1:], 32, cache) for s in ('train', 'val'))
    assert both.images.equal(torch.cat([train.images, val.images])) and both.classes == FOLDERS[1:]
    assert both.labels.equal(torch.cat([train.labels, val.labels]))
    assert both.paths == [f'train/{p}' for p in train.paths] + [f'val/{p}' for p in val.paths]

def test_find_images_knows_imagenets_suffix(imagenet): assert len(find_images(imagenet)) == 15

# -- one door for names --

@pytest.fixture
def home(monkeypatch, tmp_path):
    "A cache of one's own, where data sets are looked for too."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    return tmp_path/'xdg/scan_nb'

@pytest.mark.parametrize('name', DATASETS)
def test_names_are_one_whatever_their_case_and_hyphens(name):
    plain = name.replace('-', '').replace('_', '')
    forms = name, name.upper(), plain, name.replace('-', '_'), name.replace('_', '-').title()
    assert {dataset_name(f) for f in forms} == {name}

@pytest.mark.parametrize('source', ['', 'cifar', 'cifar-10 ', './digits', Path('digits'), None, 3,
                                    np.zeros(3)], ids=repr)
def test_what_is_no_name(source): assert dataset_name(source) is None

def parts(source, names=('train', 'pretext', 'test', 'all'), **options):
    return [open_images(source, part, **options) for part in names]

def counts(source, **options): return [None if x is None else len(x) for x in parts(source, **options)]

def test_opens_digits():
    assert counts('digits') == [1500, 1500, 297, 1797]
    train, pretext, test, whole = parts('Digits', size=8)
    assert torch.cat([train.images, test.images]).equal(whole.images) and pretext.images.equal(train.images)
    assert torch.cat([train.labels, test.labels]).equal(digits().labels)
    assert len(open_images('digits')) == 1797

def test_opens_fashion(root, no_mirror):
    (root/'FashionMNIST/raw').mkdir(parents=True)
    for name, raw in FAKE.items(): (root/'FashionMNIST/raw'/name).write_bytes(raw)
    assert counts('fashion_mnist', place=dict(root=root)) == [20, 20, 10, 30]
    assert counts('fashion-mnist', place=str(root)) == [20, 20, 10, 30]

def test_opens_cifar(root, home, offline):
    write_cifar10(root)
    write_cifar100(root)
    assert counts('cifar10', place=dict(root=str(root))) == [35, 35, 7, 42]
    for name, n in (('CIFAR-20', 20), ('cifar_100', 100)):
        assert counts(name, place=dict(root=root)) == [7, 7, 7, 14]
        assert open_images(name, place=dict(root=root)).n_classes == n
    write_cifar10(home)                                       # where a download would go
    assert counts('cifar-10') == counts('cifar-10', place={}) == [35, 35, 7, 42] and not offline

def test_opens_stl(root, home, cache):
    write_stl(root)
    place = dict(root=root, cache=cache)
    assert counts('stl10', place=place) == [6, 11, 4, 10] and not home.exists()
    train, pretext, test, whole = parts('STL-10', place=place)
    assert (pretext.labels == -1).sum() == 5 and whole.labels.equal(torch.cat([train.labels, test.labels]))
    assert whole.images.equal(torch.cat([train.images, test.images]))

def test_opens_imagenet(imagenet, home, tmp_path):
    (tmp_path/'two.txt').write_text('\n'.join(FOLDERS[:2]))
    some = dict(root=imagenet, classes=tmp_path/'two.txt')
    assert counts('imagenet', size=56, place=dict(root=imagenet)) == [9, 9, 6, 15]
    for name in ('imagenet_50', 'ImageNet100', 'imagenet-200', 'imagenet_dogs'):
        assert counts(name, size=56, place=some) == [6, 6, 4, 10], name
    x = open_images('imagenet', 'test', size=56, place=dict(root=imagenet))
    assert x.images.equal(imagenet_subset(imagenet, 'val', size=64).images) and x.classes == FOLDERS
    assert open_images('imagenet', 'test', place=dict(root=imagenet)).images.shape[1:] == (3, 256, 256)

def test_where_is_imagenet():
    for place in (None, {}, dict(classes='x')):
        refused('Where is ImageNet. Put `data: {imagenet_50: {root: FOLDER}}` into env.yml', open_images,
                'imagenet50', place=place)
    refused('Which classes has imagenet_50. Put `classes: FILE`', open_images, 'imagenet_50', place='x')
    refused('above train and val', open_images, 'imagenet', place='nowhere')

def test_opens_what_holds_images():
    for source in (digits(), digits().images, digits().images.numpy()):
        assert counts(source) == [1797, 1797, None, 1797] and counts(source, size=8)[0] == 1797
        refused('8×8 pixels', open_images, source, size=9)
        refused('have 1 channels', open_images, source, channels=3)
    assert open_images(whole := digits(), 'train') is whole
    refused('not as list', open_images, [1, 2])

def test_opens_folders(four, home, table, cache):
    for source in (four, str(four)):
        assert counts(source) == [4, 4, None, 4]
        assert open_images(source, size=7, channels=3).images.shape == (4, 3, 7, 7)
    assert counts('mine', place=str(four)) == [4, 4, None, 4]
    place = dict(root=four, labels=table('1,u\nb/2.png,w\ntop,v', 'labels.csv'), cache=cache,
                 splits=table('path,split\na/1.png,train\na/2.png,test\nb/2.png,test\ntop.png,other\n'))
    train, pretext, test, whole = parts('mine', place=place)
    assert train.paths == pretext.paths == ['a/1.png'] and test.paths == ['a/2.png', 'b/2.png']
    assert whole.paths == ['a/1.png', 'a/2.png', 'b/2.png'] and labels(whole) == ['u', None, 'w']
    assert cache.exists() and place['root'] == four           # as it was
    times = open_images('mine', place=dict(root=four, times=table('1,1\na/2.png,2\nb/2.png,3\ntop,4')))
    assert times.times.tolist() == [1, 2, 3, 4]

def test_a_bar_for_folders(four, cache, capfd):
    open_images(four, place=dict(cache=cache), progress=True)
    assert '4/4' in capfd.readouterr().err

def test_a_name_comes_before_a_folder_and_a_path_is_a_folder(four, home, monkeypatch):
    four.rename(four.parent/'digits')
    monkeypatch.chdir(four.parent)
    assert len(open_images('digits')) == 1797
    assert len(open_images('./digits')) == len(open_images(Path('digits'))) == 4

def test_opens_aurora(four, home, monkeypatch):
    monkeypatch.setattr(datasets, 'synthetic_aurora', lambda **options: synthetic_aurora(500, **options))
    train, pretext, test, whole = parts('aurora')
    assert whole.images.shape == (500, 1, 32, 32) and len(test) == 100 and len(pretext) == len(train) == 400
    days = [set(((x.times - 43200)//86400).tolist()) for x in (train, test)]
    assert not days[0] & days[1]
    assert open_images('Aurora', 'test', 16, 3).images.shape == (100, 3, 16, 16)
    assert counts('aurora', place=dict(root=four, labels=None)) == [4, 4, None, 4]

@pytest.mark.parametrize('source, near', [
    ('cifr10', 'cifar-10'), ('fashion', 'fashion-mnist'), ('DIGIT', 'digits'),
    ('imagenet_51', 'imagenet_50')])
def test_unknown_names(source, near):
    words = f"no folder '{source}' and no data set .*did you mean '{near}'.*{', '.join(DATASETS)}"
    refused(words, open_images, source)
    refused(words, open_images, source, 'test')

def test_wrong_requests(four, tmp_path):
    for part in ('val', None, ''): refused('The part is one of', open_images, 'digits', part)
    refused('size must', open_images, 'digits', size=0)
    refused('channels must', open_images, four, channels=2)
    refused("no folder .*nowhere': check", open_images, tmp_path/'nowhere')
    refused("no folder .*nowhere': check", open_images, 'mine', place=str(tmp_path/'nowhere'))
    refused("'lables' is no setting of mine: give root, cache, fit, labels, splits", open_images, 'mine',
            place=dict(root=four, lables='y'))
    (tmp_path/'x.txt').touch()
    refused('is a file', open_images, str(tmp_path/'x.txt'))

# -- the images of a run --

def sizes(*args, **options): return {name: len(part) for name, part in load_splits(*args, **options).items()}

def test_splits_of_a_data_set():
    assert sizes('digits') == sizes('Digits', None) == dict(all=1797)
    parts = load_splits('digits', 'digits')
    assert {name: len(part) for name, part in parts.items()} == dict(train=1500, test=297)
    assert torch.cat([part.images for part in parts.values()]).equal(digits().images)
    assert [*sizes('digits', 'DIGITS')] == ['train', 'test']   # the first is learned from

def test_splits_of_a_folder(four, home, table):
    "All of it is learned from, unless a table says what is held out."
    assert sizes(str(four)) == sizes(str(four), str(four)) == dict(all=4)
    assert load_splits(str(four), size=7, channels=3)['all'].images.shape == (4, 3, 7, 7)
    splits = table('path,split\na/1.png,train\na/2.png,test\nb/2.png,test\ntop.png,other\n')
    env = dict(data=dict(mine=dict(root=str(four), splits=str(splits))))
    assert sizes('mine', 'mine', env=env) == dict(train=1, test=2) and sizes('mine', env=env) == dict(all=3)
    assert sizes('mine', env=dict(data=dict(mine=str(four)))) == dict(all=4)

def test_held_out_images_of_another_name(four, home):
    "Learned from one set, tested on another."
    assert sizes(str(four), 'digits', size=8, channels=1) == dict(train=4, test=297)
    with pytest.raises(data.UserError, match="no folder 'nowhere'"): load_splits('digits', 'nowhere')

def test_stl_has_images_for_the_pretext_task_alone(root, home, cache):
    write_stl(root)
    env = dict(data={'STL10': dict(root=str(root), cache=str(cache))})   # names as people write them
    assert sizes('stl-10', 'stl-10', env=env) == dict(train=6, test=4, pretext=11)
    assert sizes('stl10', 'STL-10', env=env) == dict(train=6, test=4, pretext=11)
    assert sizes('stl10', env=env) == dict(all=10)

def test_the_environment_says_where_a_data_set_is(root, home, offline):
    write_cifar10(root)
    for name in ('cifar-10', 'cifar10', 'CIFAR_10'):
        for asked in ('cifar-10', 'Cifar10'):
            assert sizes(asked, asked, env=dict(data={name: str(root)})) == dict(train=35, test=7)
    assert not offline
    refused('is missing', load_splits, 'cifar-10', env=dict(data={'cifar-100': str(root)}))   # another's

@pytest.mark.parametrize('env, name, words', [
    ({}, 'imagenet', 'Where is ImageNet'), (None, 'imagenet_50', 'Where is ImageNet'),
    (dict(data=dict(imagenet_50=dict(root='x'))), 'imagenet_50', 'Which classes'),
    ({}, 'no-such-folder', 'no-such-folder'), (dict(data=None), 'digit', "did you mean 'digits'"),
    (dict(data=dict(mine=dict(root='x', lables='y'))), 'mine', 'lables')])
def test_images_that_are_not_to_be_had(env, name, words):
    refused(words, load_splits, name, env=env)
    refused(words, load_splits, name, name, env=env)

def test_every_preset_names_images_that_can_be_opened(monkeypatch):
    "Each name in a shipped recipe leads to the door of that data set, in all its parts."
    from scan_nb.recipe_files import PRESETS
    asked, named = [], {}
    for name in DATASETS:
        monkeypatch.setitem(datasets.DATASETS, name,
                            lambda part, *_, name=name: asked.append((name, part)) or digits()[:5])
    for recipe in PRESETS.values():
        if recipe.scan.data: named[recipe.scan.data] = recipe.scan.test_data
    assert named.keys() >= {'digits', 'fashion-mnist', 'cifar-10', 'stl-10', 'imagenet_50', 'aurora'}
    for name, test in named.items():
        asked.clear()
        load_splits(name, test)
        parts = ['train', 'test', *['pretext']*(name == 'stl-10')] if test else ['all']
        assert asked == [(name, part) for part in parts]

# -- which images --

def test_a_fingerprint_is_of_the_images_alone():
    d = digits()[:50]
    bare, mapped = data.ImageSet(d.images.clone()), data.ImageSet(torch.from_numpy(d.images.numpy().copy()))
    named = data.ImageSet(d.images, d.labels.flip(0), d.classes, [f'{i}.png' for i in range(50)])
    want = fingerprint_images(d)
    assert want.keys() == {'images', 'shape', 'sha256'}
    assert (want['images'], want['shape'], len(want['sha256'])) == (50, [1, 8, 8], 20)
    assert fingerprint_images(bare) == fingerprint_images(mapped) == fingerprint_images(named) == want
    assert json.loads(json.dumps(want)) == want
    strided = data.ImageSet(d.images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert fingerprint_images(strided) == want   # however they lie in memory

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 49), st.integers(0, 7), st.integers(0, 7), st.integers(1, 255))
def test_any_changed_pixel_is_noticed(i, y, x, change):
    d = digits()[:50]
    other = data.ImageSet(d.images.clone())
    other.images[i, 0, y, x] ^= change
    assert fingerprint_images(other)['sha256'] != fingerprint_images(d)['sha256']

def test_order_number_and_shape_are_noticed():
    d = digits()[:50]
    found = [fingerprint_images(x) for x in (d, d[:49], d[torch.arange(49, -1, -1)],
                                             data.ImageSet(d.images.view(50, 1, 4, 16)))]
    assert len({repr(f) for f in found}) == 4

def test_a_large_set_is_looked_at_here_and_there():
    "A thousand of its images, the first and the last among them."
    x = torch.zeros(100_001, 1, 1, 2, dtype=torch.uint8)
    want = fingerprint_images(data.ImageSet(x))
    assert want['images'] == 100_001
    for i in (0, 100_000):
        changed = x.clone()
        changed[i] = 1
        assert fingerprint_images(data.ImageSet(changed)) != want
    assert fingerprint_images(data.ImageSet(x[:100_000])) != want

def test_a_fingerprint_of_many_parts_is_one():
    "More images than are hashed at a time."
    x = torch.randint(256, (9000, 1, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    whole = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:20]
    assert fingerprint_images(data.ImageSet(x))['sha256'] == whole
