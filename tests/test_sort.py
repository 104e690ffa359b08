"Files into folders: nothing overwritten, nothing lost, continued and undone from any state, to the byte."
import errno, json, os, random, shutil, signal, time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from scan_nb import sort
from scan_nb.data import ImageSet, UserError
from scan_nb.files import (alone_in, cluster_names, folder_name, read_clusters, read_names, seal,
                           rename_clusters, write_clusters)
from scan_nb.recipe_files import to_yaml
from scan_nb.recipes import ScanRecipe
from scan_nb.sort import find_files, name_folders, sort_files, undo_sort

def make_run(folder, source, clusters, n_clusters=3, labels=None):
    "As much of a run as sorting reads. clusters: path inside of the source -> cluster."
    folder.mkdir(parents=True)
    recipe = ScanRecipe(data=str(source), n_clusters=n_clusters)
    (folder/'recipe.yml').write_text(to_yaml({'scan': recipe}))
    sizes = [[*clusters.values()].count(k) for k in range(n_clusters)]
    metrics = dict(fitted_on='all', splits={'all': dict(sizes=sizes)})
    if labels: metrics['names'] = labels
    (folder/'metrics.json').write_text(seal(metrics))
    images = ImageSet(torch.zeros(len(clusters), 1, 2, 2).byte(), paths=[*clusters])
    text = write_clusters(images, torch.eye(n_clusters)[[*clusters.values()]], labels)
    (folder/'clusters.csv').write_bytes(text.encode(errors='surrogateescape'))
    return folder

def make_files(folder, names, old=1_500_000_000_123_456_789):
    for i, name in enumerate(names):
        file = folder/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(name)*(i + 1))
        os.utime(file, ns=(old, old + 1000*i))
    for top, *_ in os.walk(folder): os.utime(top, ns=(old, old))

def look(folder, times=True):
    "All that can be seen of a folder."
    found = {}
    for top, _, files in os.walk(folder):
        for path in (top, *(os.path.join(top, name) for name in files)):
            at = os.lstat(path)
            what = os.readlink(path) if os.path.islink(path) else (
                Path(path).read_bytes() if os.path.isfile(path) else None)
            found[path] = what, at.st_mode, at.st_mtime_ns if times else 0
    return found

NAMES = ['a/1.png', 'b/1.png', 'a/2.png', 'c.png', 'b/d/1.png', 'b/1-2.png', 'B/1.PNG']

@pytest.fixture
def made(tmp_path):
    "Pictures with several of one name, and a run on them."
    make_files(tmp_path/'in', NAMES)
    return make_run(tmp_path/'run', tmp_path/'in', {name: i % 2 for i, name in enumerate(NAMES)})

class Killed(BaseException): pass

def ending(at, end, after):
    "Within: the process ends before or after the operation on files of that number."
    stack, count = ExitStack(), [0]
    def watch(where, name):
        does = getattr(where, name)
        def watched(*a, **k):
            count[0] += 1
            now = count[0] == at
            if now and not after: end()
            try: return does(*a, **k)
            finally:
                if now and after: end()
        stack.enter_context(patch.object(where, name, watched))
    for name in ('link', 'unlink', 'rename', 'replace', 'mkdir', 'rmdir', 'symlink', 'utime'): watch(os, name)
    for name in ('copyfileobj', 'copystat'): watch(shutil, name)
    return stack

def kill(): raise Killed

def no_link(*a, **k): raise OSError(errno.EXDEV, 'Invalid cross-device link')

@pytest.fixture(params=['one disk', 'two disks'])
def disks(request, monkeypatch):
    if request.param == 'two disks': monkeypatch.setattr(os, 'link', no_link)
    monkeypatch.setattr(os, 'fsync', lambda file: None)   # hundreds of them take half a minute
    return request.param

HOW = pytest.mark.parametrize('how', ['copy', 'move', 'link'])

# -- there and back --

@HOW
def test_there_and_back(how, made, tmp_path, disks):
    before, to = look(tmp_path/'in'), tmp_path/'a/b/out'
    first = {p: what for p, (what, *_) in before.items() if what is not None}
    found = sort_files(made, to, how)
    assert found == dict(folders={'cluster-0': 4, 'cluster-1': 3}, failed=[])
    for k in range(2):
        want = sorted(first[str(tmp_path/'in'/name)] for i, name in enumerate(NAMES) if i % 2 == k)
        assert sorted(f.read_bytes() for f in (to/f'cluster-{k}').iterdir()) == want
    assert {f.name for f in (to/'cluster-0').iterdir()} == {'1.PNG', '2.png', '1-2.png', '1-3.png'}
    times = {f.stat().st_mtime_ns for f in to.rglob('*.[pP]*')}
    assert times == {os.stat(p).st_mtime_ns for p in first} if how != 'move' else len(times) == len(NAMES)
    if how == 'move': assert not [p for p in (tmp_path/'in').rglob('*') if p.is_file()]
    else: assert look(tmp_path/'in') == before
    links = [p for p in to.rglob('*') if p.is_symlink()]
    assert len(links) == (len(NAMES) if (how, disks) == ('link', 'two disks') else 0)
    assert sort_files(made, to, how) == found   # again: there is nothing to do
    assert undo_sort(made) == []
    assert look(tmp_path/'in') == before and not (tmp_path/'a').exists()
    assert sorted(p.name for p in made.iterdir()) == ['clusters.csv', 'metrics.json', 'recipe.yml']
    with pytest.raises(UserError, match='nothing to undo'): undo_sort(made)

def test_a_name_and_a_number_that_are_one_folder():
    found = name_folders(['cats', '', 'cats', 'a/b'], list('1223'), 4)
    assert found == ['cats', 'cluster-1 2', 'cats', 'a_b']
    with pytest.raises(UserError, match='another name'): name_folders(['Cluster-1', ''], None, 2)

names = st.binary(min_size=1, max_size=9).map(os.fsdecode).filter(
    lambda n: not {'/', '\0'} & {*n} and n[0] != '.') | st.sampled_from(
        ['1.png', '1-2.png', '1.PNG', 'é', 'e\u0301', 'x'*255])
paths = st.lists(st.lists(names, min_size=1, max_size=2).map('/'.join), min_size=1, max_size=8, unique=True)

@hypothesis_settings(max_examples=40, deadline=None)
@given(paths, st.lists(names, max_size=4), st.sampled_from(['copy', 'move', 'link']), st.randoms())
def test_any_names(tmp_path_factory, paths, others, how, rng):
    "Of files that were there before, too: these stay as they are."
    top = tmp_path_factory.mktemp('any')
    paths = [p for p in paths if not any(o.startswith(f'{p}/') for o in paths)]
    make_files(top/'in', paths)
    if others: make_files(top/'out/cluster-0', others)
    run = make_run(top/'run', top/'in', {p: rng.randrange(2) for p in paths}, 2)
    before, there = look(top/'in'), look(top/'out', times=False)
    assert [r[0] for r in read_clusters(run/'clusters.csv')] == paths
    found = sort_files(run, top/'out', how)
    assert sum(found['folders'].values()) == len(paths) and not found['failed']
    now = look(top/'out', times=False)
    assert now.items() >= there.items()
    assert sorted(w for p, (w, *_) in now.items() if w is not None and p not in there
                  and os.path.basename(p) not in ('.lock', 'sorted.json')) == sorted(
        w for w, *_ in before.values() if w is not None)
    assert undo_sort(run) == [] and look(top/'in') == before and look(top/'out', times=False) == there
    shutil.rmtree(top)

def test_into_the_folder_itself(made, tmp_path):
    before = look(tmp_path/'in')
    with pytest.raises(UserError, match='the pictures themselves'): sort_files(made, tmp_path/'in')
    assert look(tmp_path/'in') == before
    sort_files(made, tmp_path/'in', 'move')
    assert {p.parent.name for p in (tmp_path/'in').rglob('*.png')} == {'cluster-0', 'cluster-1'}
    undo_sort(made)
    assert look(tmp_path/'in') == before

def test_sorted_twice_undone_at_once(made, tmp_path):
    "The last first: else a copy would be the only one left."
    before = look(tmp_path/'in')
    for name, how in (('x', 'copy'), ('y', 'move')): sort_files(made, tmp_path/name, how)
    assert undo_sort(made) == [] and look(tmp_path/'in') == before
    assert not (tmp_path/'x').exists() and not (tmp_path/'y').exists()

def test_undone_without_the_run(made, tmp_path):
    before = look(tmp_path/'in')
    sort_files(made, tmp_path/'x', 'move')
    shutil.rmtree(made)
    (tmp_path/'x').rename(tmp_path/'elsewhere')
    assert undo_sort(to=tmp_path/'elsewhere') == [] and look(tmp_path/'in') == before

# -- killed --

@HOW
@pytest.mark.parametrize('after', [False, True])
def test_killed_at_every_step(how, after, made, tmp_path, disks):
    "Then undone, or continued and undone; and undone in two parts."
    before, to, at = look(tmp_path/'in'), tmp_path/'out', 0
    while True:
        at += 1
        try:
            with ending(at, kill, after): sort_files(made, to, how)
            break
        except Killed: pass
        there = {what for p, (what, *_) in (look(tmp_path/'in') | look(to)).items() if what}
        assert there >= {what for what, *_ in before.values() if what}, 'lost'
        if at % 2:
            assert sort_files(made, to, how)['failed'] == []
            assert not list(to.rglob(sort.PART)) and not list((tmp_path/'in').rglob(sort.PART))
        if (to/sort.PLAN).exists(): assert undo_sort(to=to) == []
        assert look(tmp_path/'in') == before
        shutil.rmtree(to, ignore_errors=True)
    assert at > 2*len(NAMES)
    for at in range(1, 200):
        try:
            with ending(at, kill, after): undo_sort(to=to)
            break
        except Killed: pass
        if (to/sort.PLAN).exists(): undo_sort(to=to)
        now = look(tmp_path/'in', False)
        assert now == {p: (*v[:2], 0) for p, v in before.items()}
        shutil.rmtree(to, ignore_errors=True)
        sort_files(made, to, how)
    assert look(tmp_path/'in') == before and at > len(NAMES)

def in_child(work, *a):
    pid = os.fork()
    if pid: return pid
    try: work(*a)
    finally: os._exit(0)

@pytest.mark.parametrize('how', ['copy', 'move'])
def test_kill_9(how, made, tmp_path, disks):
    "At an operation, and at any moment; whoever comes next goes on or back."
    before, to, rng, killed = look(tmp_path/'in'), tmp_path/'out', random.Random(0), 0
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def work(at):
        with ending(at, die, rng.random() < .5): sort_files(made, to, how)
    for turn in range(24):
        pid = in_child(work, rng.randrange(1, 40) if turn % 2 else 10**9)
        if not turn % 2:
            time.sleep(rng.random()*.02)
            os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if turn % 3 == 0: assert sort_files(made, to, how)['failed'] == []
        if (to/sort.PLAN).exists(): assert undo_sort(to=to) == []
        assert look(tmp_path/'in') == before
    assert killed > 12

# -- what can go wrong --

@pytest.mark.parametrize('how', ['copy', 'move'])
def test_a_full_disk(how, made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', no_link)
    before, copy, count = look(tmp_path/'in'), shutil.copyfileobj, [0]
    def full(a, b, *size):
        count[0] += 1
        if count[0] < 4: return copy(a, b, *size)
        b.write(b'part')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(shutil, 'copyfileobj', full)
    for _ in range(2):
        with pytest.raises(UserError, match=r'^[^\n]*No space left on device\. Nothing is lost'):
            sort_files(made, tmp_path/'out', how)
        assert count[0] in (4, 5)   # no other file is tried
    monkeypatch.setattr(shutil, 'copyfileobj', copy)
    assert sort_files(made, tmp_path/'out', how)['failed'] == []
    undo_sort(made)
    assert look(tmp_path/'in') == before

def test_too_little_room_is_said_before(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 1))
    with pytest.raises(UserError, match='has room for 0'): sort_files(made, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert sort_files(made, tmp_path/'out', 'link')['failed'] == []   # which takes none

@HOW
def test_missing_files_are_named(how, made, tmp_path):
    (tmp_path/'in/c.png').rename(tmp_path/'kept')
    found = sort_files(made, tmp_path/'out', how)
    assert found['failed'] == [(str(tmp_path/'in/c.png'), 'no such file')]
    assert sum(found['folders'].values()) == 6
    (tmp_path/'kept').rename(tmp_path/'in/c.png')
    assert sum(sort_files(made, tmp_path/'out', how)['folders'].values()) == 7   # it has come back

def test_what_changed_since_stays(made, tmp_path):
    sort_files(made, tmp_path/'out')
    (tmp_path/'out/cluster-0/mine.txt').write_text('mine')
    changed = tmp_path/'out/cluster-0/2.png'
    changed.write_text('edited')
    (tmp_path/'in/c.png').unlink()
    failed = dict(undo_sort(made))
    assert failed == {str(changed): sort.STAYS[0], str(tmp_path/'out/cluster-1/c.png'): sort.STAYS[1]}
    left = {p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file()}
    assert left == {'cluster-0/2.png', 'cluster-0/mine.txt', 'cluster-1/c.png'}

def test_what_moved_and_changed_goes_back_as_it_is(made, tmp_path):
    sort_files(made, tmp_path/'out', 'move')
    (tmp_path/'out/cluster-0/2.png').write_text('edited')
    (tmp_path/'in/c.png').write_text('new')
    (tmp_path/'in/b/d').rmdir()
    assert undo_sort(made) == [(str(tmp_path/'out/cluster-1/c.png'), sort.STAYS[0])]
    assert (tmp_path/'in/a/2.png').read_text() == 'edited' and (tmp_path/'in/c.png').read_text() == 'new'
    assert (tmp_path/'out/cluster-1/c.png').exists() and (tmp_path/'in/b/d/1.png').exists()

def test_a_file_that_came_between_is_not_overwritten(made, tmp_path):
    with pytest.raises(Killed), ending(9, kill, True): sort_files(made, tmp_path/'out', 'move')
    plan = json.loads((tmp_path/'out/sorted.json').read_text())
    old, new = next(f for f in reversed(plan['files']) if not (tmp_path/'out'/f[1]).exists())
    (tmp_path/'out'/new).write_text('mine')
    failed = sort_files(made, tmp_path/'out', 'move')['failed']
    assert failed == [(str(tmp_path/'out'/new), 'another file is there')]
    assert (tmp_path/'out'/new).read_text() == 'mine' and Path(old).exists()

def test_links_among_the_pictures(made, tmp_path):
    (tmp_path/'in/c.png').rename(tmp_path/'real.png')
    (tmp_path/'in/c.png').symlink_to('../real.png')
    before = look(tmp_path)
    assert sort_files(made, tmp_path/'out', 'move')['failed'] == [
        (str(tmp_path/'in/c.png'), 'a link, which --copy follows')]
    undo_sort(made)
    for how in ('copy', 'link'):
        sort_files(made, tmp_path/'out', how)
        assert (tmp_path/'out/cluster-1/c.png').read_bytes() == (tmp_path/'real.png').read_bytes()
        assert not (tmp_path/'out/cluster-1/c.png').is_symlink() and undo_sort(made) == []
    assert {k: v for k, v in look(tmp_path/'in').items()} == {
        k: v for k, v in before.items() if k.startswith(str(tmp_path/'in'))}

def test_a_source_that_became_a_link_to_its_copy_keeps_the_copy(made, tmp_path):
    sort_files(made, tmp_path/'out')
    (tmp_path/'in/c.png').unlink()
    (tmp_path/'in/c.png').symlink_to(tmp_path/'out/cluster-1/c.png')
    undo_sort(made)
    assert (tmp_path/'in/c.png').read_bytes()

def test_one_at_a_time(made, tmp_path):
    with alone_in(tmp_path/'out'), pytest.raises(UserError, match='at work'): sort_files(made, tmp_path/'out')

def fails(said, *a, **k):
    with pytest.raises(UserError, match=said) as e: sort_files(*a, **k)
    assert '\n' not in str(e.value)

def test_faults_in_one_sentence(made, tmp_path):
    to, plan, files = tmp_path/'out', tmp_path/'out/sorted.json', look(tmp_path/'in')
    (tmp_path/'file').touch()
    fails('is a file', made, tmp_path/'file')
    fails('folder of a run', made, made)
    fails('no run folder', tmp_path/'x', to)
    fails('no metrics.json', tmp_path, to)
    fails("in '.*x': name their folder by --source", made, to, source=tmp_path/'x')
    fails('None of the files.*--source', made, to, source=tmp_path)
    fails('no file', made, to, names=tmp_path/'x.yml')
    assert not to.exists()
    sort_files(made, to)
    fails('another sorting', made, to, 'move')
    (made/'names.yml').write_text('0: cats')
    fails('another sorting', made, to)
    plan.write_text(plan.read_text().replace('copy', 'move'))
    for work in (lambda: undo_sort(made), lambda: sort_files(made, to)):
        with pytest.raises(UserError, match='sorted.json.*damaged'): work()
    table = made/'clusters.csv'
    for wrong, said in (('../x.png', 'damaged'), ('/x.png', 'damaged'), ('', 'names no files')):
        text = table.read_text()
        table.write_text(text.replace('c.png', wrong, 1))
        fails(said, made, to)
        table.write_text(text)
    table.write_text('path\n')
    fails('clusters.csv.*damaged', made, to)
    table.unlink()
    fails('no .*clusters.csv', made, to)
    assert look(tmp_path/'in') == files

def test_another_source(made, tmp_path):
    (tmp_path/'in').rename(tmp_path/'moved')
    fails('name their folder by --source', made, tmp_path/'out')
    before = look(tmp_path/'moved')
    assert sort_files(made, tmp_path/'out', 'move', tmp_path/'moved')['failed'] == []
    assert undo_sort(made) == [] and look(tmp_path/'moved') == before

def test_held_out_images_are_sorted_too(made, tmp_path):
    recipe = ScanRecipe(data=str(tmp_path/'in'), test_data=str(tmp_path/'in'), n_clusters=3)
    (made/'recipe.yml').write_text(to_yaml({'scan': recipe}))
    head, *rows = (made/'clusters.csv').read_text().splitlines(keepends=True)
    (made/'clusters.csv').write_text(head + ''.join(rows[2:]))
    (made/'clusters-test.csv').write_text(head + ''.join(rows[:2]))
    assert len(find_files(made)) == len(NAMES)

# -- names --

def test_names_make_folders_and_merge(made, tmp_path):
    (made/'names.yml').write_text('0: "big / small"\n1: "big / small"\n')
    assert sort_files(made, tmp_path/'out')['folders'] == {'big _ small': 7}
    undo_sort(made)
    (tmp_path/'mine.yml').write_text('1: no')
    assert sort_files(made, tmp_path/'out', names=tmp_path/'mine.yml')['folders'] == {'cluster-0': 4, 'no': 3}

LITTLE, RANGE, FORM = 'too little', '0 to 2', 'no list of names'

@pytest.mark.parametrize('text, said', [
    ('0: cats\n1: Cats', LITTLE), ('0: a cat\n2: a  cat', LITTLE), ('0: a/b\n1: "a:b"', LITTLE),
    ('0: "e\\u0301"\n1: "\\u00e9"', LITTLE), ('0: \uff21B\n1: AB', LITTLE), ('3: x', RANGE), ('-1: x', RANGE),
    ('cats: 0', RANGE), ('0: x\n0: y', 'twice'), ('00: x\n0: x', 'twice'), ('0: ..', 'no folder'),
    ('0: CON', 'no folder'), (f'0: {"x"*201}', 'no folder'), ('- x', FORM), ('x', FORM), ('0: [x]', FORM),
    ('0: &a x\n1: *a', FORM), ('0: x\n--- \n0: x', FORM), ('0: "x', 'no YAML'), ('\t0: x', 'no YAML'),
    (b'0: \xff', 'no YAML'), ('['*10_000, 'no ')])
def test_names_that_are_refused(text, said, tmp_path):
    file = tmp_path/'names.yml'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as e: read_names(file, 3)
    assert '\n' not in str(e.value) and 'names.yml' in str(e.value)

@pytest.mark.parametrize('text, names', [
    ('', {}), ('# nothing\n', {}), ('{}', {}), ('0: no\n2: 007', {0: 'no', 2: '007'}), ('0:\n1: x', {1: 'x'}),
    ('{1: a, 0: a}', {0: 'a', 1: 'a'}), ('2: "line\\nend"', {2: 'line\nend'}), ("01: 'x: #y'", {1: 'x: #y'})])
def test_names_as_people_write_them(text, names, tmp_path):
    (tmp_path/'names.yml').write_text(text)
    assert read_names(tmp_path/'names.yml', 3) == names

@hypothesis_settings(max_examples=200)
@given(st.text(max_size=20) | names)
def test_folders_can_be_made_anywhere(tmp_path_factory, name):
    folder = folder_name(name)
    assert folder_name(folder) == folder and not {*folder} & {*'/\\<>:"|?*\0\n'} and folder not in ('.', '..')
    if folder: (tmp_path_factory.mktemp('f')/folder).mkdir()

@hypothesis_settings(max_examples=100)
@given(st.lists(st.sampled_from(['', 'a', 'b', 'A', 'cluster-0', 'cluster-1 a']), min_size=1, max_size=5),
       st.data())
def test_only_equal_names_by_a_person_merge(given_, data):
    n = len(given_)
    labels = data.draw(st.none() | st.lists(st.sampled_from(['', 'a', 'b']), min_size=n, max_size=n))
    try: folders = name_folders(given_, labels, len(given_))
    except UserError as e: assert 'another name' in str(e)
    else:
        for i, (a, x) in enumerate(zip(given_, folders)):
            for b, y in zip(given_[:i], folders[:i]): assert (x == y) == (a == b != '')

def test_tables_are_renamed(made):
    before = read_clusters(made/'clusters.csv')
    rename_clusters(made, cluster_names(made, None, 3))
    assert read_clusters(made/'clusters.csv') == before
    (made/'names.yml').write_text('1: "x\\ry, z"')
    rename_clusters(made, cluster_names(made, ['p', 'q', 'r'], 3))
    assert read_clusters(made/'clusters.csv') == [[*r[:4], ['p', 'x\ry, z'][r[2]]] for r in before]
