"The estimator: equal runs, any kill survived, labels only grade, scikit-learn's ways, wrong input refused."
import csv, inspect, io, json, os, pathlib, shutil, signal
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, sklearn.exceptions, torch
from PIL import Image
from sklearn.base import clone, is_clusterer
from test_stages import (HOMES, OTHER, TINY, Killed, content, die_at_every_write, listing, never, plain,
                         three_digits, until_done)
from shell import forked
from torch.nn import functional as F
from scan_nb import moco, recipes, report, run_folder, selflabel, simclr, stages, training
from scan_nb import scan as scan_lesson, whole_network
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.evaluate import cluster_metrics, kmeans_baseline
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import PRESETS, load_stages, to_yaml
from scan_nb.recipes import FOLDER, Recipe
from scan_nb.report import read_metrics, summarize, write_report
from scan_nb.run_folder import read_run
from scan_nb.stages import run_pretext, run_scan
from scan_nb.training import Checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module', autouse=True)
def _plain_map():
    "The map is no matter here."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, 'embed_2d', lambda z, seed: z[:, :2].clone())
        yield

@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    "Seconds saved for each run; `whole` is made before, with a page."
    monkeypatch.setattr(report, 'write_report', lambda folder: None)

@pytest.fixture(scope='module')
def data(): return three_digits()

def tiny(out=None, /, recipe=TINY, **options): return SCAN(recipe=recipe, device='cpu', out=out, **options)

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "One run from beginning to end: the estimator and its folder."
    folder = tmp_path_factory.mktemp('whole')/'run'
    return tiny(folder).fit(data), folder

@pytest.fixture(scope='module')
def blind(data): return tiny().fit(data.images)

@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path/'run')
    return tmp_path/'run'

TOP = 'recipe.yml', 'model.safetensors', 'clusters.csv', 'metrics.json', 'examples.npz'

def assert_same(a, b): # two fitted estimators
    for name in ('labels_', 'embeddings_', 'neighbors_'):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))

def rows_of(file): return list(csv.DictReader(io.StringIO(file.read_text())))

def results(folder): # what a run leaves; pages and pictures are made of it
    return {k: v for k, v in content(folder).items() if not k.startswith(('figures/', 'report.html'))}

# -- results --

def test_attributes(whole, data):
    scan, _ = whole
    assert scan.labels_.shape == (90,) and scan.labels_.dtype == np.int64 and {*scan.labels_} <= {0, 1, 2}
    assert scan.embeddings_.shape == (90, 16) and scan.neighbors_.shape == (90, 3)
    assert {k: len(v) for k, v in scan.history_.items() if v} == dict(pretext=2, heads=1, scan=2, selflabel=2)
    assert list(scan.stages_) == ['pretext', 'neighbors', 'heads', 'scan', 'selflabel']
    assert scan.recipe_ == Recipe.for_images(data, base=TINY)

def test_the_folder_holds_everything(whole):
    names = {f.relative_to(whole[1]).as_posix() for f in whole[1].rglob('*') if f.is_file()}
    assert names >= {*TOP, 'report.html', 'figures/map.png', 'selflabel/compare.pth.tar',
                     *(f'{home}/model.pth.tar' for home in HOMES)}
    assert [name for name in names if '/.' in f'/{name}'] == ['.lock']

def test_files_agree_with_attributes(whole, data):
    scan, folder = whole
    rows = rows_of(folder/'clusters.csv')
    assert list(rows[0]) == ['path', 'index', 'cluster', 'confidence', 'name']
    assert [int(r['cluster']) for r in rows] == scan.labels_.tolist()
    assert [int(r['index']) for r in rows] == list(range(90)) and {r['path'] for r in rows} == {''}
    assert [r['name'] for r in rows] == [scan.metrics_['names'][k] for k in scan.labels_]
    sure = scan.predict_proba(data).max(1)
    np.testing.assert_allclose([float(r['confidence']) for r in rows], sure, atol=1e-6)
    pretext = folder/'pretext/simclr'
    np.testing.assert_array_equal(np.load(pretext/'embeddings.npy'), scan.embeddings_)
    np.testing.assert_array_equal(np.load(pretext/'topk-train-neighbors.npy'), scan.neighbors_)
    lines = ''.join((folder/home/'metrics.jsonl').read_text() for home in HOMES).splitlines()
    assert [json.loads(line) for line in lines] == [
        dict(stage=k, **row) for k, rows in scan.history_.items() for row in rows]
    assert read_metrics(folder) == scan.metrics_
    assert load_stages(folder/'recipe.yml') == scan.recipe_.stages

def test_metrics(whole, data):
    scan, metrics = whole[0], whole[0].metrics_
    expected, final = cluster_metrics(scan.labels_, data.labels), metrics['splits']['all']
    for scores in (final, scan.scores(data)): assert {k: scores[k] for k in expected} == expected
    for k in ('acc', 'nmi', 'ari', 'n_clusters'): assert metrics[k] == expected[k]
    assert metrics['seconds'] > 0 and metrics['classes'] == data.classes and metrics['skipped'] == []
    assert final == metrics['stages']['selflabel']['splits']['all'] and sum(final['sizes']) == 90
    assert metrics['images'] == dict(all=90) and metrics['device'] == 'cpu'
    assert metrics['fitted_on'] == metrics['split'] == 'all'
    pixels = cluster_metrics(kmeans_baseline(data.images, 3, seed=3), data.labels)
    assert metrics['baselines']['kmeans_pixels']['all']['acc'] == pixels['acc']
    features = kmeans_baseline(torch.from_numpy(scan.embeddings_), 3, seed=3, normalize=True)
    nmi = cluster_metrics(features, data.labels)['nmi']
    assert metrics['baselines']['kmeans_features']['all']['nmi'] == nmi

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
    for labels in (data.labels, data.labels.numpy(), data.labels.tolist()):
        assert scan.score(data.images, labels) == scan.score(data)
    for labels in (None, torch.full((90,), -1)):
        with pytest.raises(UserError, match='no labels'): scan.score(data.images, labels)

# -- the same again --

def test_two_runs_are_equal(whole, data, tmp_path):
    tiny(tmp_path/'b').fit(data)
    assert results(tmp_path/'b') == results(whole[1])

def test_without_a_folder_nothing_is_written(whole, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan = tiny()
    np.testing.assert_array_equal(scan.fit_predict(data), whole[0].labels_)
    assert plain(scan.metrics_) == plain(whole[0].metrics_) and not list(tmp_path.iterdir())

def test_labels_change_nothing_but_the_scores(whole, blind, data, tmp_path):
    shuffled = tiny(tmp_path/'run').fit(data.images, labels=data.labels.roll(7))
    for scan in (blind, shuffled):
        assert plain(scan.model_.state_dict()) == plain(whole[0].model_.state_dict())
        assert_same(scan, whole[0])
    assert not [k for k in ('acc"', 'nmi', 'ari"', 'accuracy', 'purity', 'recall', 'kmeans', 'classes')
                if k in json.dumps(blind.metrics_)]
    assert shuffled.metrics_['acc'] != whole[0].metrics_['acc']
    assert (tmp_path/'run/model.safetensors').read_bytes() == (whole[1]/'model.safetensors').read_bytes()

def test_labels_that_are_all_unknown_are_none(blind, data):
    unknown = tiny().fit(data.images, labels=torch.full((90,), -1))
    assert plain(unknown.metrics_) == plain(blind.metrics_)

def test_unlabeled_images_among_labeled_ones(data):
    partly = data.labels.clone().index_fill_(0, torch.arange(0, 90, 2), -1)
    metrics = tiny().fit(data.images, labels=partly).metrics_
    assert 0 < metrics['acc'] <= 1 and metrics['splits']['all']['n_images'] == 90

def test_grades_are_those_of_the_labels_at_hand(copy, whole, blind, data):
    "The folder is the same, the labels are others: so are all scores, and nothing is left of the old ones."
    other = replace(data, labels=data.labels.roll(7))
    wanted = tiny().fit(other)
    for images, fresh in ((other, wanted), (data.images, blind), (data, whole[0])):
        found, want = tiny(copy).fit(images).metrics_, fresh.metrics_
        for key in (want.keys() | found.keys()) - {'history', 'seconds'}:
            assert plain(found.get(key)) == plain(want.get(key)), key
    assert read_metrics(copy) == found

def test_a_number_of_clusters_that_is_suggested(data, tmp_path, monkeypatch):
    data = data[:45]
    auto = tiny(tmp_path/'run', n_clusters='auto').fit(data)
    k = auto.suggestion_.n_clusters
    assert 2 <= k == auto.recipe_.n_clusters == len(auto.metrics_['splits']['all']['sizes']) <= 9
    assert load_stages(tmp_path/'run/recipe.yml')['scan'].n_clusters == k
    again = tiny(tmp_path/'run', n_clusters='auto').fit(data)   # no stage is repeated
    told = tiny(n_clusters=k).fit(data)
    for scan in (again, told): assert_same(scan, auto)
    assert told.suggestion_ is None and clone(auto).n_clusters == 'auto'
    with pytest.raises(UserError, match="n_clusters is 'many'"): tiny(n_clusters='many').fit(data)

def test_features_serve_any_number_of_clusters(copy, whole, data, monkeypatch):
    "The pretext task of a finished run is that of another number, once the later stages are deleted."
    for name in ('scan', 'selflabel'): shutil.rmtree(copy/name)
    monkeypatch.setattr(stages, '_learn_features', never)
    four = tiny(copy, n_clusters=4).fit(data)
    np.testing.assert_array_equal(four.embeddings_, whole[0].embeddings_)
    assert len(four.metrics_['splits']['all']['sizes']) == 4

def test_labels_that_come_later(data, tmp_path):
    train, test = data[::2], data[1::2]
    tiny(tmp_path).fit(train, test=test.images)
    found, wanted = (tiny(folder).fit(train, test=test).metrics_ for folder in (tmp_path, None))
    for key in wanted.keys() - {'history', 'seconds'}: assert plain(found[key]) == plain(wanted[key]), key

def test_seed_and_clusters_go_before_the_recipe(whole, data):
    scan, other = tiny(seed=4).fit(data), tiny(recipe=TINY.change({'seed': 4})).fit(data)
    assert_same(scan, other)
    assert scan.recipe_.seed == 4 and not np.array_equal(scan.embeddings_, whole[0].embeddings_)
    assert tiny(n_clusters=5).fit(data).predict_proba(data).shape == (90, 5)

def test_global_random_numbers_are_left_alone(data):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    tiny().fit(data)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

def test_held_out_images(data, tmp_path):
    train, test = data[::2], data[1::2]
    scan = tiny(tmp_path/'run').fit(train, test=test)
    metrics = scan.metrics_
    assert list(metrics['splits']) == ['train', 'test'] and metrics['split'] == 'test'
    assert metrics['acc'] == scan.score(test) == metrics['splits']['test']['acc']
    assert metrics['splits']['train']['n_images'] == 45 == len(scan.labels_)
    for name, part in (('', train), ('-test', test)):
        rows = rows_of(tmp_path/f'run/clusters{name}.csv')
        assert [int(r['cluster']) for r in rows] == scan.predict(part).tolist()
    alone = tiny().fit(train)
    np.testing.assert_array_equal(alone.labels_, scan.labels_)

@pytest.mark.parametrize('labels', [
    ['cat', 'dog', 'owl']*30, ['cat', None, float('nan'), 'dog', '']*18, [10_000_019, 7, -1]*30,
    [2**70, 1, 1]*30, [-1]*89 + ['one'], [.5, 1.5, 2.5]*30, [True, False, None]*30, [b'x', 3, 'x']*30])
def test_labels_of_any_kind(data, blind, labels):
    "They only grade: the clusters are those without labels, and what can be graded is."
    scan = tiny().fit(data.images, labels, test=data.images[:9])
    assert (scan.labels_ == blind.labels_).all() and 'acc' in scan.metrics_['splits']['train']
    assert 'acc' not in scan.metrics_['splits']['test']
    assert len(scan.metrics_['classes']) == scan.metrics_['stages']['scan']['splits']['train']['n_classes']
    assert 0 < scan.score(data.images, labels) <= 1

def test_held_out_labels_mean_the_same_classes(data):
    x = data.images
    words = ['cat', 'dog', 'owl']*30
    scan = tiny().fit(x, words, test=ImageSet(x[:9], ['owl', 'cat', None]*3))
    assert scan.metrics_['classes'] == ['cat', 'dog', 'owl']
    alone = tiny().fit(x, None, test=ImageSet(x[:9], ['owl', 'cat', None]*3))
    assert 'acc' in alone.metrics_['splits']['test'] and 'acc' not in alone.metrics_['splits']['train']

def test_files_keep_their_paths_and_one_image_is_understood(data, tmp_path):
    for i, x in enumerate(data.images[:30, 0].numpy()):
        Image.fromarray(np.dstack([x, x//2, x])).save(tmp_path/f'{i:02}.png')
    scan = tiny().fit(tmp_path)
    assert scan.paths_ == [f'{i:02}.png' for i in range(30)]
    one = torch.as_tensor(np.asarray(Image.open(tmp_path/'07.png'))).permute(2, 0, 1)
    same = {scan.predict(x).tolist()[0] for x in (one, one[None], one.permute(1, 2, 0), one.numpy())}
    assert same == {scan.labels_[7]}

@pytest.mark.parametrize('labeled', ['train', 'test'])
def test_only_some_images_have_labels(labeled, data, tmp_path):
    parts = dict(train=data[::2], test=data[1::2])
    parts |= {k: v.images for k, v in parts.items() if k != labeled}
    scan = tiny(tmp_path/'run').fit(parts['train'], test=parts['test'])
    assert {k for k, v in scan.metrics_['splits'].items() if 'acc' in v} == {labeled}
    assert {k for v in scan.metrics_['baselines'].values() for k in v} == {labeled}
    assert ('acc' in scan.metrics_) == (labeled == 'test')
    write_report(tmp_path/'run')

def test_more_images_for_the_pretext_task(data, whole):
    more = ImageSet(digits().images[200:380], torch.full((180,), -1))
    scan = tiny().fit(data, pretext=more)
    assert scan.embeddings_.shape == (90, 16) and scan.metrics_['images'] == dict(all=90)
    assert plain(scan.history_['pretext']) != plain(whole[0].history_['pretext'])
    with pytest.raises(UserError, match='1×8×8'): tiny().fit(data, pretext=torch.zeros(9, 9, 9).byte())

def test_stages_can_be_left_out(data):
    scan = tiny(recipe=TINY.change({'scan.epochs': 0, 'selflabel.epochs': 0})).fit(data)
    assert list(scan.stages_) == ['pretext', 'neighbors', 'heads']
    assert scan.metrics_['acc'] == scan.stages_['heads']['splits']['all']['acc']

# -- killed and continued --

def killing(monkeypatch, at, after):
    "Die at the at-th checkpoint that is written, before or after it is on disk; the count goes on over runs."
    save, written = Checkpoint.save, []
    def deadly(self, **state):
        written.append(self.path.name)
        if len(written) == at and not after: raise Killed
        save(self, **state)
        if len(written) == at: raise Killed
    monkeypatch.setattr(Checkpoint, 'save', deadly)
    return written

@pytest.mark.parametrize('after', [False, True], ids=['before', 'after'])
@pytest.mark.parametrize('at', range(1, 12))
def test_killed_anywhere_continues_to_the_bit(at, after, whole, data, tmp_path, monkeypatch):
    killing(monkeypatch, at, after)
    with pytest.raises(Killed): tiny(tmp_path/'run').fit(data)
    scan = tiny(tmp_path/'run').fit(data)
    assert results(tmp_path/'run') == results(whole[1])
    assert plain(scan.metrics_) == plain(whole[0].metrics_)

def test_there_are_eleven_checkpoints(data, tmp_path, monkeypatch):
    "The test above kills at each of them."
    stage = ['checkpoint.pth.tar']*2 + ['outcome.pth.tar']
    written = killing(monkeypatch, 99, True)
    tiny(tmp_path/'run').fit(data)
    assert written == [*stage, 'heads.pth.tar', *stage, *stage, 'compare.pth.tar']

def test_killed_at_every_file_and_continued(whole, data, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        deaths = die_at_every_write(m, True)
        until_done(lambda: tiny(tmp_path/'run').fit(data))
    assert results(tmp_path/'run') == results(whole[1])
    assert {f.name for f in deaths} >= {*TOP, 'stage.json', *(
        f'{name}.pth.tar' for name in ('checkpoint', 'heads', 'outcome', 'model', 'compare'))}

def dies(folder):
    "The run, which ends after the first checkpoint of scan."
    torch.set_num_threads(1)
    save = Checkpoint.save
    def deadly(self, **state):
        save(self, **state)
        if self.path.parts[-2:] == ('scan', 'checkpoint.pth.tar'): os.kill(os.getpid(), signal.SIGKILL)
    Checkpoint.save = deadly
    SCAN(recipe=TINY, device='cpu', out=folder).fit(three_digits())

def test_a_real_kill(whole, tmp_path):
    process = forked(dies, tmp_path/'run')
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {f.name for f in (tmp_path/'run/scan').iterdir()}
    assert 'checkpoint.pth.tar' in left and 'model.pth.tar' not in left
    tiny(tmp_path/'run').fit(three_digits())
    assert results(tmp_path/'run') == results(whole[1])

def test_a_finished_run_is_not_repeated(whole, data, monkeypatch):
    monkeypatch.setattr(training, 'train_epoch', never)
    for name in ('mine_neighbors', 'train_heads'): monkeypatch.setattr(stages, name, never)
    for name in ('kmeans_baseline', 'embed_2d'): monkeypatch.setattr(report, name, never)
    before = listing(whole[1])
    again = tiny(whole[1]).fit(data)
    assert listing(whole[1]) == before and again.metrics_ == whole[0].metrics_
    assert_same(again, whole[0])

def test_progress_says_how_long_it_will_take(data, tmp_path, capsys):
    "Before a new run; one that goes on has begun."
    tiny(tmp_path/'run', progress=True).fit(data)
    err = capsys.readouterr().err
    assert err.index('About 1 minute on cpu.') < err.index('1/4 SimCLR')
    assert all(bar in err for bar in ('2/4 heads', '3/4 SCAN', '4/4 self-labelling'))
    tiny(tmp_path/'run', progress=True).fit(data)
    assert 'About' not in capsys.readouterr().err
    with pytest.raises(UserError): tiny(tmp_path/'x', n_clusters=91, progress=True).fit(data)
    assert capsys.readouterr().err == ''

# -- damage --

@pytest.mark.parametrize('name', [
    *TOP, 'selflabel/compare.pth.tar',
    *(f'{home}/{name}.pth.tar' for home in HOMES for name in ('model', 'outcome'))])
def test_a_deleted_file_comes_back(name, copy, whole, data):
    (copy/name).unlink()
    scan = tiny(copy).fit(data)
    assert results(copy) == results(whole[1])
    assert_same(scan, whole[0])

@pytest.mark.parametrize('how', ['empty', 'cut', 'other'])
def test_a_damaged_comparison_is_named(how, copy, data):
    file = copy/'selflabel/compare.pth.tar'
    if how == 'other': torch.save(dict(something=1), file)
    else: file.write_bytes(file.read_bytes()[:-100] if how == 'cut' else b'')
    with pytest.raises(UserError, match='compare.pth.tar') as e: tiny(copy).fit(data)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('text', ['', '[1, 2]', 'settings: 3', '{', 'scan: {a: 3}', 'scan: 3', '\udcff'])
def test_a_damaged_recipe_is_named(text, copy):
    (copy/'recipe.yml').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(UserError, match='recipe.yml') as e: SCAN.load(copy)
    assert '\n' not in str(e.value)

def test_a_damaged_model_is_named(copy, data):
    from safetensors.torch import save
    file = copy/'model.safetensors'
    raw = file.read_bytes()
    for bad in (raw[:-10], b'', b'x'*100, save({'a': torch.ones(2)})):
        file.write_bytes(bad)
        with pytest.raises(UserError, match='model.safetensors'): SCAN.load(copy)
    file.unlink()
    with pytest.raises(UserError, match='finish the run'): SCAN.load(copy)
    tiny(copy).fit(data)
    assert file.read_bytes() == raw

def test_damage_is_repaired_by_running_again(copy, whole, data):
    for name in TOP: (copy/name).write_bytes(b'{')
    tiny(copy).fit(data)
    assert results(copy) == results(whole[1])

# -- folders of others --

@pytest.mark.parametrize('change, said', [
    (dict(seed=1), 'seed: 3 → 1'), (dict(n_clusters=4), 'n_clusters: 3 → 4'),
    (dict(recipe=TINY.change({'scan.lr': .5})), r'scan\.lr'),
    (dict(recipe=replace(TINY, selflabel=None), seed=2), 'seed')])
def test_another_recipe_is_refused(change, said, whole, data):
    before = listing(whole[1])
    with pytest.raises(UserError, match=said): tiny(whole[1], **change).fit(data)
    assert listing(whole[1]) == before

def test_other_images_are_refused(whole, data):
    before = listing(whole[1])
    with pytest.raises(UserError, match=r'images\.all\.sha256'): tiny(whole[1]).fit(data.images.flip(0))
    with pytest.raises(UserError, match=r'images\.'): tiny(whole[1]).fit(data, test=data[:9])
    assert listing(whole[1]) == before

def test_folders_with_other_things_are_refused(data, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='not empty'): tiny(tmp_path).fit(data)
    with pytest.raises(UserError, match='is a file'): tiny(tmp_path/'notes.txt').fit(data)
    assert [f.name for f in tmp_path.iterdir()] == ['notes.txt']

def test_a_folder_at_home(data, tmp_path, monkeypatch):
    (tmp_path/'new').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, 'write_report', write_report)
    scan = tiny('~/new', recipe=TINY.change({'scan.epochs': 0, 'selflabel.epochs': 0})).fit(data)
    assert [f.name for f in tmp_path.iterdir()] == ['new'] and (tmp_path/'new/report.html').exists()
    assert (SCAN.load('~/new', 'cpu').predict(data) == scan.labels_).all()

# -- wrong input --

WRONG = [   # settings of the estimator, or of its recipe, and what is said
    (dict(n_clusters=1), 'n_clusters is 1'), (dict(n_clusters=0), 'n_clusters is 0'),
    (dict(n_clusters=91), '91 clusters'), (dict(n_clusters=2.5), 'whole number'),
    (dict(n_clusters=True), 'n_clusters is True'), (dict(n_clusters='ten'), "'ten'"),
    (dict(seed=-1), 'seed is -1'), (dict(seed='x'), "'x'"), (dict(device='tpu'), 'tpu'),
    (dict(device='cuda:99'), 'cuda:99'), (dict(recipe='digit'), "'digits'"),
    (dict(recipe='missing.yml'), 'missing.yml'),
    *(({f"recipe__{name.replace('.', '__')}": value}, said) for name, value, said in [
        ('n_clusters', 1, 'n_clusters'), ('size', 9, '8×8'), ('mean', (.5, .5, .5), 'mean'),
        ('backbone', 'resnet9000', 'resnet9000'), ('backbone_options.width', [8], 'width'),
        ('backbone_options.widths', [], 'widths'), ('backbone_options.widths', [8, 0], 'widths'),
        ('backbone_options.widths', 'wide', 'widths'), ('backbone_options.stem_stride', 0, 'stem_stride'),
        ('n_networks', 9, 'n_networks'), ('pretext.more_views', [{}], 'more_views'),
        ('pretext.setup', 'byol', 'simclr'), ('pretext.pretrained', 'nowhere.pth', 'nowhere.pth'),
        ('pretext.views', 3, r'pretext\.views'), ('pretext.views_options.flip', 0, "no setting 'flip'"),
        ('selflabel.views_options.opz', 1, "no setting 'opz'"), ('pretext.views_options.flip_p', 2, 'flip_p'),
        ('pretext.n_neighbors', 0, 'n_neighbors'), ('pretext.n_neighbors', 90, '90 neighbors'),
        ('pretext.epochs', 0, r'pretext\.epochs'), ('scan.epochs', -1, r'scan\.epochs'),
        ('pretext.temperature', 0, 'temperature'), ('pretext.batch_size', 1, 'batch_size'),
        ('pretext.lr', float('nan'), r'pretext\.lr'), ('scan.lr', float('inf'), r'scan\.lr'),
        ('selflabel.lr', -1, r'selflabel\.lr'), ('selflabel.threshold', 1., 'threshold'),
        ('precision', 'fp16', "precision is 'fp16'"), ('compile', 'yes', "compile is 'yes'"),
        ('scan.prior', [.5, .5], 'prior'), ('scan.head_choice', 'luck', 'loss or agreement'),
        ('pretext.index', 'flat', 'index'), ('pretext.n_views', -1, 'n_views'),
        ('pretext.whiten', 1.5, 'whiten'), ('pretext.whiten', -.1, 'whiten'),
        ('pretext.time_window', -1., 'time_window'), ('pretext.time_window', 60., 'times'),
        ('selflabel.ema_decay', 1., 'ema_decay')]),
    (dict(recipe__n_networks=2, recipe__pretext__more_views=[dict(tint=1)]), "no setting 'tint'"),
    (dict(recipe__channels=3, recipe__mean=(.5, .5, .5), recipe__std=(1., 1., 1.)), 'channel'),
    (dict(recipe__pretext__index='ivf', recipe__pretext__time_window=60.), "'exact'")]

@pytest.mark.parametrize('change, said', WRONG, ids=str)
def test_wrong_settings(change, said, data, tmp_path):
    "One sentence, at once or when the images are known, and nothing is written."
    scan = tiny(tmp_path/'run')
    with pytest.raises(UserError, match=said) as e: scan.set_params(**change).fit(data)
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()

def damaged(kind):
    x = np.random.default_rng(0).random((96, 8, 8)).astype(np.float32)
    if kind == 'nan': x[7, 2, 2] = np.nan
    if kind == 'infinite': x[7, 2, 2] = np.inf
    if kind == 'range': x = x*255 - 9
    return {'complex': np.zeros((9, 8, 8), complex), 'flat': x[0, 0], 'text': np.full((9, 8, 8), 'a'),
            'empty': np.zeros((0, 8, 8), np.uint8), 'object': object(), 'list': [1, 2],
            'none': None}.get(kind, x)

@pytest.mark.parametrize('kind, said', [
    ('nan', 'Image 7'), ('infinite', 'Image 7'), ('range', 'from -8.97'), ('complex', 'complex'),
    ('flat', 'shape'), ('text', 'type'), ('empty', 'no image'), ('object', 'object'),
    ('list', 'list'), ('none', 'None')])
def test_wrong_arrays(kind, said, whole, tmp_path):
    for use in (tiny(tmp_path/'run').fit, whole[0].predict, whole[0].transform):
        with pytest.raises(UserError, match=said): use(damaged(kind))
    assert not (tmp_path/'run').exists()

WRONG_LABELS = dict(few=[0, 1], square=[[0]*90], ragged=[[1], [1, 2]], mapping={})

@pytest.mark.parametrize('kind', WRONG_LABELS)
def test_wrong_labels(kind, whole, data, tmp_path):
    for use in (tiny(tmp_path/'run').fit, whole[0].scores):
        with pytest.raises(UserError, match='[Ll]abels') as e: use(data.images, WRONG_LABELS[kind])
        assert '\n' not in str(e.value)
    assert not (tmp_path/'run').exists()

def test_wrong_images_for_a_fitted_model(whole, data):
    for x in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 9, 9, dtype=torch.uint8)):
        with pytest.raises(UserError, match='1×8×8'): whole[0].predict(x)
    with pytest.raises(UserError, match='1×8×8'): tiny().fit(data, test=torch.zeros(2, 9, 9).byte())

def test_not_fitted(data, tmp_path):
    for use in ('predict', 'predict_proba', 'transform', 'score'):
        for kind in (UserError, sklearn.exceptions.NotFittedError):
            with pytest.raises(kind, match='not fitted') as e: getattr(SCAN(), use)(data)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='not fitted'): SCAN().save(tmp_path/'x')
    assert not (tmp_path/'x').exists()

def test_a_refused_fit_leaves_the_fitted_model(data):
    scan = tiny().fit(data)
    labels = scan.labels_.copy()
    with pytest.raises(UserError): scan.fit(data[:2])
    np.testing.assert_array_equal(scan.predict(data), labels)

def test_smallest_sets(data):
    with pytest.raises(UserError, match='only one image'): tiny().fit(data[:1])
    few = TINY.change({'n_clusters': 2, 'pretext.n_neighbors': 1})
    for n in (2, 4, 5): assert tiny(recipe=few).fit(data[:n]).labels_.shape == (n,)
    assert len(tiny(recipe=few.change({'n_clusters': 8})).fit(data[:8]).labels_) == 8
    for images in (data, data.images): assert len(tiny(recipe=few).fit(images, test=data[:1]).labels_) == 90

def test_constant_images():
    scan = tiny().fit(torch.full((40, 1, 8, 8), 7, dtype=torch.uint8))
    assert np.isfinite(scan.predict_proba(torch.zeros(1, 8, 8).byte())).all()

def test_oblong_and_color_images():
    x = torch.randint(256, (40, 3, 10, 14), generator=torch.Generator().manual_seed(0)).byte()
    scan = tiny().fit(x)
    assert scan.predict(x.permute(0, 2, 3, 1).numpy()).shape == (40,) and scan.shape_ == [3, 10, 14]

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
    scan = tiny(tmp_path/'run', recipe=TINY.change({'size': 8})).fit(str(pictures))
    rows = rows_of(tmp_path/'run/clusters.csv')
    assert len(rows) == 40 and (pictures/rows[0]['path']).exists()
    assert sorted(path for path, _ in scan.metrics_['skipped']) == ['d0/cut.jpg', 'empty.png']
    assert '2 files could not be read' in scan.metrics_['notes'][-1]
    np.testing.assert_array_equal(scan.predict(pictures), scan.labels_)
    np.testing.assert_array_equal(SCAN.load(tmp_path/'run').predict(str(pictures)), scan.labels_)
    assert 'empty.png' in write_report(tmp_path/'run').read_text()

def test_a_folder_is_read_as_the_recipe_sees(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    for channels in (1, 3):
        scan = tiny(recipe=TINY.change({'size': 8, 'channels': channels})).fit(pictures, test=pictures)
        assert scan.shape_ == [channels, 8, 8] and scan.predict(pictures).tolist() == scan.labels_.tolist()

def test_wrong_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    for name in ('empty', 'bad', 'one'): (tmp_path/name).mkdir()
    (tmp_path/'bad/zero.png').write_bytes(b'')
    Image.new('L', (8, 8)).save(tmp_path/'one/a.png')
    words = dict(empty='no image', missing='no folder', bad='zero.png', one='one image')
    for name, said in words.items():
        with pytest.raises(UserError, match=said): tiny(tmp_path/'run').fit(tmp_path/name)
    assert not (tmp_path/'run').exists()

# -- save and load --

def test_save_and_load(whole, data, tmp_path):
    whole[0].save(tmp_path/'m')
    loaded = SCAN.load(tmp_path/'m', 'cpu')
    np.testing.assert_array_equal(loaded.predict_proba(data), whole[0].predict_proba(data))
    np.testing.assert_array_equal(loaded.transform(data), whole[0].transform(data))
    assert loaded.score(data) == whole[0].score(data) and loaded.recipe_ == whole[0].recipe_
    assert {f.name for f in (tmp_path/'m').iterdir()} == {'recipe.yml', 'model.safetensors'}
    whole[0].save(tmp_path/'m')
    loaded.save(tmp_path/'n')
    for name in TOP[:2]: assert (tmp_path/'n'/name).read_bytes() == (whole[1]/name).read_bytes()

def test_a_loaded_model_can_learn_again(whole, data):
    np.testing.assert_array_equal(SCAN.load(whole[1], 'cpu').fit(data).labels_, whole[0].labels_)

def test_precision_of_a_loaded_model(whole, data, monkeypatch):
    asked = []
    monkeypatch.setattr(run_folder, 'tune', lambda model, *how: asked.append(how) or model)
    SCAN.load(whole[1], 'cpu')
    assert asked == [('bf16',)]

def test_folders_that_hold_no_model(whole, tmp_path):
    (tmp_path/'x').write_text('')
    with pytest.raises(UserError, match='not empty'): whole[0].save(tmp_path)
    for folder in (tmp_path, tmp_path/'missing'):
        with pytest.raises(UserError, match='not a run folder'): SCAN.load(folder)

@pytest.fixture(params=[0, 2], ids=['as large as the views', 'larger'])
def features_alone(request, data, tmp_path):
    "A run folder after its pretext task, its images and its outcome."
    framed = replace(data, images=F.pad(data.images, [request.param]*4))
    recipe = Recipe.for_images(framed, base=TINY.change({'size': 8, 'n_clusters': 4})).pretext
    found = run_pretext(recipe, {'all': framed}, None, tmp_path/'run')
    summarize([found], {'all': framed}, tmp_path/'run')
    return tmp_path/'run', framed, found

def test_after_the_pretext_task_alone(features_alone, tmp_path):
    folder, data, found = features_alone
    loaded = SCAN.load(folder, 'cpu')
    np.testing.assert_array_equal(loaded.transform(data), found.embeddings.numpy())
    for use in (loaded.predict, loaded.predict_proba, loaded.score):
        for kind in (UserError, sklearn.exceptions.NotFittedError):
            with pytest.raises(kind, match='no clusters yet: finish its scan stage'): use(data)
    loaded.save(tmp_path/'saved')
    again = SCAN.load(tmp_path/'saved', 'cpu')
    np.testing.assert_array_equal(again.transform(data), found.embeddings.numpy())
    with pytest.raises(UserError, match='no clusters yet'): again.predict(data)

def test_after_scan_alone(data, whole, tmp_path):
    "From weights of others, without self-labelling."
    torch.save(read_run(whole[1])[0].weights['model'], tmp_path/'weights.pth.tar')
    recipe = Recipe.for_images(data, base=TINY).scan
    found = run_scan(recipe, {'all': data}, tmp_path/'weights.pth.tar', tmp_path/'run')
    metrics = summarize([found], {'all': data}, tmp_path/'run')
    loaded = SCAN.load(tmp_path/'run', 'cpu')
    np.testing.assert_array_equal(loaded.predict(data), found.clusters['scan']['all'])
    assert loaded.score(data) == metrics['acc'] and 'kmeans_features' in metrics['baselines']
    rows = rows_of(tmp_path/'run/clusters.csv')
    assert [int(r['cluster']) for r in rows] == loaded.predict(data).tolist()

def test_weights_of_others_beside_features_of_ours(copy, data, whole, tmp_path):
    "The recipe tells only of what led to the clusters."
    for part in ('scan', 'selflabel'): shutil.rmtree(copy/part)
    torch.save(run_pretext(of_moco(data), {'all': data}).weights['model'], tmp_path/'weights.pth.tar')
    run_scan(Recipe.for_images(data, base=TINY).scan, {'all': data}, tmp_path/'weights.pth.tar', copy)
    assert [o.recipe.stage for o in read_run(copy)] == [*load_stages(copy/'recipe.yml')] == ['scan']

def of_moco(data): return Recipe.for_images(data, base=TINY.change({'pretext.setup': 'moco'})).pretext

def test_other_features_beside_a_finished_run(copy, data, whole):
    "What came last is the run: features alone, and no clusters of before; then, run again, its clusters."
    found = run_pretext(of_moco(data), {'all': data}, None, copy)
    summarize([found], {'all': data}, copy)
    np.testing.assert_array_equal(SCAN.load(copy, 'cpu').transform(data), found.embeddings.numpy())
    assert [o.sha256 for o in read_run(copy)] == [found.sha256] and not (copy/'clusters.csv').exists()
    assert list(load_stages(copy/'recipe.yml')) == ['pretext']
    write_report(copy)
    tiny(copy).fit(data)
    assert results(copy).items() >= results(whole[1]).items()

def test_a_run_is_what_its_last_stage_started_from(copy, data):
    "Of two pretext tasks in a folder, the one that led to the clusters counts, and recipe.yml names it."
    for part in ('scan', 'selflabel'): shutil.rmtree(copy/part)
    run_pretext(of_moco(data), {'all': data}, None, copy)
    start = copy/'pretext/simclr/model.pth.tar'
    run_scan(Recipe.for_images(data, base=TINY).scan, {'all': data}, start, copy)
    outcomes = read_run(copy)
    assert [getattr(o.recipe, 'setup', o.recipe.stage) for o in outcomes] == ['simclr', 'scan']
    summarize(outcomes, {'all': data}, copy)
    assert load_stages(copy/'recipe.yml')['pretext'].setup == 'simclr'

def test_two_networks(data, tmp_path):
    settings = TINY.change(OTHER)
    both = tiny(tmp_path/'run', recipe=settings).fit(data)
    alone = [tiny(recipe=TINY.change({'pretext.views_options': views})).fit(data).embeddings_
             for views in (TINY.pretext.views_options, *settings.pretext.more_views)]
    joined = np.concatenate([z/np.linalg.norm(z, axis=1, keepdims=True) for z in alone], 1)
    np.testing.assert_allclose(both.embeddings_, joined, rtol=0, atol=1e-6)
    epochs = {k: len(v) for k, v in both.history_.items() if v}
    assert epochs == dict(pretext=2, pretext2=2, heads=1, scan=2, selflabel=2)
    loaded = SCAN.load(tmp_path/'run', 'cpu')
    np.testing.assert_array_equal(loaded.predict_proba(data), both.predict_proba(data))
    assert_same(tiny(tmp_path/'run', recipe=settings).fit(data), both)

# -- scikit-learn's conventions --

def test_clone_has_settings_but_nothing_learned(whole):
    copy = clone(whole[0])
    assert copy.get_params() == whole[0].get_params() and not hasattr(copy, 'model_')

def test_params():
    scan = SCAN(7, seed=3)
    assert list(scan.get_params(deep=False)) == ['n_clusters', 'recipe', 'seed', 'device', 'out', 'progress']
    assert scan.get_params()['recipe__scan__entropy_weight'] == FOLDER.scan.entropy_weight == 5.
    assert len(scan.get_params()) == 6 + len(FOLDER.flat()) and scan.recipe is None
    inner = dict(recipe__scan__entropy_weight=2., recipe__pretext__views_options__flip_p=0)
    assert scan.set_params(**inner, n_clusters=8) is scan and (scan.n_clusters, scan.seed) == (8, 3)
    assert scan.recipe == FOLDER.change({'scan.entropy_weight': 2., 'pretext.views_options.flip_p': 0})
    assert scan.get_params()['recipe__scan__entropy_weight'] == 2.

def test_params_of_a_preset():
    scan, digits = SCAN(recipe='digits'), PRESETS['digits']
    assert scan.get_params()['recipe__pretext__epochs'] == digits.pretext.epochs
    scan.set_params(recipe__pretext__epochs=3)
    assert scan.recipe == digits.change({'pretext.epochs': 3}) and PRESETS['digits'] is digits
    assert SCAN().set_params(recipe='digits', recipe__pretext__epochs=3).recipe == scan.recipe
    before = scan.get_params()
    assert scan.set_params(**before).get_params() == before

@pytest.mark.parametrize('params, said', [
    (dict(n_cluster=3), "no setting 'n_cluster'"), (dict(n_clusters=4, sead=3), "no setting 'sead'"),
    (dict(n_clusters=4, recipe__scan__entropy=1.), 'scan.entropy_weight'),
    (dict(recipe__nothing=1.), 'nothing'), (dict(seed=9, recipe__scan__lr=-1.), r'scan\.lr is -1'),
    (dict(recipe__epochs=3), r'pretext\.epochs or scan\.epochs')])
def test_wrong_params_change_nothing(params, said):
    scan = SCAN(7, recipe='digits')
    before = scan.get_params()
    with pytest.raises(UserError, match=said): scan.set_params(**params)
    assert scan.get_params() == before and scan.recipe == 'digits'

@pytest.mark.parametrize('settings', [
    {}, dict(n_clusters=7, seed=3), dict(seed=0), dict(recipe='digits', device='cpu', progress=True),
    dict(recipe=TINY), dict(recipe=FOLDER), dict(recipe=replace(TINY, selflabel=None)),
    dict(recipe=PRESETS['aurora']), dict(out='runs/x'), dict(out=Path('runs/x'))],
    ids=lambda s: ' '.join(s) or 'none')
def test_repr_says_what_was_changed(settings):
    names = {**vars(pathlib), **vars(recipes), 'SCAN': SCAN}
    assert eval(repr(SCAN(**settings)), names).get_params() == SCAN(**settings).get_params()

def test_repr_is_short():
    assert repr(SCAN(7, seed=3)) == 'SCAN(n_clusters=7, seed=3)' and repr(SCAN()) == 'SCAN()'
    assert "'scan.tried_heads': 2" in repr(tiny()) and len(repr(tiny())) < 1200

def test_in_a_pipeline_of_scikit_learn(whole, data):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer
    from sklearn.utils.validation import check_is_fitted
    steps = make_pipeline(FunctionTransformer(lambda x: x[:, 0]), tiny())
    with pytest.raises(sklearn.exceptions.NotFittedError): check_is_fitted(steps[-1])
    x = data.images.numpy()
    np.testing.assert_array_equal(steps.fit(x).predict(x), whole[0].labels_)
    np.testing.assert_array_equal(steps.fit_predict(x, data.labels.numpy()), whole[0].labels_)
    assert steps.score(x, data.labels.numpy()) == whole[0].score(data)
    assert steps.transform(x).shape == (90, 16)
    check_is_fitted(steps[-1])
    assert is_clusterer(steps[-1])
    steps.set_params(scan__recipe__scan__epochs=1, scan__seed=1)
    assert steps[-1].recipe.scan.epochs == 1 and steps.get_params()['scan__recipe__scan__epochs'] == 1

def test_a_recipe_in_any_form(whole, data, tmp_path):
    (tmp_path/'recipe.yml').write_text(to_yaml(TINY))
    for recipe in (tmp_path/'recipe.yml', str(tmp_path/'recipe.yml'), whole[1]/'recipe.yml'):
        np.testing.assert_array_equal(tiny(recipe=recipe).fit(data).labels_, whole[0].labels_)

def test_what_differs_on_a_cpu_is_in_the_recipe(data):
    recipe = replace(TINY, cpu={'pretext': {'epochs': 1}, 'n_clusters': 4})
    scan = tiny(recipe=recipe).fit(data)
    assert scan.recipe_.pretext.epochs == 1 and scan.recipe_.n_clusters == 4 and not scan.recipe_.cpu
    assert tiny(recipe=recipe, n_clusters=5).fit(data).recipe_.n_clusters == 5

def test_no_training_function_takes_labels():
    for train in (simclr.train_simclr, moco.train_moco, scan_lesson.train_heads, whole_network.train_scan,
                  selflabel.train_selflabel, mine_neighbors):
        assert not {'labels', 'y', 'targets'} & inspect.signature(train).parameters.keys()
