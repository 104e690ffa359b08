"What people bring and what happens to their disks: the right answer or one sentence, early; nothing is lost."
import copy, os, random, re
from pathlib import Path
import numpy as np
import pytest, torch, yaml
from PIL import Image
from scan_nb import data as lesson, files, report
from scan_nb.cli import main
from scan_nb.data import ImageSet, UserError, digits, image_folder
from scan_nb.datasets import image_folder as cached_folder
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import find_recipe, load_env, to_yaml
from scan_nb.recipes import LIMITS
from scan_nb.files import alone_in
from scan_nb.run_folder import read_run
from test_stages import TINY, three_digits

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = ['--device', 'cpu', '--n-clusters', '3', '--epochs', '2', '--set', 'backbone_options.widths=[4, 8]',
         '--set', 'pretext.n_neighbors=3', '--set', 'scan.tried_heads=2', '--set', 'scan.heads_epochs=2',
         '--set', 'scan.epochs=1', '--set', 'selflabel.epochs=1']

@pytest.fixture(scope='module', autouse=True)
def _fast(tmp_path_factory):
    "Maps and curves take longer than a tiny run."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        m.setattr(report, 'embed_2d', lambda z, seed: z[:, :2].clone())
        m.setattr(report, 'draw_figures', lambda run: {})
        yield

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i, x in enumerate(digits().images[:40, 0]): Image.fromarray(x.numpy()).save(folder/f'{i:02}.png')
    return folder

@pytest.fixture(scope='module')
def run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'run'
    assert main(['run', str(pictures), '--out', str(folder), *SMALL]) == 0
    return folder

def refused(capsys, *words): # exit code 2 and one sentence, which comes back
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('scan-nb: ')]
    assert len(said) == 1 and said[0].rstrip()[-1] in '.?)', said
    return said[0]

# -- whatever the limits allow --

def drawn(rng):
    "Images of 1 to 4 pixels, and settings from the ends of their limits."
    n, c, pick = rng.randint(2, 8), rng.choice([1, 3]), rng.choice
    k, sides = rng.randint(2, n), (rng.randint(1, 4), rng.randint(1, 4))
    few = {
        'size': [1, min(sides)], 'backbone_options.widths': [(1,), (2, 1, 3)], 'pretext.whiten': [0., 1.],
        'backbone_options.stem_stride': [1, LIMITS['stem_stride'][1]], 'pretext.setup': ['simclr', 'moco'],
        'pretext.features_dim': [1, 65], 'pretext.temperature': [*LIMITS['temperature']],
        'pretext.warmup': [0., 1.], 'pretext.queue_size': [1, 7], 'pretext.key_momentum': [0., 1.],
        'pretext.n_neighbors': [1, n - 1], 'pretext.mutual': [True], 'pretext.n_views': [0, 3],
        'scan.n_neighbors': [None, 1], 'scan.n_heads': [1, 3], 'scan.head_only': [True],
        'scan.tried_heads': [1, 3], 'scan.head_choice': ['loss', 'agreement', 'both'],
        'scan.exchanges': [1, 2], 'scan.one_network': [True], 'scan.remine_every': [1, 5],
        'scan.entropy_weight': [*LIMITS['entropy_weight']],
        'prior': ['estimate', (1e-6, *[1e6]*(k - 1))], 'selflabel.threshold': [0., .5, 1 - 1e-6],
        'selflabel.ema_decay': [None, 0., 1 - 1e-6], 'selflabel.soft_targets': [True],
        'selflabel.entropy_weight': [0., 1e6]}
    for stage in ('pretext', 'scan', 'selflabel'):
        few |= {f'{stage}.{name}': values for name, values in {
            'epochs': [1, 2], 'lr': [0., 1e-3, 1.], 'batch_size': [1, 2, n, 100][stage != 'scan':],
            'weight_decay': [0., 1.], 'momentum': [0., 1.], 'optimizer': ['sgd', 'adam'],
            'scheduler': ['constant', 'cosine'], 'lr_decay_rate': [0., 1.],
            'views': ['standard', 'simclr', 'ours']}.items()}
    settings = {name: pick(few[name]) for name in rng.sample(sorted(few), 12)}
    x = np.random.default_rng(rng.randint(0, 99)).integers(0, 256, (n, c, *sides), dtype=np.uint8)
    return dict(n_clusters=k, seed=pick([*LIMITS['seed']])) | settings, ImageSet(torch.from_numpy(x))

@pytest.mark.parametrize('seed', range(25))
def test_what_the_limits_allow_works_to_the_end(seed):
    settings, x = drawn(random.Random(seed))
    base = {'pretext.epochs': 1, 'pretext.batch_size': 4, 'scan.epochs': 1, 'selflabel.epochs': 1}
    if settings.get('scan.n_heads') == 3: base['scan.heads_epochs'] = 0
    own = {f"recipe__{name.replace('.', '__')}": value for name, value in (base | settings).items()}
    scan = SCAN(recipe='folder', device='cpu').set_params(**own)
    try: scan.fit(x)
    except (FloatingPointError, UserError) as e:   # that this rate, momentum or temperature was too much
        assert re.search('diverge|lower', str(e)), e
        return
    assert scan.labels_.shape == (len(x),) and scan.labels_.max() < settings['n_clusters']
    assert np.isfinite(scan.predict_proba(x)).all()

VALUES = [0, -1, 1, 2, .5, 1e300, -1e300, 1e-300, float('inf'), float('nan'), None, [], {}, '', 'sgd', True,
          [0], ['a'], [1, [2]], {'a': 1}, 'x'*5000, 10**30, b'ab', '1e3']

def ways(content, above=()): # to each value of a nested mapping
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict): yield from ways(value, (*above, key))

@pytest.mark.parametrize('seed', range(8))
def test_mutated_recipes(seed, tmp_path):
    "Ten changes each: refused in one short sentence when read, or they run."
    whole = yaml.safe_load(to_yaml(TINY.change({f'{part}.epochs': 1 for part in TINY.stages})))
    rng, x = random.Random(seed), three_digits()[::4]
    for _ in range(10):
        content = copy.deepcopy(whole)
        *above, last = rng.choice([*ways(whole)])
        inner = content
        for key in above: inner = inner[key]
        inner[last] = rng.choice(VALUES)
        (tmp_path/'my.yml').write_text(yaml.safe_dump(content))
        try: recipe = find_recipe(tmp_path/'my.yml')
        except UserError as e:
            assert '\n' not in str(e) and len(str(e)) < 1000
            continue
        if max(v for k, v in recipe.flat().items() if 'epochs' in k and isinstance(v, int)) > 9: continue
        try: SCAN(recipe=recipe, device='cpu').fit(x)
        except (UserError, FloatingPointError) as e: assert '\n' not in str(e)

@pytest.mark.parametrize('text', [
    'a: &a [*a]', 'a: &a {b: *a}', 'x: &x [1, 2]\ny: *x', 'a: ' + '['*10_000, 'a: ' + '{b: '*500,
    '- '*5000, 'a: ' + '['*30 + ']'*30], ids=lambda text: text[:12])
def test_yaml_without_end(text, tmp_path):
    (tmp_path/'my.yml').write_text(text)
    for read in (find_recipe, load_env):
        with pytest.raises(UserError, match=r'my\.yml. (cannot be read as YAML|holds no settings)'):
            read(tmp_path/'my.yml')

@pytest.mark.parametrize('seed', range(5))
def test_mutated_pictures(seed, tmp_path):
    "Cut, changed and mixed files are read or named; 40 in a folder."
    rng, folder = random.Random(seed), tmp_path/'pictures'
    folder.mkdir()
    x = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for i in range(40):
        file = folder/f"{i}.{rng.choice(['png', 'jpg', 'gif', 'tif', 'bmp', 'webp', 'ppm'])}"
        Image.fromarray(x).save(file)
        raw = bytearray(file.read_bytes())
        for _ in range(rng.randint(0, 8)): raw[rng.randrange(len(raw))] = rng.randrange(256)
        file.write_bytes(raw[:rng.randint(0, len(raw))] if rng.random() < .3 else raw)
    (folder/'good.png').unlink(missing_ok=True)
    Image.fromarray(x).save(folder/'good.png')
    found = image_folder(folder, 8)
    assert len(found) + len(found.skipped) == 41 and 'good.png' in found.paths

# -- files that a run reads again --

def test_one_flipped_bit_is_named_or_harmless(run, pictures, capsys):
    "In any file of a run. The clusters of `predict` and those of each stage never change silently."
    def look():
        return (SCAN.load(run).predict(str(pictures)).tolist(), [repr(o.clusters) for o in read_run(run)],
                report.read_metrics(run))
    every = sorted(p for p in run.rglob('*') if p.is_file() and p.stat().st_size)
    rng, want, named = random.Random(0), look(), 0
    for _ in range(60):
        file = rng.choice(every)
        raw = file.read_bytes()
        wrong, at = bytearray(raw), rng.randrange(len(raw))
        wrong[at] ^= 1 << rng.randrange(8)
        file.write_bytes(wrong)
        try: assert look() == want, (file, at)
        except UserError as e: named += str(run) in str(e)
        finally: file.write_bytes(raw)
    assert named > 5

KINDS = b'', b'3', b'[1, 2]', b'{"a": 1}', b'\xff\xfe', b'PK\x03\x04', b'\x93NUMPY\x01\x00v'
FILES = ('recipe.yml', 'model.safetensors', 'metrics.json', 'examples.npz', 'scan/stage.json',
         'scan/metrics.json', 'scan/outcome.pth.tar', 'pretext/simclr/embeddings.npy',
         'pretext/simclr/topk-train-neighbors.npy')

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('raw', KINDS)
def test_a_file_of_another_kind(run, pictures, capsys, name, raw):
    file, right = run/name, (run/name).read_bytes()
    file.write_bytes(raw)
    try:
        for words in (['predict', run, pictures/'00.png'], ['report', run], ['eval', run]):
            capsys.readouterr()
            code, said = main([str(w) for w in words]), capsys.readouterr().err
            assert code == 0 or code == 2 and said.startswith('scan-nb: ') and said.count('\n') == 1, said
    finally: file.write_bytes(right)

def test_a_recipe_that_does_not_belong_to_the_model(run):
    right = (run/'recipe.yml').read_text()
    (run/'recipe.yml').write_text(right.replace('seed: 0', 'seed: 1'))
    try:
        with pytest.raises(UserError, match='belongs to another recipe'): SCAN.load(run)
    finally: (run/'recipe.yml').write_text(right)

# -- disks --

@pytest.mark.parametrize('nth', [1, 3, 6, 12, 20, 25, 28, 30, 31])
def test_a_disk_that_gets_full(nth, run, pictures, tmp_path, capsys, monkeypatch):
    "At any file: one sentence with its name; with room again, the same command ends with the same clusters."
    words, count, sync = ['run', pictures, '--out', tmp_path/'run', *SMALL], [0], os.fsync
    def full(f):
        count[0] += 1
        if count[0] == nth: raise OSError(28, 'No space left on device')
        sync(f)
    monkeypatch.setattr(os, 'fsync', full)
    said = refused(capsys, *words)
    assert 'No space left' in said and str(tmp_path/'run') in said and 'run the same command again' in said
    assert not [p for p in (tmp_path/'run').rglob('.*') if p.name != '.lock']
    assert main([str(w) for w in words]) == 0
    for name in ('clusters.csv', 'model.safetensors', 'recipe.yml'):
        assert (tmp_path/'run'/name).read_bytes() == (run/name).read_bytes()

def test_one_result_that_cannot_be_written_costs_no_other(pictures, tmp_path, capsys, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device', str(tmp_path/'clusters.csv'))
    monkeypatch.setattr(report, 'write_text', lambda file, text: full() if file.name == 'clusters.csv'
                        else file.write_text(text))
    assert 'clusters.csv' in refused(capsys, 'run', pictures, '--out', tmp_path/'run', *SMALL)
    there = {p.name for p in (tmp_path/'run').iterdir()}
    assert there >= {'metrics.json', 'examples.npz', 'report.html', 'model.safetensors', 'recipe.yml'}

def test_too_little_room_is_said_before_the_first_epoch(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, 'disk_usage', lambda folder: type('Usage', (), dict(free=3 << 20)))
    said = refused(capsys, 'run', pictures, '--out', tmp_path/'run', *SMALL)
    assert 'has room for 3' in said and not list((tmp_path/'run').glob('**/*.tar'))

def test_a_folder_that_cannot_be_written(pictures, capsys):
    for place in ('/proc/mine', '/dev/null/mine'):
        assert place.rpartition('/')[0] in refused(capsys, 'run', pictures, '--out', place, *SMALL)

def test_two_runs_at_once(run, pictures, capsys):
    before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    words = 'run', pictures, '--out', run, *SMALL
    with alone_in(run): assert 'Another run is at work' in refused(capsys, *words)
    assert before == {p: p.read_bytes() for p in run.rglob('*') if p.is_file()}
    assert main([str(w) for w in words]) == 0

def test_what_a_kill_left_is_swept(run, pictures, tmp_path):
    "Hidden files are no results of others; temporary ones go, a desktop's stay."
    folder = tmp_path/'run'
    folder.mkdir()
    left = folder/f".recipe.yml.{'0a'*16}"
    for file in (left, folder/'.DS_Store'): file.write_bytes(b'half')
    with alone_in(folder): assert (folder/'.DS_Store').exists() and not left.exists()
    with alone_in(tmp_path/'new/run'): assert (tmp_path/'new/run').is_dir()

@pytest.mark.parametrize('name', ['clusters.csv', 'report.html', 'recipe.yml'])
def test_something_in_the_place_of_a_result(pictures, tmp_path, capsys, name):
    for folder in (tmp_path/name, tmp_path/'pretext'): folder.mkdir()
    assert name in refused(capsys, 'run', pictures, '--out', tmp_path, *SMALL)

def test_predict_opens_its_file_first(run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SCAN, 'predict_proba', None)   # would end in a TypeError
    assert 'missing' in refused(capsys, 'predict', run, pictures, '--out', tmp_path/'missing/found.csv')

def test_pictures_that_change_while_they_are_read(tmp_path, monkeypatch):
    for i in range(5): Image.fromarray(np.full((6, 6), 40*i, np.uint8)).save(tmp_path/f'{i}.png')
    decode = lesson.decode_image
    def touch(file, *how):
        if Path(file).name == '3.png': Image.fromarray(np.full((6, 6), 9, np.uint8)).save(tmp_path/'1.png')
        return decode(file, *how)
    with monkeypatch.context() as m:
        m.setattr(lesson, 'decode_image', touch)
        with pytest.raises(UserError, match='changed while it was read'):
            cached_folder(tmp_path, cache=tmp_path/'.cache')
    assert cached_folder(tmp_path, cache=tmp_path/'.cache').images[1].unique().tolist() == [9]

# -- what the judge knows --

def test_a_clustering_as_uneven_as_the_prior_says_is_no_collapse():
    "Bars across and along, 270 to 30."
    grid = np.mgrid[:8, :8]
    bars = [(grid[i]//2 % 2*180 + 40) for i in (0, 1)]
    x = np.stack([bars[0]]*135 + [bars[1]]*15) + np.random.default_rng(0).integers(-15, 16, (150, 8, 8))
    recipe = TINY.change({'n_clusters': 2, 'prior': (.9, .1), 'pretext.epochs': 20, 'scan.heads_epochs': 30,
                          'scan.lr': 0., 'selflabel.lr': 0.})
    scan = SCAN(recipe=recipe, device='cpu')
    scan.fit(x.clip(0, 255).astype(np.uint8), np.repeat([0, 1], [135, 15]))
    assert scan.metrics_['acc'] > .95 and scan.metrics_['notes'] == []

def test_copies_of_one_image_are_not_blamed_on_the_entropy_weight():
    x = torch.full((30, 1, 8, 8), 90, dtype=torch.uint8)
    note = ' '.join(SCAN(recipe=TINY, device='cpu').fit(x).metrics_['notes'])
    assert 'copies of one another' in note and 'entropy weight' not in note.replace('lower the entropy', '')
