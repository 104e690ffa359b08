"The estimator and the run folder: kill and continue, equal runs, no label used, every bad input refused."
import csv, inspect, io, json, os, shutil, signal, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch, yaml
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from sklearn.base import clone
from scan_nb import pipeline
from scan_nb.augment_fast import SimCLRAugment
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.evaluate import cluster_metrics, kmeans_baseline
from scan_nb.pipeline import (EPOCHS, PRESETS, SCAN, auto_epochs, list_differences, make_views, open_run,
                              read_recipe, resolve, write_clusters)
from scan_nb.report import write_report
from scan_nb.training import Checkpoint

REPO = Path(__file__).parents[1]
TINY = dict(n_clusters=3, widths=(8, 16), pretext_epochs=2, pretext_batch=32, n_neighbors=3, n_heads=2,
            heads_epochs=3, scan_epochs=2, scan_batch=32, selflabel_epochs=2, selflabel_batch=32,
            device='cpu')
RESULTS = ['clusters.csv', 'metrics.jsonl', 'model.safetensors', 'embeddings.npy', 'recipe.yml']

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    "A second saved for each run; `whole` is made before, with a report."
    monkeypatch.setattr(pipeline, 'write_report', lambda folder: None)

@pytest.fixture(scope='module')
def data(): return digits()[:96]

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "One run from beginning to end: the estimator and its folder."
    folder = tmp_path_factory.mktemp('whole')/'run'
    return SCAN(**TINY, out=folder).fit(data), folder

def content(folder): return {name: (folder/name).read_bytes() for name in RESULTS}

def listing(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

# -- results --

def test_attributes(whole, data):
    scan, _ = whole
    assert scan.labels_.shape == (96,) and scan.labels_.dtype == np.int64 and set(scan.labels_) <= {0, 1, 2}
    assert scan.embeddings_.shape == (96, 16) and scan.neighbors_.shape == (96, 3)
    assert {k: len(v) for k, v in scan.history_.items() if v} == dict(pretext=2, heads=3, scan=2, selflabel=2)
    assert all(isinstance(s['reason'], str) and s['reason'] for s in scan.stages_.values())

def test_folder_holds_everything(whole):
    names = {p.relative_to(whole[1]).as_posix() for p in whole[1].rglob('*') if p.is_file()}
    assert names >= {*RESULTS, 'neighbors.npz', 'metrics.json', 'report.html', 'checkpoints/pretext.pt',
                     'checkpoints/heads.pt', 'checkpoints/scan.pt', 'checkpoints/selflabel.pt',
                     'figures/map.png'}
    assert not [n for n in names if 'running' in n or n.startswith('.')]

def test_files_agree_with_attributes(whole, data):
    scan, folder = whole
    rows = list(csv.DictReader(io.StringIO((folder/'clusters.csv').read_text())))
    assert list(rows[0]) == ['path', 'index', 'cluster', 'confidence']
    assert [int(r['cluster']) for r in rows] == scan.labels_.tolist()
    assert [int(r['index']) for r in rows] == list(range(96))
    np.testing.assert_allclose([float(r['confidence']) for r in rows], scan.predict_proba(data).max(1),
                               atol=1e-6)
    np.testing.assert_array_equal(np.load(folder/'embeddings.npy'), scan.embeddings_)
    np.testing.assert_array_equal(np.load(folder/'neighbors.npz')['neighbors'], scan.neighbors_)
    lines = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    assert lines == [dict(stage=k, **row) for k, rows in scan.history_.items() for row in rows]

def test_metrics(whole, data):
    metrics = json.loads((whole[1]/'metrics.json').read_text())
    expected = cluster_metrics(whole[0].labels_, data.labels)
    final = metrics['splits']['all']
    assert {k: final[k] for k in expected} == expected
    assert {k: metrics[k] for k in ('acc', 'nmi', 'ari', 'n_clusters')} == {
        k: expected[k] for k in ('acc', 'nmi', 'ari', 'n_clusters')}
    assert metrics['seconds'] > 0 and metrics['classes'] == data.classes and metrics['skipped'] == []
    assert final == metrics['stages']['selflabel']['splits']['all'] and sum(final['sizes']) == 96
    pixels = cluster_metrics(kmeans_baseline(data.images, 3, seed=0), data.labels)
    assert metrics['baselines']['kmeans_pixels']['all']['acc'] == pixels['acc']
    features = kmeans_baseline(torch.from_numpy(whole[0].embeddings_), 3, seed=0, normalize=True)
    nmi = cluster_metrics(features, data.labels)['nmi']
    assert metrics['baselines']['kmeans_features']['all']['nmi'] == nmi

def test_recipe_says_all_that_was_done(whole):
    recipe = yaml.safe_load((whole[1]/'recipe.yml').read_text())
    unused = {name for name, value in recipe['settings'].items() if value is None}
    assert unused == {'prior', 'second_views'}   # classes of equal size, one network
    assert recipe['settings']['stem_stride'] == 1 and recipe['settings']['device'] == 'cpu'
    assert recipe['data']['images'] == 96 and recipe['data']['shape'] == [1, 8, 8]
    assert not {'out', 'progress'} & recipe['settings'].keys()

def test_predict_is_the_same_for_any_container(whole, data):
    scan, x = whole[0], data.images
    for source in (data, x, x[:, 0], x.numpy(), x.permute(0, 2, 3, 1).numpy(), x.float()/255):
        np.testing.assert_array_equal(scan.predict(source), scan.labels_)
    p = scan.predict_proba(x[:5])
    assert p.shape == (5, 3) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert scan.transform(x[:1]).shape == (1, 16)

def test_score(whole, data):
    scan = whole[0]
    assert scan.score(data) == cluster_metrics(scan.labels_, data.labels)['acc']
    for labels in (data.labels, data.labels.numpy()):
        assert scan.score(data.images, labels) == scan.score(data)
    with pytest.raises(UserError, match='no labels'): scan.score(data.images)

# -- the same again --

def test_two_runs_are_equal(whole, data, tmp_path):
    SCAN(**TINY, out=tmp_path/'b').fit(data)
    assert content(tmp_path/'b') == content(whole[1])

def test_without_a_folder_nothing_is_written(whole, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(SCAN(**TINY).fit_predict(data), whole[0].labels_)
    assert not list(tmp_path.iterdir())

def test_labels_change_nothing_but_the_scores(whole, data, tmp_path):
    blind = SCAN(**TINY, out=tmp_path/'blind').fit(data.images)
    shuffled = SCAN(**TINY).fit(data.images, labels=data.labels.flip(0))
    for scan in (blind, shuffled): np.testing.assert_array_equal(scan.labels_, whole[0].labels_)
    assert (tmp_path/'blind/model.safetensors').read_bytes() == (whole[1]/'model.safetensors').read_bytes()
    text = (tmp_path/'blind/metrics.json').read_text() + (tmp_path/'blind/metrics.jsonl').read_text()
    assert not [k for k in ('acc"', 'nmi', 'ari"', 'purity', 'recall', 'kmeans', 'classes') if k in text]
    assert shuffled.metrics_['acc'] != whole[0].metrics_['acc']

def test_seed_matters(whole, data):
    other = SCAN(**TINY, seed=1).fit(data)
    assert not np.array_equal(other.embeddings_, whole[0].embeddings_)

def test_global_random_numbers_are_left_alone(data):
    torch.manual_seed(3); np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    SCAN(**TINY).fit(data)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

def test_held_out_images(data, tmp_path):
    scan = SCAN(**TINY, out=tmp_path/'run').fit(data[:64], test=data[64:])
    metrics = scan.metrics_
    assert list(metrics['splits']) == ['train', 'test'] and metrics['split'] == 'test'
    assert metrics['acc'] == scan.score(data[64:]) == metrics['splits']['test']['acc']
    assert metrics['splits']['train']['n_images'] == 64 and len(scan.labels_) == 64
    rows = list(csv.DictReader(io.StringIO((tmp_path/'run/clusters-test.csv').read_text())))
    assert [int(r['cluster']) for r in rows] == scan.predict(data[64:]).tolist()
    alone = SCAN(**TINY).fit(data[:64])
    np.testing.assert_array_equal(alone.labels_, scan.labels_)

def test_steps_can_be_left_out(data):
    scan = SCAN(**TINY | dict(scan_epochs=0, selflabel_epochs=0)).fit(data)
    assert list(scan.stages_) == ['pretext', 'neighbors', 'heads', 'compare']
    assert scan.metrics_['acc'] == scan.stages_['heads']['splits']['all']['acc']

# -- killed and continued --

class Killed(BaseException): pass

def killing(monkeypatch, at, after):
    "Die at the at-th checkpoint that is written, before or after it is on disk; the count goes on over runs."
    save, written = Checkpoint.save, []
    def deadly(self, **state):
        if len(written) + 1 == at and not after: written.append(0); raise Killed
        save(self, **state)
        written.append(0)
        if len(written) == at and after: raise Killed
    monkeypatch.setattr(Checkpoint, 'save', deadly)
    return written

@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('at', range(1, 13))
def test_killed_anywhere_continues_to_the_bit(whole, data, tmp_path, monkeypatch, at, after):
    killing(monkeypatch, at, after)
    with pytest.raises(Killed): SCAN(**TINY, out=tmp_path/'run').fit(data)
    scan = SCAN(**TINY, out=tmp_path/'run').fit(data)
    assert content(tmp_path/'run') == content(whole[1])
    epochs = lambda scan: {k: v['epochs'] for k, v in scan.stages_.items()}
    assert epochs(scan) == epochs(whole[0])
    assert not list((tmp_path/'run').rglob('*running*'))

def test_there_are_twelve_checkpoints(data, tmp_path, monkeypatch):
    "Epochs of pretext, scan, selflabel, and six finished stages: the test above kills at each of them."
    written = killing(monkeypatch, 99, True)
    SCAN(**TINY, out=tmp_path/'run').fit(data)
    assert len(written) == 2 + 2 + 2 + 6

def test_a_real_kill(whole, tmp_path):
    program = textwrap.dedent(f'''
        import os, signal, torch
        torch.set_num_threads(1)
        from scan_nb import pipeline
        from scan_nb.data import digits
        save = pipeline.RunningCheckpoint.save
        def deadly(self, **state):
            save(self, **state)
            if self.stage == 'scan': os.kill(os.getpid(), signal.SIGKILL)
        pipeline.RunningCheckpoint.save = deadly
        pipeline.SCAN(**{TINY!r}, out={str(tmp_path/'run')!r}).fit(digits()[:96])''')
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    assert subprocess.run([sys.executable, '-c', program], env=env).returncode == -signal.SIGKILL
    assert (tmp_path/'run/checkpoints/scan-running.pt').exists()
    SCAN(**TINY, out=tmp_path/'run').fit(digits()[:96])
    assert content(tmp_path/'run') == content(whole[1])

def test_a_finished_stage_is_not_repeated(whole, data, monkeypatch):
    def never(*a, **k): raise AssertionError('trained again')
    for name in ('train_simclr', 'train_heads', 'train_scan', 'train_selflabel', 'mine_neighbors',
                 'kmeans_baseline'):
        monkeypatch.setattr(pipeline, name, never)
    before = content(whole[1])
    again = SCAN(**TINY, out=whole[1]).fit(data)
    assert content(whole[1]) == before
    np.testing.assert_array_equal(again.neighbors_, whole[0].neighbors_)
    assert again.metrics_ == whole[0].metrics_

def test_time_before_a_kill_counts(data, tmp_path, monkeypatch):
    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(pipeline.time, 'monotonic', lambda: next(clock))
    killing(monkeypatch, 2, True)
    with pytest.raises(Killed): SCAN(**TINY, out=tmp_path/'run').fit(data)
    spent = torch.load(tmp_path/'run/checkpoints/pretext-running.pt')['seconds']
    scan = SCAN(**TINY, out=tmp_path/'run').fit(data)
    assert scan.stages_['pretext']['seconds'] > spent > 0

# -- damage --

@pytest.fixture
def copy(whole, tmp_path):
    import shutil
    shutil.copytree(whole[1], tmp_path/'run')
    return tmp_path/'run'

@pytest.mark.parametrize('name', ['pretext', 'neighbors', 'heads', 'scan', 'selflabel', 'compare'])
@pytest.mark.parametrize('how', ['cut', 'empty', 'garbage'])
def test_damaged_checkpoint_is_named(copy, data, name, how):
    file = copy/'checkpoints'/f'{name}.pt'
    file.write_bytes({'cut': file.read_bytes()[:-100], 'empty': b'', 'garbage': b'x'*1000}[how])
    before = listing(copy)
    with pytest.raises(UserError, match=f'{name}.pt'): SCAN(**TINY, out=copy).fit(data)
    assert {p: v for p, v in listing(copy).items() if p.name != 'metrics.jsonl'} == {
        p: v for p, v in before.items() if p.name != 'metrics.jsonl'}
    file.unlink()
    assert (SCAN(**TINY, out=copy).fit(data).labels_ == SCAN.load(copy).predict(data)).all()

@pytest.mark.parametrize('name', ['embeddings.npy', 'neighbors.npz'])
@pytest.mark.parametrize('how', ['cut', 'missing'])
def test_damaged_arrays_are_named(copy, data, name, how):
    raw = (copy/name).read_bytes()
    (copy/name).unlink() if how == 'missing' else (copy/name).write_bytes(raw[:len(raw)//2])
    with pytest.raises(UserError, match=name): SCAN(**TINY, out=copy).fit(data)
    (copy/'checkpoints/neighbors.pt').unlink()
    SCAN(**TINY, out=copy).fit(data)
    assert (copy/name).read_bytes() == raw

@pytest.mark.parametrize('text', ['', '[1, 2]', 'settings: 3', '{', 'settings: {n_clusters: 3}', '\udcff'])
def test_damaged_recipe_is_named(copy, data, text):
    (copy/'recipe.yml').write_bytes(text.encode(errors='surrogateescape'))
    for use in (lambda: SCAN(**TINY, out=copy).fit(data), lambda: SCAN.load(copy)):
        with pytest.raises(UserError, match='recipe.yml'): use()

def test_checkpoint_of_another_kind_is_named(copy, data):
    Checkpoint(copy/'checkpoints/heads.pt').save(something=1)
    with pytest.raises(UserError, match='heads.pt'): SCAN(**TINY, out=copy).fit(data)

def test_damaged_model_is_named(copy):
    raw = (copy/'model.safetensors').read_bytes()
    for bad in (raw[:-10], b'', b'x'*100):
        (copy/'model.safetensors').write_bytes(bad)
        with pytest.raises(UserError, match='model.safetensors'): SCAN.load(copy)
    (copy/'model.safetensors').unlink()
    with pytest.raises(UserError, match='finish the run'): SCAN.load(copy)

# -- folders of others --

@pytest.mark.parametrize('change,said', [
    (dict(seed=1), 'seed: 0 → 1'), (dict(n_clusters=4), 'n_clusters: 3 → 4'), (dict(scan_lr=.5), 'scan_lr'),
    (dict(views=dict(flip_p=0.)), r'views.flip_p: None → 0.0'), (dict(widths=(8, 32)), 'widths'),
    (dict(pretext_epochs=3), 'pretext_epochs: 2 → 3')])
def test_another_recipe_is_refused(whole, data, change, said):
    before = listing(whole[1])
    with pytest.raises(UserError, match=said): SCAN(**TINY | change, out=whole[1]).fit(data)
    assert listing(whole[1]) == before

def test_other_images_are_refused(whole, data):
    changed = data.images.clone()
    changed[3, 0, 4, 4] ^= 1
    with pytest.raises(UserError, match='data.sha256'): SCAN(**TINY, out=whole[1]).fit(changed)
    with pytest.raises(UserError, match='data.images: 96 → 95'): SCAN(**TINY, out=whole[1]).fit(data[:95])
    with pytest.raises(UserError, match='data.test'): SCAN(**TINY, out=whole[1]).fit(data, test=data[:9])

def test_equal_settings_in_other_words_are_not_refused(whole, data):
    same = TINY | dict(widths=[np.int64(8), 16], seed=np.int32(0), stem_stride=1, views={}, progress=False)
    SCAN(**same, out=str(whole[1])).fit(data)

def test_folder_with_other_things_is_refused(data, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='not empty'): SCAN(**TINY, out=tmp_path).fit(data)
    with pytest.raises(UserError, match='is a file'): SCAN(**TINY, out=tmp_path/'notes.txt').fit(data)
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']

def test_an_empty_folder_is_fine(data, tmp_path):
    (tmp_path/'new').mkdir()
    SCAN(**TINY | dict(scan_epochs=0, selflabel_epochs=0), out=tmp_path/'new').fit(data)

# -- wrong input --

@pytest.mark.parametrize('change,said', [
    (dict(n_clusters=1), 'n_clusters is 1'), (dict(n_clusters=0), 'n_clusters'),
    (dict(n_clusters=97), '97 clusters'),
    (dict(n_clusters=2.5), 'whole number'), (dict(n_clusters=None), 'n_clusters is None'),
    (dict(n_clusters=True), 'n_clusters'), (dict(n_clusters='ten'), "'ten'"),
    (dict(n_neighbors=96), '96 neighbors'), (dict(n_neighbors=0), 'n_neighbors'), (dict(seed=-1), 'seed'),
    (dict(pretext_epochs=0), 'pretext_epochs'), (dict(scan_epochs=-1), 'scan_epochs'),
    (dict(temperature=0), 'temperature'), (dict(pretext_lr=float('nan')), 'pretext_lr'),
    (dict(scan_lr=float('inf')), 'scan_lr'), (dict(pretext_batch=1), 'pretext_batch'),
    (dict(backbone='resnet9000'), 'resnet9000'), (dict(widths=[]), 'widths'), (dict(widths=[8, 0]), 'widths'),
    (dict(widths='wide'), 'widths'), (dict(views=3), 'views'),
    (dict(views=dict(flip=0)), "no setting 'flip'"),
    (dict(strong=dict(opz=1)), "no setting 'opz'"), (dict(views=dict(flip_p=2)), 'flip_p'),
    (dict(device='tpu'), 'tpu'), (dict(device='cuda:99'), 'cuda:99'), (dict(size=4), '4×4'),
    (dict(threshold=1.), 'threshold'), (dict(selflabel_lr=-1), 'selflabel_lr'),
    (dict(precision='fp16'), "precision is 'fp16'"), (dict(compile='yes'), "compile is 'yes'")])
def test_wrong_settings(data, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as e: SCAN(**TINY | change, out=tmp_path/'run').fit(data)
    assert '\n' not in str(e.value)
    assert not (tmp_path/'run').exists()

def damaged(kind):
    x = np.random.default_rng(0).random((96, 8, 8)).astype(np.float32)
    if kind == 'nan': x[7, 2, 2] = np.nan
    if kind == 'infinite': x[7, 2, 2] = np.inf
    if kind == 'range': x *= 255
    return {'int64': np.zeros((9, 8, 8), np.int64), 'flat': x[0, 0], 'text': np.array(['a']), 'bool': x > .5,
            'five channels': np.zeros((9, 5, 8, 8), np.uint8), 'none': np.zeros((0, 8, 8), np.uint8),
            'object': object(), 'list': [1, 2]}.get(kind, x)

@pytest.mark.parametrize('kind,said', [
    ('nan', 'Image 7'), ('infinite', 'Image 7'), ('range', r'\[0, 1\]'), ('int64', 'int64'),
    ('flat', 'shape'), ('text', 'type'), ('bool', 'bool'), ('five channels', '9×5×8×8'),
    ('none', 'no image'), ('object', 'object'),
    ('list', 'list')])
def test_wrong_arrays(tmp_path, kind, said):
    with pytest.raises(UserError, match=said): SCAN(**TINY, out=tmp_path/'run').fit(damaged(kind))
    assert not (tmp_path/'run').exists()

def test_one_image(data):
    with pytest.raises(UserError, match='only one image'): SCAN(**TINY).fit(data[:1])

def test_wrong_labels(data):
    for labels in (data.labels[:5], data.labels - 2, data.labels + .5, data.labels[None]):
        with pytest.raises(UserError): SCAN(**TINY).fit(data, labels=labels)

def test_wrong_images_for_a_fitted_model(whole, data):
    for x in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 9, 9, dtype=torch.uint8)):
        with pytest.raises(UserError, match='1×8×8'): whole[0].predict(x)
    with pytest.raises(UserError, match='1×8×8'): SCAN(**TINY).fit(data, test=torch.zeros(2, 9, 9).byte())

def test_not_fitted(data, tmp_path):
    for use in ('predict', 'predict_proba', 'transform', 'score'):
        with pytest.raises(UserError, match='not fitted'): getattr(SCAN(), use)(data)
    with pytest.raises(UserError, match='not fitted'): SCAN().save(tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_smallest_sets(data):
    for n in (2, 4, 5):
        scan = SCAN(**TINY | dict(n_clusters=2, n_neighbors=1)).fit(data[:n])
        assert scan.labels_.shape == (n,)

def test_as_many_clusters_as_images(data):
    assert len(SCAN(**TINY | dict(n_clusters=8, n_neighbors=2)).fit(data[:8]).labels_) == 8

def test_constant_images():
    scan = SCAN(**TINY).fit(torch.full((20, 1, 8, 8), 7, dtype=torch.uint8))
    assert np.isfinite(scan.predict_proba(torch.zeros(1, 8, 8).byte())).all()

def test_oblong_and_color_images():
    x = torch.randint(256, (24, 3, 10, 14), generator=torch.Generator().manual_seed(0)).byte()
    scan = SCAN(**TINY).fit(x)
    assert scan.predict(x.permute(0, 2, 3, 1).numpy()).shape == (24,)

# -- folders of images --

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Files of several modes and sizes at several depths, two of them unreadable."
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(40):
        side, mode = (12, 'L') if i % 3 else (17, 'RGB')
        x = rng.integers(0, 256, (side, side + i % 2, 3)).astype(np.uint8)
        (folder/f'd{i % 4}').mkdir(exist_ok=True)
        Image.fromarray(x).convert(mode).save(folder/f'd{i % 4}'/f'{i:02}.png')
    (folder/'empty.png').write_bytes(b'')
    (folder/'d0'/'cut.jpg').write_bytes(b'\xff\xd8\xff\xe0 not much of a picture')
    return folder

def test_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    scan = SCAN(**TINY, size=8, out=tmp_path/'run').fit(str(pictures))
    rows = list(csv.DictReader(io.StringIO((tmp_path/'run/clusters.csv').read_text())))
    assert len(rows) == 40 and (pictures/rows[0]['path']).exists()
    assert sorted(p for p, _ in scan.metrics_['skipped']) == ['d0/cut.jpg', 'empty.png']
    assert '2 files could not be read' in scan.metrics_['notes'][-1]
    np.testing.assert_array_equal(scan.predict(pictures), scan.labels_)
    np.testing.assert_array_equal(SCAN.load(tmp_path/'run').predict(str(pictures)), scan.labels_)
    assert 'empty.png' in write_report(tmp_path/'run').read_text()

def test_wrong_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    (tmp_path/'empty').mkdir(); (tmp_path/'bad').mkdir(); (tmp_path/'one').mkdir()
    (tmp_path/'bad/zero.png').write_bytes(b'')
    Image.new('L', (8, 8)).save(tmp_path/'one/a.png')
    for name, said in (('empty', 'no image'), ('missing', 'no folder'), ('bad', 'zero.png'),
                       ('one', 'one image')):
        with pytest.raises(UserError, match=said): SCAN(**TINY, out=tmp_path/'run').fit(tmp_path/name)
    assert not (tmp_path/'run').exists()

# -- save and load --

def test_save_and_load(whole, data, tmp_path):
    whole[0].save(tmp_path/'m')
    loaded = SCAN.load(tmp_path/'m')
    np.testing.assert_array_equal(loaded.predict_proba(data), whole[0].predict_proba(data))
    assert loaded.n_clusters == 3 and loaded.widths == [8, 16] and loaded.out is None
    whole[0].save(tmp_path/'m'); loaded.save(tmp_path/'n')
    assert (tmp_path/'n/model.safetensors').read_bytes() == (whole[1]/'model.safetensors').read_bytes()

def test_save_refuses_other_folders(whole, tmp_path):
    (tmp_path/'x').write_text('')
    with pytest.raises(UserError, match='not empty'): whole[0].save(tmp_path)
    with pytest.raises(UserError, match='not a run folder'): SCAN.load(tmp_path)
    with pytest.raises(UserError, match='not a run folder'): SCAN.load(tmp_path/'missing')

def test_a_model_is_data_not_code(whole):
    "Checkpoints load without pickle's dangers; the model is safetensors."
    for file in (whole[1]/'checkpoints').iterdir(): torch.load(file, weights_only=True)

# -- scikit-learn's conventions --

def test_clone_has_settings_but_nothing_learned(whole):
    copy = clone(whole[0])
    assert copy.get_params() == whole[0].get_params() and not hasattr(copy, 'model_')

def test_params():
    scan = SCAN(7, seed=3)
    assert scan.n_clusters == 7 and SCAN().get_params()['seed'] == 0
    assert scan.set_params(n_heads=5, views=dict(flip_p=0)) is scan and scan.n_heads == 5
    with pytest.raises(UserError, match='n_cluster'): scan.set_params(n_cluster=3)
    assert repr(SCAN(7, seed=3)) == 'SCAN(seed=3, n_clusters=7)'
    assert eval(repr(scan)).get_params() == scan.get_params()

def test_in_a_pipeline_of_scikit_learn(data):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    steps = make_pipeline(FunctionTransformer(lambda x: x[:, 0]), SCAN(**TINY))
    assert steps.fit(data.images.numpy()).predict(data.images.numpy()).shape == (96,)

def test_no_training_function_takes_labels():
    for name in ('train_simclr', 'train_heads', 'train_scan', 'train_selflabel', 'mine_neighbors'):
        assert not {'labels', 'y', 'targets'} & inspect.signature(getattr(pipeline, name)).parameters.keys()

def test_presets_are_known_settings():
    for preset in PRESETS.values():
        settings = SCAN(**preset).get_params()
        pipeline.check_settings(pipeline._plain(settings))
        for name in ('views', 'second_views'): make_views(SimCLRAugment, 28, preset.get(name) or {})
    assert {'digits', 'fashion-mnist', 'folder'} <= PRESETS.keys()

def test_head_choice_decides(data):
    kept = {}
    for choice in ('loss', 'agreement'):
        settings = TINY | dict(n_heads=6, scan_epochs=0, selflabel_epochs=0, head_choice=choice)
        found = SCAN(**settings).fit(data)
        kept[choice] = found.stages_['heads']['reason']
    z, near = torch.from_numpy(found.embeddings_), torch.from_numpy(found.neighbors_)
    s = found.recipe_['settings']
    heads = pipeline.train_heads(z, near, s['n_clusters'], n_heads=6, epochs=s['heads_epochs'],
                                 entropy_weight=s['entropy_weight'], seed=s['seed'])
    assert kept['loss'].startswith(f'head {heads.losses.argmin()} of')
    assert kept['agreement'].startswith(f'head {heads.agreement.argmax()} of')
    with pytest.raises(UserError, match="head_choice is 'luck': give loss or agreement or both"):
        SCAN(head_choice='luck').fit(data)

def test_two_networks_learn_alone_and_join_their_features(data, tmp_path):
    other = dict(tint_p=.9, jitter_p=.2)
    one, two = (SCAN(**TINY, views=views).fit(data).embeddings_ for views in (None, other))
    settings = TINY | dict(second_views=other, out=tmp_path/'run')
    both = SCAN(**settings).fit(data)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(both.embeddings_, np.concatenate([unit(one), unit(two)], 1), rtol=0, atol=1e-6)
    assert {k: len(v) for k, v in both.history_.items() if v} == dict(
        pretext=2, pretext2=2, heads=3, scan=2, selflabel=2)
    assert (tmp_path/'run'/'checkpoints'/'pretext2.pt').exists()
    loaded = SCAN.load(tmp_path/'run')
    np.testing.assert_array_equal(loaded.predict(data.images), both.predict(data.images))
    continued = SCAN(**settings).fit(data)
    np.testing.assert_array_equal(continued.labels_, both.labels_)

@pytest.mark.parametrize('views, words', [([], 'second_views is'), (dict(tint=1), "no setting 'tint'")])
def test_second_views_are_checked(data, views, words):
    with pytest.raises(UserError, match=words): SCAN(**TINY, second_views=views).fit(data)

@pytest.mark.parametrize('change', [
    dict(pretext='moco'), dict(index='ivf'), dict(scan_epochs=0), dict(second_views={})])
def test_the_estimate(data, change):
    settings = pipeline._plain(SCAN(**TINY | change).get_params())
    job, _ = pipeline._begin(settings, {'all': data}, torch.device('cpu'))
    state = torch.get_rng_state()
    before = data.images.clone()
    seconds = pipeline.estimate_seconds(job)
    assert seconds.keys() == {'pretext', 'neighbors', 'heads', 'scan', 'selflabel'}
    assert all(v > 0 for k, v in seconds.items() if k != 'scan') and min(seconds.values()) >= 0
    assert (seconds['scan'] == 0) == (job.settings['scan_epochs'] == 0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data.images, before)

# -- pieces --

@given(st.sampled_from(['pretext', 'scan', 'selflabel']), st.integers(2, 10**7), st.integers(2, 10**7),
       st.integers(1, 4096), st.sampled_from(['cpu', 'cuda', 'mps']))
def test_auto_epochs(stage, a, b, batch, device):
    few, many = sorted((a, b))
    low, high = EPOCHS['cpu' if device == 'cpu' else 'gpu'][stage]
    more, less = (auto_epochs(stage, n, batch, device) for n in (few, many))
    assert low <= less <= high and low <= more <= high
    if few >= batch: assert less <= more

plain = st.recursive(st.none() | st.integers() | st.text(max_size=3),
                     lambda v: st.dictionaries(st.text(max_size=3), v, max_size=3))

@given(st.dictionaries(st.text(max_size=3), plain, max_size=3),
       st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_differences_are_found(a, b):
    assert list_differences(a, a) == []
    if all(isinstance(v, int) for v in (*a.values(), *b.values())):
        assert bool(list_differences(a, b)) == (a != b)

@hypothesis_settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\r\0'), min_size=1),
                min_size=1, max_size=6))
def test_clusters_survive_strange_file_names(paths):
    images = ImageSet(torch.zeros(len(paths), 1, 2, 2).byte(), paths=paths)
    text = write_clusters(images, torch.eye(3)[torch.arange(len(paths)) % 3])
    rows = list(csv.reader(io.StringIO(text, newline='')))[1:]
    assert [r[0] for r in rows] == paths and [int(r[2]) for r in rows] == [i % 3 for i in range(len(paths))]

def test_open_run_is_idempotent(tmp_path):
    recipe = dict(scan_nb='1', settings=dict(n_clusters=3, views={}), data=dict(shape=[1, 8, 8]))
    for r in (recipe, recipe, recipe | dict(scan_nb='2')):
        assert open_run(tmp_path/'a/b', r) == tmp_path/'a/b'
    assert read_recipe(tmp_path/'a/b') == recipe

def test_resolve_leaves_explicit_numbers():
    given = SCAN(pretext_epochs=7, stem_stride=2, widths=[5]).get_params()
    out = resolve(given, 1000, 96, torch.device('cpu'))
    assert out['pretext_epochs'] == 7 and out['stem_stride'] == 2 and out['widths'] == [5]
    assert resolve(SCAN().get_params(), 1000, 8, torch.device('cpu'))['stem_stride'] == 1

# -- switches --

SWITCHES = [dict(pretext='moco'), dict(mutual=True), dict(whiten=.5), dict(n_views=2), dict(prior='estimate'),
            dict(prior=[.5, .3, .2]), dict(remine_every=1), dict(soft_targets=True), dict(ema_decay=None),
            dict(backbone='resnet18')]

@pytest.fixture(scope='module')
def plain(data): return SCAN(**TINY, threshold=.4).fit(data)

@pytest.mark.parametrize('switch', SWITCHES, ids=lambda s: '-'.join(f'{k}={v}' for k, v in s.items()))
def test_each_switch_reaches_the_result(switch, plain, data):
    "A run with the switch ends, goes another way than the one without, and tells its recipe."
    scan = SCAN(**TINY | switch, threshold=.4).fit(data)
    assert scan.history_ != plain.history_
    assert {k: scan.recipe_['settings'][k] for k in switch} == switch

def test_the_index_reaches_the_mining(data, plain, monkeypatch):
    used, mine = [], pipeline.mine_neighbors
    def watch(z, k, index, *rest):
        used.append(index)
        return mine(z, k, index, *rest)
    monkeypatch.setattr(pipeline, 'mine_neighbors', watch)
    scan = SCAN(**TINY, threshold=.4, index='hnsw').fit(data)
    assert used == ['hnsw'] and scan.recipe_['settings']['index'] == 'hnsw'
    assert (scan.neighbors_ == plain.neighbors_).mean() > .9

def test_a_time_window_needs_times(data):
    with pytest.raises(UserError, match='time'): SCAN(**TINY, time_window=60.).fit(data)
    timed = replace(data, times=torch.arange(96).double()*60)
    near = torch.from_numpy(SCAN(**TINY, time_window=150.).fit(timed).neighbors_)
    assert ((timed.times[near] - timed.times[:, None]).abs() > 150).all()

@pytest.mark.parametrize('wrong, word', [
    (dict(pretext='byol'), 'simclr'), (dict(backbone='resnet19'), 'resnet18'),
    (dict(prior=[.5, .5]), 'prior'), (dict(index='flat'), 'index'),
    (dict(n_views=-1), 'n_views'), (dict(time_window=-1.), 'time_window'), (dict(ema_decay=1.), 'ema_decay'),
    (dict(whiten=1.5), 'whiten'), (dict(whiten=-.1), 'whiten')])
def test_a_wrong_switch_is_named(wrong, word, data):
    with pytest.raises(UserError, match=word): SCAN(**TINY | wrong).fit(data)

def test_a_run_from_before_a_setting_existed_goes_on(whole, data, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(whole[1], folder)
    recipe = yaml.safe_load((folder/'recipe.yml').read_text())
    for name in ('pretext', 'mutual', 'prior'): del recipe['settings'][name]
    (folder/'recipe.yml').write_text(yaml.safe_dump(recipe))
    assert (SCAN(**TINY, out=folder).fit(data).labels_ == whole[0].labels_).all()
    with pytest.raises(UserError, match='mutual: False → True'):
        SCAN(**TINY, out=folder, mutual=True).fit(data)

def test_unlabeled_images_among_labeled_ones(data):
    partly = replace(data, labels=data.labels.clone().index_fill_(0, torch.arange(0, 96, 2), -1))
    metrics = SCAN(**TINY).fit(partly).metrics_
    assert 0 < metrics['acc'] <= 1

# -- on CUDA --

def test_precision_and_compile_reach_every_network(data, monkeypatch, tmp_path):
    asked = []
    def tune(model, *how):
        asked.append((type(model).__name__, *how))
        return model
    monkeypatch.setattr(pipeline, 'tune', tune)
    SCAN(**TINY | dict(scan_epochs=0, selflabel_epochs=0), precision='float32', compile=True,
         out=tmp_path/'run').fit(data)
    SCAN.load(tmp_path/'run')
    assert asked == [('ContrastiveModel', 'float32', True), ('ClusteringModel', 'float32', True),
                     ('ClusteringModel', 'float32')]
