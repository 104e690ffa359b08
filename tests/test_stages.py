"The three stages: each goes on from plain files, to the bit after any kill; what does not fit is refused."
import json, os, re, shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pytest, torch
from torch.nn import functional as F
from scan_nb import files as files_room, stages, training
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.checkpoints import read_weights
from scan_nb.exchange import exchange_parts
from scan_nb.neighbors import center_crop, embed
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.recipes import FOLDER, PretextRecipe, Recipe
from scan_nb.report import STAGE_NAMES
from scan_nb.run_folder import Outcome, open_folder, read_run
from scan_nb.scan import logits_of, train_heads
from scan_nb.stages import (estimate_seconds, find_pairs, format_scores, run_pretext, run_scan, run_selflabel,
                            run_stages)

PARTS, HOMES = ('pretext', 'scan', 'selflabel'), ('pretext/simclr', 'scan', 'selflabel')
TINY = FOLDER.change({   # a second for all; here every stage is kept and changes the weights
    'n_clusters': 3, 'seed': 3, 'backbone_options.widths': (8, 16), 'pretext.n_neighbors': 3,
    'pretext.queue_size': 30, 'scan.tried_heads': 2, 'scan.heads_epochs': 1, 'scan.lr': 1e-3,
    'selflabel.lr': 3e-4, 'selflabel.ema_decay': .98, 'selflabel.threshold': .4,
    **{f'{part}.{name}': value for part in PARTS for name, value in dict(
        epochs=2, batch_size=30, views='simclr', views_options=dict(flip_p=0., scale=(.6, 1.))).items()}})
OTHER = {'n_networks': 2, 'pretext.more_views': [dict(tint_p=.9, flip_p=0.)]}   # two networks
pytestmark = pytest.mark.usefixtures('one_thread')

def three_digits():
    "90 images of three digits."
    d = digits()
    first = torch.cat([(d.labels == c).nonzero()[:30, 0] for c in range(3)])
    return replace(d[first], classes=['zero', 'one', 'two'])

@pytest.fixture(scope='module')
def data(): return three_digits()

@pytest.fixture(scope='module')
def recipe(data): return Recipe.for_images(data, base=TINY)

@pytest.fixture(scope='module')
def whole(data, recipe, tmp_path_factory):
    "All stages by one call, and their folder."
    folder = tmp_path_factory.mktemp('whole')/'run'
    return run_stages(recipe, {'all': data}, folder), folder

@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path/'run')
    return tmp_path/'run'

class Listener(list):
    def __call__(self, line): self.append(line)
    @property
    def text(self): return '\n'.join(self)

def plain(value):
    "What can be compared by ==: tensors as bytes; not the seconds that a step took, nor their checksum."
    if isinstance(value, torch.Tensor): return str(value.dtype), list(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ('seconds', 'sha256')}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

def files(folder): return [f for f in folder.rglob('*') if f.is_file() and f.name != '.lock']

def content(folder):
    "Every file of a run."
    def read(file):
        if file.suffix == '.tar': return plain(torch.load(file, weights_only=True))
        return plain(json.loads(file.read_text())) if file.suffix == '.json' else file.read_bytes()
    return {f.relative_to(folder).as_posix(): read(f) for f in files(folder)}

def of_stages(folder): return {name: value for name, value in content(folder).items() if '/' in name}

def result(outcome):
    "All that came out of a stage."
    names = 'weights', 'neighbors', 'embeddings', 'steps', 'history', 'clusters', 'note'
    return {name: plain(getattr(outcome, name)) for name in names}

def listing(folder): return {f: f.read_bytes() for f in files(folder)}

def never(*a, **k): raise AssertionError('done once more')

# -- one way, however it is walked --

def test_all_at_once_are_the_stages_one_after_the_other(whole, data, recipe, tmp_path):
    "In one process or in three, in memory or through a folder: the same bytes, in the same files."
    for run, part in zip((run_pretext, run_scan, run_selflabel), PARTS):
        run(getattr(recipe, part), {'all': data}, None, tmp_path/'run')
    assert content(tmp_path/'run') == content(whole[1])
    for kept, read, made in zip(whole[0], read_run(whole[1]), run_stages(recipe, {'all': data}), strict=True):
        assert result(read) == result(made) == result(kept) | dict(embeddings=result(made)['embeddings'])
        assert made.file is None and read.file == kept.file and made.sha256 == read.sha256

def test_each_stage_leaves_its_files(whole):
    common = {'stage.json', 'checkpoint.pth.tar', 'outcome.pth.tar', 'model.pth.tar', 'recipe.yml',
              'metrics.json', 'metrics.jsonl', 'topk-train-neighbors.npy'}
    own = {'pretext/simclr': {'embeddings.npy'}, 'scan': {'heads.pth.tar'}, 'selflabel': set()}
    for name, more in own.items(): assert {f.name for f in (whole[1]/name).iterdir()} == common | more
    assert {f.name for f in whole[1].glob('[!.]*')} == {*PARTS, 'recipe.yml', 'model.safetensors'}

def test_models_have_the_authors_layout(whole):
    pretext, scan, selflabel = (torch.load(o.file, weights_only=True) for o in whole[0])
    heads = {f'contrastive_head.{i}.{kind}' for i in (0, 2) for kind in ('weight', 'bias')}
    assert {*heads, 'backbone.conv1.weight'} <= pretext['model'].keys()
    for state in (scan, selflabel):
        assert state['head'] == 0 and state['model']['cluster_head.0.weight'].shape == (3, 16)
        assert not [k for k in state['model'] if not k.startswith(('backbone.', 'cluster_head.'))]

def test_steps_and_history(whole):
    steps = {name: step for o in whole[0] for name, step in o.steps.items()}
    rows = {name: rows for o in whole[0] for name, rows in o.history.items() if rows}
    assert list(steps) == ['pretext', 'neighbors', 'heads', 'scan', 'selflabel']
    assert {k: len(v) for k, v in rows.items()} == dict(pretext=2, heads=1, scan=2, selflabel=2)
    assert all(s['reason'] and isinstance(s['kept'], bool) and s['seconds'] > 0 for s in steps.values())
    for name in ('heads', 'scan', 'selflabel'): assert 0 < steps[name]['splits']['all']['acc'] <= 1
    assert 0 < steps['neighbors']['splits']['all']['neighbor_accuracy'] <= 1

def test_without_labels_nothing_is_graded(data, recipe):
    blind = run_stages(recipe, {'all': ImageSet(data.images)})
    for o, seen in zip(blind, run_stages(recipe, {'all': data})):
        assert plain(o.weights) == plain(seen.weights) and plain(o.clusters) == plain(seen.clusters)
        words = json.dumps([o.steps, o.history])
        assert not [word for word in ('acc"', 'nmi', 'ari"', 'accuracy', 'purity') if word in words]

def test_stages_that_are_left_out(data, recipe):
    found = run_stages(recipe.change({'scan.epochs': 0, 'selflabel.epochs': 0}), {'all': data})
    assert [o.recipe.stage for o in found] == ['pretext', 'scan'] and list(found[-1].clusters) == ['heads']
    found = run_stages(replace(recipe.change({'scan.heads_epochs': 0}), selflabel=None), {'all': data})
    assert list(found[-1].clusters) == ['scan']

def test_a_stage_speaks(data, recipe, tmp_path):
    say = Listener()
    run_stages(recipe, {'all': data}, tmp_path/'run', say=say)
    assert say[0] == 'simclr begins: 2 epochs, 90 images of 1×8×8, on cpu in float32'
    assert f"scan starts from {tmp_path/'run/pretext/simclr/model.pth.tar'}" in say
    assert 'scan starts with head' in say.text and 'chosen without labels' in say.text
    for part in HOMES: assert str(tmp_path/'run'/part/'model.pth.tar') in say.text
    assert say.text.count('(90 images): ACC') == 2 and say.text.count('(90 images): kNN accuracy ') == 1

def test_scores_in_words():
    assert format_scores(dict(n_clusters=3)) == 'no labels; 3 clusters in use'
    scores = dict(acc=.5, nmi=.25, ari=0., top5=1.)
    assert format_scores(scores) == 'ACC 50.00, NMI 25.00, ARI 0.00, top-5 100.00'

def test_precision_and_compile_reach_every_network(data, recipe, monkeypatch):
    asked = []
    def tune(model, *how):
        asked.append((type(model).__name__, *how))
        return model
    monkeypatch.setattr(stages, 'tune', tune)
    run_stages(recipe.change({'precision': 'float32', 'compile': True}), {'all': data})
    assert [how for how in asked if how[-1] is True] == [
        ('ContrastiveModel', 'float32', True)] + [('ClusteringModel', 'float32', True)]*2
    assert {how[1] for how in asked} == {'float32'}

# -- finished, and older folders --

@pytest.fixture
def idle(monkeypatch):
    "From now on nobody trains, mines or judges heads."
    monkeypatch.setattr(training, 'train_epoch', never)
    for name in ('mine_neighbors', 'train_heads', 'embed'): monkeypatch.setattr(stages, name, never)

def test_a_finished_stage_is_not_repeated(whole, data, recipe, idle):
    before, say = listing(whole[1]), Listener()
    found = run_stages(recipe, {'all': data}, whole[1], say=say)
    assert listing(whole[1]) == before and say.text.count('was finished before') == 3
    assert [result(o) for o in found] == [result(o) for o in read_run(whole[1])]

def test_a_folder_from_before_a_setting_existed_is_continued(copy, data, recipe, idle):
    for file in copy.rglob('stage.json'):
        known = json.loads(file.read_text())
        new = 'precision', 'prior', 'pretext.mutual', 'scan.head_choice'
        old = {k: v for k, v in known.items() if k not in new}
        file.write_text(json.dumps(old | dict(scan_nb='0.0.0')))
    run_stages(recipe, {'all': data}, copy)
    with pytest.raises(UserError, match='pretext.mutual: False → True'):
        run_stages(recipe.change({'pretext.mutual': True}), {'all': data}, copy)

def test_equal_settings_in_other_words(copy, data, recipe, idle):
    same = {'backbone_options.widths': [np.int64(8), '16'], 'seed': np.int32(3), 'scan.lr': '1e-3'}
    run_stages(recipe.change(same), {'all': data}, str(copy))

def test_the_folder_of_a_user(data, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_pretext(recipe.pretext, {'all': data}, folder='~/run')
    assert [f.name for f in tmp_path.iterdir()] == ['run']

# -- killed and continued --

class Killed(BaseException): pass

def die_at_every_write(monkeypatch, after):
    "A run dies whenever it writes a file: when that is there, or just before; each checkpoint twice."
    deaths = Counter()
    def deadly(real):
        @contextmanager
        def write(path):
            deaths[path] += 1
            dies = deaths[path] <= 1 + ('checkpoint' in path.name)
            if dies and not after:
                path.with_name(f".{path.name}.{'0'*32}").write_bytes(b'a part of it')
                raise Killed
            with real(path) as file: yield file
            if dies: raise Killed
        return write
    for module in (training, files_room):
        monkeypatch.setattr(module, 'atomic_write', deadly(module.atomic_write))
    return deaths

def until_done(run):
    for _ in range(100):
        try: return run()
        except Killed: pass
    raise AssertionError('never done')

LONG = OTHER | {'pretext.setup': 'moco', 'scan.heads_epochs': 0, 'scan.n_heads': 2, 'scan.remine_every': 1,
                'selflabel.ema_decay': None}   # more that has a state

@pytest.mark.parametrize('change, after', [({}, False), ({}, True), (LONG, True)],
                         ids=['before', 'after', 'another way, after'])
def test_killed_at_every_write_and_continued(change, after, data, recipe, tmp_path, monkeypatch):
    changed = recipe.change(change)
    run_stages(changed, {'all': data}, tmp_path/'straight')
    with monkeypatch.context() as m:
        deaths = die_at_every_write(m, after)
        outcomes = until_done(lambda: run_stages(changed, {'all': data}, tmp_path/'run'))
    found = content(tmp_path/'run')
    torn = {name: raw for name, raw in found.items() if '/.' in f'/{name}'}   # left by the kills alone
    assert {k: v for k, v in found.items() if k not in torn} == content(tmp_path/'straight')
    assert {*deaths} == {tmp_path/'run'/name for name in found.keys() - torn} and len(deaths) > 20
    assert not [name for name in torn if '/.model' not in name and '.pth.tar' in name]   # cleared away
    epochs = {name: step['epochs'] for o in outcomes for name, step in o.steps.items() if o.history[name]}
    assert set(epochs.values()) <= {1, 2} and epochs['pretext'] == 2

def test_says_where_it_continues(data, recipe, tmp_path, monkeypatch):
    "A crash between training and the neighbors: the trained epochs are not lost."
    with monkeypatch.context() as m:
        m.setattr(stages, 'mine_neighbors', lambda *a: 1/0)
        with pytest.raises(ZeroDivisionError): run_pretext(recipe.pretext, {'all': data}, None, tmp_path)
    assert not (tmp_path/'pretext/simclr/model.pth.tar').exists()
    monkeypatch.setattr(training, 'train_epoch', never)
    say = Listener()
    run_pretext(recipe.pretext, {'all': data}, None, tmp_path, say=say)
    assert 'simclr continues after epoch 2 of 2' in say.text

@pytest.mark.parametrize('where', HOMES)
def test_time_before_a_kill_counts(where, whole, copy, data, recipe, monkeypatch):
    clock, epochs = iter(range(0, 10**9, 100)), training.train_epoch
    monkeypatch.setattr(stages, 'time', SimpleNamespace(monotonic=lambda: next(clock)))
    for later in HOMES[HOMES.index(where):]: shutil.rmtree(copy/later)
    def deadly(run, step, epoch):
        if epoch == 2: raise Killed
        return epochs(run, step, epoch)
    with monkeypatch.context() as m:
        m.setattr(training, 'train_epoch', deadly)
        with pytest.raises(Killed): run_stages(recipe, {'all': data}, copy)
    spent = {name: torch.load(copy/where/f'{name}.pth.tar')['seconds']
             for name in ('checkpoint', 'heads') if (copy/where/f'{name}.pth.tar').exists()}
    steps = {name: s for o in run_stages(recipe, {'all': data}, copy) for name, s in o.steps.items()}
    assert steps[where.split('/')[0]]['seconds'] > spent['checkpoint'] > 0
    if where == 'scan': assert steps['heads']['seconds'] == spent['heads'] > 0

# -- where a stage starts --

def test_heads_start_from_the_embeddings_of_the_folder(copy, data, recipe, whole, monkeypatch):
    shutil.rmtree(copy/'scan')
    seen = []
    def heads(z, near, *a, **k):
        seen.append((z, near))
        return train_heads(z, near, *a, **k)
    monkeypatch.setattr(stages, 'train_heads', heads)
    monkeypatch.setattr(stages, 'embed', never)
    run_scan(recipe.scan, {'all': data}, None, copy)
    assert np.array_equal(seen[0][0], np.load(copy/'pretext/simclr/embeddings.npy'))
    assert np.array_equal(seen[0][1], np.load(copy/'pretext/simclr/topk-train-neighbors.npy'))
    assert plain(torch.load(copy/'scan/model.pth.tar')) == plain(whole[0][1].weights)

def test_the_newest_pretext_is_the_start(copy, data, recipe):
    moco = recipe.change({'pretext.setup': 'moco'}).pretext
    outcome = run_pretext(moco, {'all': data}, None, copy)
    shutil.rmtree(copy/'scan')
    for newest in ('simclr', 'moco'):
        os.utime(copy/'pretext'/newest/'model.pth.tar', (2e9 + len(newest), 2e9 - len(newest)))
        say = Listener()
        run_scan(recipe.scan, {'all': data}, None, copy, say=say)
        assert f"starts from {copy/'pretext'/newest}" in say.text
        shutil.rmtree(copy/'scan')
    assert outcome.file == copy/'pretext/moco/model.pth.tar'

def cast(state, kind): return {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}

WRAPS = dict(
    raw=lambda s: s, model=lambda s: {'model': s}, state_dict=lambda s: {'state_dict': s, 'epoch': 3},
    module=lambda s: {f'module.{k}': v for k, v in s.items()},
    float16=lambda s: cast(s, torch.float16), bfloat16=lambda s: cast(s, torch.bfloat16))

@pytest.mark.parametrize('wrap', WRAPS)
def test_weights_of_others(wrap, whole, data, recipe, tmp_path):
    "A file without neighbors beside it, however the weights are wrapped: they are mined."
    file, say = tmp_path/'weights.pth.tar', Listener()
    torch.save(WRAPS[wrap](whole[0][0].weights['model']), file)
    found = run_scan(recipe.scan, {'all': data}, file, tmp_path/'run', say=say)
    assert 'scan mines 20 neighbors of each image' in say and f'scan starts from {file}' in say
    assert found.neighbors.shape == (90, 20)
    if '16' not in wrap: assert torch.equal(found.neighbors[:, :3], whole[0][0].neighbors)
    assert [o.recipe.stage for o in read_run(tmp_path/'run')] == ['scan']
    again = run_scan(recipe.scan, {'all': data}, str(file), tmp_path/'run', say=say)
    assert 'was finished before' in say.text and plain(again.weights) == plain(found.weights)

@pytest.mark.parametrize('n_neighbors, mines', [(None, False), (2, False), (3, False), (4, True)])
def test_the_authors_place_and_their_lists(whole, data, recipe, n_neighbors, mines, tmp_path):
    "They write pretext/model.pth.tar, and lists of neighbors that begin with the image itself."
    (tmp_path/'pretext').mkdir()
    torch.save(whole[0][0].weights['model'], tmp_path/'pretext/model.pth.tar')
    near, say = np.load(whole[1]/'pretext/simclr/topk-train-neighbors.npy'), Listener()
    np.save(tmp_path/'pretext/topk-train-neighbors.npy', np.c_[np.arange(90), near])
    scan = recipe.change({'scan.n_neighbors': n_neighbors}).scan
    run_scan(scan, {'all': data}, None, tmp_path, say=say)
    kept = np.load(tmp_path/'scan/topk-train-neighbors.npy')
    assert kept.shape == (90, n_neighbors or 3) and np.array_equal(kept[:, :3], near[:, :n_neighbors][:, :3])
    assert ('mines' in say.text) == mines

def test_scan_without_a_start_in_memory(whole, data, recipe):
    "The outcome of a stage is enough, with or without what goes beyond the weights."
    bare = Outcome(recipe.pretext, [1, 8, 8], whole[0][0].weights, whole[0][0].neighbors)
    assert plain(run_scan(recipe.scan, {'all': data}, bare).weights) == plain(whole[0][1].weights)

@pytest.mark.parametrize('run, part, words', [(run_scan, 'scan', '`scan-nb moco` or `scan-nb frozen`'),
                                              (run_selflabel, 'selflabel', 'scan-nb scan')])
def test_says_what_is_missing(run, part, words, data, recipe, tmp_path):
    r, images = getattr(recipe, part), {'all': data}
    with pytest.raises(UserError, match=words): run(r, images, None, tmp_path/'run')
    with pytest.raises(UserError, match='nowhere'): run(r, images, 'nowhere.pth.tar', tmp_path/'run')
    with pytest.raises(UserError, match=words) as e: run(r, images)
    assert 'None' not in str(e.value)
    assert not (tmp_path/'run').exists()

def test_published_features(data, recipe, whole, tmp_path, monkeypatch):
    "With the weights of others nothing is trained; neighbors are mined as ever."
    monkeypatch.setattr(training, 'train_epoch', never)
    monkeypatch.setattr(stages, 'load_moco_v2', lambda file: whole[0][0].load())
    (tmp_path/'moco_v2.pth.tar').write_bytes(b'')
    moco = replace(recipe.pretext, setup='moco', pretrained=str(tmp_path/'moco_v2.pth.tar'))
    found = run_pretext(moco, {'all': data})
    assert found.steps['pretext'] == dict(
        kept=True, reason="the weights of 'moco_v2.pth.tar'", epochs=0, seconds=0.)
    assert torch.equal(found.embeddings, whole[0][0].embeddings) and found.history['pretext'] == []

# -- what does not fit is refused --

@pytest.mark.parametrize('change, said', [
    ({'seed': 1}, 'seed: 3 → 1'), ({'n_clusters': 4}, 'n_clusters: 3 → 4'),
    ({'scan.lr': .5}, r'scan\.lr: 0\.001 → 0\.5'),
    ({'pretext.views_options.flip_p': .5}, r'pretext\.views_options\.flip_p: 0\.0 → 0\.5'),
    ({'pretext.views_options.rotation': 9.}, r'pretext\.views_options\.rotation: None → 9\.0'),
    ({'backbone_options.widths': (8, 32)}, r'backbone_options\.widths: \[8, 16\] → \[8, 32\]'),
    ({'selflabel.epochs': 3}, r'selflabel\.epochs: 2 → 3'),
    ({'prior': 'estimate'}, 'prior: None → estimate')])
def test_another_recipe_is_refused(whole, data, recipe, change, said):
    before = listing(whole[1])
    with pytest.raises(UserError, match=said) as e: run_stages(recipe.change(change), {'all': data}, whole[1])
    assert '\n' not in str(e.value) and listing(whole[1]) == before

def test_other_images_are_refused(whole, data, recipe):
    before, changed = listing(whole[1]), data.images.clone()
    changed[3, 0, 4, 4] ^= 1
    for images, said in ((dict(all=ImageSet(changed)), r'images\.all\.sha256'),
                         (dict(all=data[:89]), r'images\.all\.images: 90 → 89'),
                         (dict(train=data, test=data[:9]), r'images\.test|images\.train'),
                         (dict(all=data, pretext=data[:80]), r'images\.pretext')):
        with pytest.raises(UserError, match=said): run_stages(recipe, images, whole[1])
    assert listing(whole[1]) == before

def test_labels_and_names_are_no_other_images(whole, data, recipe, idle):
    other = replace(data, labels=None, paths=[f'{i}.png' for i in range(90)], times=torch.arange(90))
    run_stages(recipe, {'all': other}, whole[1])

def test_another_start_is_refused(copy, data, recipe):
    moco = run_pretext(recipe.change({'pretext.setup': 'moco'}).pretext, {'all': data})
    before = listing(copy)
    with pytest.raises(UserError, match='start: [0-9a-f]{20} → [0-9a-f]{20}'):
        run_scan(recipe.scan, {'all': data}, moco, copy)
    assert listing(copy) == before

def test_another_device_is_refused(whole, data, recipe):
    with pytest.raises(UserError, match='device: cpu → cuda'):
        open_folder(whole[1], recipe.stages.values(), {'all': data}, torch.device('cuda'))

@pytest.mark.parametrize('text, n, passed', [('3: [', None, 0), ('3: cats', None, 0), ('3: [', 3, 0),
                                             ('3: cats', 3, 1), ('90: cats', 3, 0)])
def test_wrong_names_are_noticed_before_the_work(copy, data, recipe, monkeypatch, text, n, passed):
    "And when the number of clusters is not known yet, as soon as it is."
    (copy/'names.yml').write_text(text)
    done, pretext = [], stages.RUN['pretext']
    def counted(*a, **k): return done.append(0) or pretext(*a, **k)
    for name in PARTS: monkeypatch.setitem(stages.RUN, name, counted)
    with pytest.raises(UserError, match='names.yml'):
        run_stages(recipe, {'all': data}, copy, count=n and (lambda outcome: n))
    assert len(done) == passed

def test_no_epochs_of_selflabelling_are_no_stage(whole, data, recipe, tmp_path):
    none = replace(recipe.selflabel, epochs=0)
    with pytest.raises(UserError, match='clusters of scan are the result'):
        run_selflabel(none, {'all': data}, whole[0][1], tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_folders_with_other_things_are_refused(data, recipe, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    for folder, said in ((tmp_path, 'not empty'), (tmp_path/'notes.txt', 'is a file')):
        with pytest.raises(UserError, match=said): run_stages(recipe, {'all': data}, folder)
    assert [f.name for f in tmp_path.iterdir()] == ['notes.txt']
    (tmp_path/'new').mkdir()
    (tmp_path/'new/.hidden').write_text('')
    run_pretext(recipe.pretext, {'all': data}, None, tmp_path/'new')

REFUSED = {   # part of the recipe, what changes, what is said
    'network': ('pretext', dict(backbone='resnet9000'), 'resnet9000'),
    'clusters': ('pretext', dict(n_clusters=91), '91 clusters'),
    'neighbors': ('pretext', dict(n_neighbors=90), '90 neighbors'),
    'size': ('pretext', dict(size=9), '8×8 pixels'),
    'times': ('pretext', dict(time_window=60.), 'times'),
    'file': ('pretext', dict(setup='moco', pretrained='nowhere.pth.tar'), 'nowhere.pth.tar'),
    'scan of another network': ('scan', dict(backbone_options=dict(widths=(8, 32), stem_stride=1)), 'layer2'),
    'clusters of scan': ('selflabel', dict(n_clusters=4), 'cluster_head')}

@pytest.mark.parametrize('name', REFUSED)
def test_a_stage_that_cannot_be_leaves_nothing(name, whole, data, recipe, tmp_path):
    "It is refused at once, before training; what is put right goes on in the same folder."
    part, change, said = REFUSED[name]
    run = dict(pretext=run_pretext, scan=run_scan, selflabel=run_selflabel)[part]
    before = dict(scan=whole[0][0], selflabel=whole[0][1]).get(part)
    with pytest.raises(UserError, match=said) as e:
        run(replace(getattr(recipe, part), **change), {'all': data}, before, tmp_path/'run')
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()
    right = replace(getattr(recipe, part), setup='moco') if name == 'file' else getattr(recipe, part)
    run(right, {'all': data}, before, tmp_path/'run')

@pytest.mark.parametrize('change', [
    {'backbone': 'resnet9000'}, {'n_clusters': 91}, {'size': 9}, {'pretext.n_neighbors': 90},
    {'scan.n_neighbors': 90}, {'pretext.time_window': 60.},
    {'pretext.setup': 'moco', 'pretext.pretrained': 'nowhere.pth.tar'}], ids=str)
def test_a_run_that_cannot_be_leaves_nothing(change, data, recipe, tmp_path):
    ready = []
    with pytest.raises(UserError) as e:
        run_stages(recipe.change(change), {'all': data}, tmp_path/'run', ready=lambda _: ready.append(1))
    assert '\n' not in str(e.value) and not ready and not (tmp_path/'run').exists()

def test_all_images_need_times_for_a_window(data, recipe, tmp_path):
    timed, windowed = replace(data, times=torch.arange(90)*60), replace(recipe.pretext, time_window=90.)
    with pytest.raises(UserError, match='times'):
        run_pretext(windowed, dict(train=timed, test=data[:9]), None, tmp_path/'run')
    assert not (tmp_path/'run').exists()
    found = run_pretext(windowed, dict(train=timed, test=timed[:9]), None, tmp_path/'run')
    assert [*found.steps['neighbors']['splits']] == ['train', 'test']

@pytest.mark.parametrize('weights', [{'a': 1}, {'parts': [1]}, {'x': torch.ones(2)}, b'', b'garbage'],
                         ids=['a number', 'a list', 'other names', 'empty', 'garbage'])
def test_a_start_that_holds_no_network(weights, data, recipe, tmp_path):
    file = tmp_path/'start.pth.tar'
    file.write_bytes(weights) if isinstance(weights, bytes) else torch.save(weights, file)
    with pytest.raises(UserError, match='start.pth.tar') as e:
        run_scan(recipe.scan, {'all': data}, file, tmp_path/'run')
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()

def test_neighbors_of_other_images_beside_a_start(whole, data, recipe, tmp_path):
    torch.save(whole[0][0].weights, tmp_path/'start.pth.tar')
    np.save(tmp_path/'topk-train-neighbors.npy', np.full((90, 5), 90))
    with pytest.raises(UserError, match='do not belong to 90 images'):
        run_scan(recipe.scan, {'all': data}, tmp_path/'start.pth.tar', tmp_path/'run')

# -- damage --

NEEDED = ['pretext/simclr/embeddings.npy', *(f'{where}/{name}' for where in HOMES for name in (
    'outcome.pth.tar', 'model.pth.tar', 'topk-train-neighbors.npy', 'stage.json'))]

@pytest.mark.parametrize('how', ['cut', 'empty'])
@pytest.mark.parametrize('name', NEEDED)
def test_a_damaged_file_is_named(name, how, copy, data, recipe):
    raw = (copy/name).read_bytes()
    (copy/name).write_bytes({'cut': raw[:len(raw)//2], 'empty': b''}[how])
    before = listing(copy)
    with pytest.raises(UserError, match=re.escape(name)) as e: run_stages(recipe, {'all': data}, copy)
    assert '\n' not in str(e.value) and listing(copy) == before

GONE = [['outcome'], ['model'], ['stage.json'], ['model', 'topk-train-neighbors.npy'],
        ['model', 'embeddings.npy']]

@pytest.mark.parametrize('home, gone', [(home, gone) for home in HOMES for gone in GONE
                                        if home == HOMES[0] or 'embeddings.npy' not in gone], ids=str)
def test_what_is_deleted_comes_back(home, gone, whole, copy, data, recipe):
    "As messages advise: what is missing is made once more, to the bit, and the rest is as it was."
    for name in gone: (copy/home/(name if '.' in name else f'{name}.pth.tar')).unlink()
    found = run_stages(recipe, {'all': data}, copy)
    assert [o.sha256 for o in found] == [o.sha256 for o in whole[0]]
    assert of_stages(copy) == of_stages(whole[1])

def test_missing_features_are_named(copy, data, recipe):
    (copy/'pretext/simclr/embeddings.npy').unlink()
    with pytest.raises(UserError, match='embeddings.npy'): run_stages(recipe, {'all': data}, copy)

@pytest.mark.parametrize('how', ['cut', 'other'])
@pytest.mark.parametrize('name', ['scan/heads.pth.tar', *(f'{where}/checkpoint.pth.tar' for where in HOMES)])
def test_a_damaged_checkpoint_is_named(name, how, whole, copy, data, recipe):
    "On the way; a finished stage needs none. Without it the stage is trained anew, to the same bits."
    raw, where = (copy/name).read_bytes(), (copy/name).parent
    if how == 'other': torch.save(dict(something=1), copy/name)
    else: (copy/name).write_bytes(raw[:-100])
    run_stages(recipe, {'all': data}, copy)
    (where/'model.pth.tar').unlink()
    with pytest.raises(UserError, match=re.escape(name)): run_stages(recipe, {'all': data}, copy)
    (copy/name).unlink()
    run_stages(recipe, {'all': data}, copy)
    assert of_stages(copy) == of_stages(whole[1])

@pytest.mark.parametrize('where', HOMES)
@pytest.mark.parametrize('change', [dict(stage='other'), dict(recipe=dict(colour=1)), dict(more=1)], ids=str)
def test_an_outcome_of_another_kind_is_named(where, change, copy, data, recipe):
    file = copy/where/'outcome.pth.tar'
    torch.save(torch.load(file, weights_only=True) | change, file)
    with pytest.raises(UserError, match='outcome.pth.tar.*another kind'):
        run_stages(recipe, {'all': data}, copy)

def test_the_checkpoint_of_another_run_is_named(copy, data, recipe):
    (copy/'scan/model.pth.tar').unlink()
    shutil.copy(copy/'selflabel/checkpoint.pth.tar', copy/'scan/checkpoint.pth.tar')
    with pytest.raises(UserError, match='scan/checkpoint.pth.tar.*another run'):
        run_stages(recipe, {'all': data}, copy)

def test_files_hold_data_and_no_code(whole):
    for file in whole[1].rglob('*.pth.tar'): torch.load(file, weights_only=True)
    for file in whole[1].rglob('*.npy'): np.load(file, allow_pickle=False)

def test_no_run(tmp_path):
    for folder in (tmp_path, tmp_path/'missing'):
        with pytest.raises(UserError, match='no stage is finished there'): read_run(folder)

# -- every setting reaches the result --

SWITCHES = {   # of a stage -> settings, each with what it needs to matter
    'pretext': [
        dict(setup='moco'), dict(head='linear'), dict(features_dim=64), dict(temperature=.1), dict(warmup=.9),
        dict(n_neighbors=2), dict(whiten=.5), dict(mutual=True), dict(n_views=2), dict(optimizer='adam'),
        dict(views='standard', views_options={}), dict(views_options=dict(flip_p=.5)), dict(lr=.2),
        dict(momentum=.5), dict(weight_decay=.1), dict(nesterov=True), dict(scheduler='constant'),
        dict(scheduler='step', lr_decay_epochs=(1,)), dict(lr_decay_rate=.5), dict(epochs=1), dict(seed=4),
        dict(batch_size=45), dict(size=6), dict(mean=(.5,), std=(.3,)), dict(n_networks=2, more_views=({},)),
        dict(backbone_options=dict(widths=(8, 24), stem_stride=1)),
        dict(backbone_options=dict(widths=(8, 16), stem_stride=2)),
        dict(backbone='resnet18', backbone_options={}, epochs=1, batch_size=90)],
    'moco': [dict(queue_size=60), dict(key_momentum=.5), dict(temperature=.1)],
    'scan': [
        dict(entropy_weight=2.), dict(n_neighbors=1), dict(head_only=True), dict(heads_epochs=0),
        dict(heads_epochs=0, n_heads=2), dict(tried_heads=9), dict(prior='estimate'),
        dict(objective='temi'), dict(heads_decay=.5), dict(prior=(.5, .3, .2)), dict(remine_every=1),
        dict(views='standard', views_options={}), dict(exchanges=2),
        dict(optimizer='sgd'), dict(lr=1e-4), dict(epochs=1), dict(epochs=0), dict(batch_size=45),
        dict(seed=4), dict(scheduler='constant')],
    'selflabel': [
        dict(threshold=.5), dict(balance=False), dict(ema_decay=None), dict(ema_decay=.5),
        dict(entropy_weight=0.), dict(prior='estimate'), dict(prior=(.5, .3, .2)), dict(soft_targets=True),
        dict(views='ours', views_options={}), dict(optimizer='sgd'), dict(lr=1e-4), dict(epochs=1),
        dict(batch_size=45), dict(seed=4)]}

@pytest.fixture(scope='module')
def bases(whole, data, recipe):
    "The recipe of each stage, what it begins with, how it runs and what comes out."
    moco = replace(recipe.pretext, setup='moco')
    given = {'pretext': (recipe.pretext, None, run_pretext), 'moco': (moco, None, run_pretext),
             'scan': (recipe.scan, whole[0][0], run_scan),
             'selflabel': (recipe.selflabel, whole[0][1], run_selflabel)}
    return {name: (r, before, run, result(run(r, {'all': data}, before)))
            for name, (r, before, run) in given.items()}

@pytest.mark.parametrize('name, change', [(name, some) for name in SWITCHES for some in SWITCHES[name]],
                         ids=lambda v: v if isinstance(v, str) else '-'.join(f'{k}={v[k]}' for k in v))
def test_each_setting_reaches_the_result(name, change, bases, data):
    r, before, run, usual = bases[name]
    changed = run(replace(r, **change), {'all': data}, before)
    assert changed.recipe == replace(r, **change) != r
    assert any(plain(getattr(changed, key)) != usual[key]
               for key in ('weights', 'neighbors', 'embeddings', 'history', 'clusters'))

def test_the_choice_of_heads_decides(data, recipe, whole):
    z, near = whole[0][0].embeddings, whole[0][0].neighbors
    def best(seed):
        heads = train_heads(z, near, 3, n_heads=6, epochs=3, seed=seed, entropy_weight=5.)
        return heads.losses.argmin().item(), heads.agreement.argmax().item()
    seed = next(seed for seed in range(20) if len({*best(seed)}) == 2)
    for choice, head in zip(('loss', 'agreement'), best(seed)):
        scan = replace(recipe.scan, tried_heads=6, heads_epochs=3, epochs=0, head_choice=choice, seed=seed)
        reason = run_scan(scan, {'all': data}, whole[0][0]).steps['heads']['reason']
        assert reason == f'head {head} of 6, chosen without labels'

def test_heads_exchange_parts(data, recipe, whole):
    z, near = whole[0][0].embeddings, whole[0][0].neighbors
    scan = replace(recipe.scan, tried_heads=6, heads_epochs=6, epochs=0, exchanges=3, head_choice='both',
                   seed=1)
    fit = dict(entropy_weight=5., choose='both', seed=1)
    first = train_heads(z, near, 3, n_heads=6, epochs=6, **fit)
    best = exchange_parts(first, z, near, rounds=3, **fit)
    found = run_scan(scan, {'all': data}, whole[0][0])
    assert found.steps['heads']['reason'] == 'the best of 6 heads, which exchanged parts 3 times'
    assert torch.equal(found.model.cluster_head(z)[0], best.heads(z)[best.best])

def test_heads_read_one_network_at_a_time(data, recipe):
    begun = run_pretext(recipe.change(OTHER).pretext, {'all': data})
    fit = dict(entropy_weight=5., seed=1)
    two = dict(n_networks=2, tried_heads=6, heads_epochs=6, epochs=0, exchanges=2, seed=1)
    for one_network, n in (True, 2), (False, 1):
        first = train_heads(begun.embeddings, begun.neighbors, 3, n_heads=6, epochs=6, n_networks=n, **fit)
        best = exchange_parts(first, begun.embeddings, begun.neighbors, rounds=2, n_networks=n, **fit)
        found = run_scan(replace(recipe.scan, one_network=one_network, **two), {'all': data}, begun)
        torch.testing.assert_close(found.model.cluster_head(begun.embeddings)[0],
                                   best.heads(begun.embeddings)[best.best])

def test_the_index_reaches_the_mining(data, recipe, whole, monkeypatch):
    used = []
    def watch(z, k, index, *rest):
        used.append(index)
        return mine_neighbors(z, k, index, *rest)
    monkeypatch.setattr(stages, 'mine_neighbors', watch)
    found = run_pretext(replace(recipe.pretext, index='hnsw'), {'all': data})
    assert used == ['hnsw'] and (found.neighbors == whole[0][0].neighbors).float().mean() > .9

def test_neighbors_keep_their_distance_in_time(data, recipe):
    timed = replace(data, times=torch.arange(90).double()*60)
    near = run_pretext(replace(recipe.pretext, time_window=150.), {'all': timed}).neighbors
    assert ((timed.times[near] - timed.times[:, None]).abs() > 150).all()
    without = run_pretext(recipe.pretext, {'all': timed}).neighbors
    assert ((timed.times[without] - timed.times[:, None]).abs() <= 150).any()

def test_held_out_images_have_neighbors_of_their_own(data, recipe):
    parts = dict(train=data[::2], test=data[1::2])
    few, many = (run_pretext(replace(recipe.pretext, n_neighbors_val=k), parts).steps['neighbors']['splits']
                 for k in (2, 9))
    assert few['train'] == many['train'] and few['test'] != many['test']
    alone = run_stages(recipe, dict(all=data[::2]))
    for o, held in zip(alone, run_stages(recipe, parts), strict=True):
        assert plain(o.weights) == plain(held.weights)

def test_two_networks_learn_alone_and_join_their_features(data, recipe, tmp_path):
    views = OTHER['pretext.more_views'][0]
    one, other = (run_pretext(recipe.change({'pretext.views_options': options}).pretext, {'all': data})
                  for options in (recipe.pretext.views_options, views))
    both = run_pretext(recipe.change(OTHER).pretext, {'all': data}, None, tmp_path)
    joined = torch.cat([F.normalize(one.embeddings), F.normalize(other.embeddings)], 1)
    torch.testing.assert_close(both.embeddings, joined, rtol=0, atol=1e-6)
    assert torch.equal(both.neighbors, mine_neighbors(both.embeddings, 3))
    assert both.history == dict(one.history, pretext2=other.history['pretext'])
    assert {f.name for f in (tmp_path/'pretext/simclr').glob('checkpoint*')} == {
        'checkpoint.pth.tar', 'checkpoint-2.pth.tar'}
    rest = [run_stages(recipe.change(OTHER), {'all': data}, folder)[1:] for folder in (None, tmp_path)]
    for made, read in zip(*rest, strict=True): assert plain(made.weights) == plain(read.weights)
    assert read_run(tmp_path)[-1].load().backbone.dim == 32

def test_networks_of_the_same_views_differ_by_their_draw(data, recipe, tmp_path):
    views = recipe.pretext.views_options
    more = [*OTHER['pretext.more_views'], views]
    three = recipe.change({'n_networks': 3, 'pretext.more_views': more}).pretext
    found = run_pretext(three, {'all': data}, None, tmp_path)
    one, again = (run_pretext(replace(recipe.pretext, seed=recipe.pretext.seed + further), {'all': data})
                  for further in (0, 10_000))
    assert found.history['pretext'] == one.history['pretext'] != again.history['pretext']
    assert found.history['pretext3'] == again.history['pretext']
    torch.testing.assert_close(found.embeddings[:, 32:], F.normalize(again.embeddings), rtol=0, atol=1e-6)
    assert (tmp_path/'pretext/simclr/checkpoint-3.pth.tar').exists() and 'pretext3' in STAGE_NAMES

def test_a_kill_in_the_second_network_spares_the_first(data, recipe, tmp_path, monkeypatch, capsys):
    real, count = training.train_epoch, []
    def deadly(*a):
        count.append(1)
        if len(count) == 4: raise Killed
        return real(*a)
    monkeypatch.setattr(training, 'train_epoch', deadly)
    both, say = recipe.change(OTHER).pretext, Listener()
    with pytest.raises(Killed): run_pretext(both, {'all': data}, None, tmp_path)
    run_pretext(both, {'all': data}, None, tmp_path, say=say, progress=True)
    assert len(count) == 5 and '1/4 SimCLR (network 2 of 2): ' in capsys.readouterr().err
    for i, line in enumerate(say[:2]):
        assert line.startswith(f'simclr (network {i + 1} of 2) continues after epoch {2 - i} of 2')
    rows = [json.loads(line) for line in (tmp_path/'pretext/simclr/metrics.jsonl').read_text().splitlines()]
    assert [(r['stage'], r['epoch']) for r in rows] == [
        ('pretext', 1), ('pretext', 2), ('pretext2', 1), ('pretext2', 2)]

# -- sets of several kinds --

def test_more_images_for_the_pretext_task(data, recipe, tmp_path):
    "STL-10's way: features from many images without labels; neighbors and clusters from those with labels."
    more = ImageSet(digits().images[200:380], torch.full((180,), -1))
    images = dict(train=data[::2], test=data[1::2], pretext=more)
    found = run_stages(recipe, images, tmp_path/'run')
    alone = run_stages(recipe, dict(all=data[::2]))
    learned = run_pretext(recipe.pretext, dict(all=more))
    assert plain(found[0].weights) == plain(learned.weights) != plain(alone[0].weights)
    assert found[0].embeddings.shape == (45, 16)
    assert found[0].neighbors.shape == (45, 3) and found[0].neighbors.max() < 45
    assert found[1].weights['normalize']['mean'].equal(learned.weights['normalize']['mean'])
    assert {k: len(v) for k, v in found[-1].clusters['selflabel'].items()} == dict(train=45, test=45)
    asked = [json.loads((tmp_path/'run'/where/'stage.json').read_text())['images'] for where in HOMES]
    assert [*map(list, asked)] == [['train', 'test', 'pretext'], ['train', 'test'], ['train', 'test']]
    with pytest.raises(UserError, match=r'images\.pretext\.images: 180 → 170'):
        run_stages(recipe, images | dict(pretext=more[:170]), tmp_path/'run')
    del images['pretext']   # what comes after the pretext task asks for its images no more
    assert plain(run_scan(recipe.scan, images, None, tmp_path/'run').weights) == plain(found[1].weights)

def test_unlabeled_images_among_labeled_ones(data, recipe):
    partly = replace(data, labels=data.labels.clone().index_fill_(0, torch.arange(0, 90, 2), -1))
    found, full = (run_stages(recipe, {'all': d}) for d in (partly, data))
    assert 0 < found[0].steps['neighbors']['splits']['all']['knn_accuracy'] <= 1
    assert 0 < found[-1].steps['selflabel']['splits']['all']['acc'] <= 1
    for a, b in zip(found, full): assert plain(a.weights) == plain(b.weights)

@pytest.mark.parametrize('known', [0, 1])
def test_too_few_labels_to_grade(known, data, recipe):
    labels = torch.full((90,), -1)
    labels[:known] = 1
    found = run_pretext(recipe.pretext, {'all': replace(data, labels=labels)})
    assert 'knn_accuracy' not in found.steps['neighbors']['splits']['all']

def test_larger_images_are_looked_at_in_their_center(data, recipe):
    "A frame around the images changes nothing where views are as large as the images were."
    x = torch.arange(2*3*9*8).view(2, 3, 9, 8)
    assert torch.equal(center_crop(x, 4), x[:, :, 2:6, 2:6]) and center_crop(x, 10).shape == x.shape
    assert center_crop(x, 4)._base is not None   # nothing is copied
    framed = replace(data, images=F.pad(data.images, (2, 2, 2, 2), value=9))
    r = PretextRecipe(n_clusters=3, size=8)
    flat = torch.nn.Flatten()
    plain_pairs, framed_pairs = (find_pairs(r, flat, d, 3, torch.device('cpu')) for d in (data, framed))
    assert all(map(torch.equal, plain_pairs, framed_pairs))
    small = Recipe.for_images(framed, base=TINY.change({'size': 8}))
    for o in run_stages(small, {'all': framed}):
        model, seen = o.load(), framed.images[:, :, 2:-2, 2:-2]
        if o.embeddings is not None: assert torch.equal(embed(model, seen), o.embeddings)
        if not o.clusters: continue
        assert torch.equal(logits_of(model, seen).argmax(1).int(), list(o.clusters.values())[-1]['all'])

# -- how long it will take --

@pytest.mark.parametrize('change', [
    {}, {'pretext.setup': 'moco'}, {'pretext.index': 'ivf'}, {'scan.epochs': 0}, OTHER,
    {'pretext.setup': 'moco', 'pretext.pretrained': __file__}],
    ids=['usual', 'moco', 'ivf', 'no epochs', 'two networks', 'pretrained'])
def test_the_estimate(data, recipe, change):
    changed, state, before = recipe.change(change), torch.get_rng_state(), data.images.clone()
    seconds = estimate_seconds(changed, {'all': data})
    assert seconds.keys() == {'pretext', 'neighbors', 'heads', 'scan', 'selflabel'}
    for name, value in seconds.items():
        nothing = dict(scan=changed.scan.epochs == 0, pretext=changed.pretext.pretrained is not None)
        assert value == 0 if nothing.get(name) else value > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data.images, before)

def test_weights_can_be_read_by_all(whole):
    for o in whole[0]: assert plain(read_weights(o.file)) == plain(o.weights)
