"Stages as programs: each finds the one before, a killed one continues, and what does not fit is refused."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from scan_nb import stages
from scan_nb.cli import main
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.eval import load_model, run_eval
from scan_nb.evaluate import cluster_metrics
from scan_nb.recipes import PretextRecipe, ScanRecipe, SelfLabelRecipe, to_yaml
from scan_nb.stages import (Stage, center_crop, cluster_scores, find_pairs, find_start, load_part, open_stage,
                            run_pretext, run_scan, run_selflabel, top_k_accuracy)

REPO = Path(__file__).parents[1]
NAMES = 'moco', 'simclr', 'scan', 'selflabel', 'eval'
pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'.cache'))

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "90 gray PNGs of three digits, in class folders."
    folder, d = tmp_path_factory.mktemp('data')/'three', digits()
    for c in range(3):
        (folder/f'd{c}').mkdir(parents=True)
        for i, x in enumerate(d.images[d.labels == c][:30, 0]):
            Image.fromarray(x.numpy()).save(folder/f'd{c}'/f'{i:02}.png')
    return folder

def recipes(data, **changes):
    shared = dict(data=str(data), n_clusters=3, size=8, backbone='small_resnet', views='simclr',
                  batch_size=30, backbone_options=dict(widths=[8, 16]), epochs=2) | changes
    adam = dict(optimizer='adam', lr=1e-3)
    return dict(simclr=PretextRecipe(**shared, setup='simclr', lr=.1, n_neighbors=4),
                moco=PretextRecipe(**shared, setup='moco', lr=.1, n_neighbors=4, queue_size=30),
                scan=ScanRecipe(**shared, **adam, n_neighbors=4, heads_epochs=3),
                selflabel=SelfLabelRecipe(**shared, **adam, threshold=.5))

class Listener(list):
    def __call__(self, line): self.append(line)
    @property
    def text(self): return '\n'.join(self)

def stage(recipe, root):
    return Stage(recipe, dict(root_dir=str(root)), torch.device('cpu'), Listener(), False)

@pytest.fixture(scope='module')
def done(pictures, tmp_path_factory):
    "The whole chain once, in one process: the root folder."
    root = tmp_path_factory.mktemp('results')
    os.environ['XDG_CACHE_HOME'] = str(root/'.cache')
    r = recipes(pictures)
    run_pretext(stage(r['moco'], root))
    run_pretext(stage(r['simclr'], root))
    run_scan(stage(r['scan'], root))
    run_selflabel(stage(r['selflabel'], root))
    return root

def home(root, *parts): return root.joinpath('three', *parts)

@pytest.fixture
def files(pictures, tmp_path):
    "The same recipes as YAML, with an environment: the words of a command."
    (tmp_path/'env.yml').write_text(f'root_dir: {tmp_path/"results"}\n')
    for name, r in recipes(pictures).items(): (tmp_path/f'{name}.yml').write_text(to_yaml(r))
    def words(name, *more):
        config = tmp_path/f"{'selflabel' if name == 'eval' else name}.yml"
        return [name, '--config_env', str(tmp_path/'env.yml'), '--config_exp', str(config), '--device', 'cpu',
                *map(str, more)]
    return words

# -- the chain --

@pytest.mark.parametrize('name', ['simclr', 'scan', 'selflabel'])
def test_precision_and_compile_reach_the_network(done, pictures, tmp_path, monkeypatch, name):
    class Asked(Exception): pass
    def tune(model, *how): raise Asked(*how)
    monkeypatch.setattr(stages, 'tune', tune)
    s = stage(replace(recipes(pictures)[name], precision='float32', compile=True), tmp_path)
    run = dict(simclr=run_pretext, scan=run_scan, selflabel=run_selflabel)[name]
    start = {'scan': 'pretext/simclr', 'selflabel': 'scan'}.get(name)
    with pytest.raises(Asked) as asked: run(s, *[home(done, start, 'model.pth.tar')] if start else [])
    assert asked.value.args == ('float32', True)

def test_a_stage_says_how_it_computes(pictures, tmp_path):
    s = stage(replace(recipes(pictures)['simclr'], compile=True, epochs=1), tmp_path)
    run_pretext(s)
    assert s.say[0].endswith('on cpu in float32')

def test_a_folder_from_before_a_setting_existed_is_continued(done, pictures):
    file = home(done, 'scan', 'stage.json')
    now = json.loads(file.read_text())
    old = now | dict(recipe={k: v for k, v in now['recipe'].items() if k not in ('precision', 'compile')})
    file.write_text(json.dumps(old))
    s = stage(recipes(pictures)['scan'], done)
    run_scan(s)
    assert 'was finished before' in s.say.text and json.loads(file.read_text()) == now

def test_each_stage_leaves_its_files(done):
    for name in ('pretext/moco', 'pretext/simclr', 'scan', 'selflabel'):
        found = {p.name for p in home(done, name).iterdir()}
        assert found >= {'model.pth.tar', 'checkpoint.pth.tar', 'stage.json', 'metrics.json', 'metrics.jsonl',
                         'recipe.yml'}
        assert not [f for f in found if f.startswith('.')]
    assert {'topk-train-neighbors.npy'} <= {p.name for p in home(done, 'pretext/moco').iterdir()}

def test_models_have_the_authors_layout(done):
    pretext, scan = (torch.load(home(done, f, 'model.pth.tar'), weights_only=True)
                     for f in ('pretext/simclr', 'scan'))
    heads = {f'contrastive_head.{i}.{kind}' for i in (0, 2) for kind in ('weight', 'bias')}
    assert {*heads, 'backbone.conv1.weight'} <= pretext['model'].keys()
    assert scan['head'] == 0 and scan['model']['cluster_head.0.weight'].shape == (3, 16)
    assert not [k for k in scan['model'] if not k.startswith(('backbone.', 'cluster_head.'))]

def test_commands_do_the_same(done, files, capsys, tmp_path):
    "The shell's words, in the issue's order: the models are equal to the bit."
    for name in ('moco', 'simclr', 'scan', 'selflabel'): assert main(files(name)) == 0
    out = capsys.readouterr().out
    for name in ('pretext/moco', 'pretext/simclr', 'scan', 'selflabel'):
        mine, other = (torch.load(home(root, name, 'model.pth.tar'), weights_only=True)['model']
                       for root in (done, tmp_path/'results'))
        assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
        assert str(home(tmp_path/'results', name, 'model.pth.tar')) in out
    assert f"starts from {home(tmp_path/'results', 'pretext/simclr')}" in out

def test_eval_prints_what_the_model_scores(done, pictures, files, capsys, tmp_path):
    model = home(done, 'selflabel', 'model.pth.tar')
    before = {p.name for p in model.parent.iterdir()}
    assert main(files('eval', '--model', model, '--visualize_prototypes')) == 0
    out = capsys.readouterr().out
    s = stage(recipes(pictures)['selflabel'], tmp_path)
    data = load_part(s.recipe, 'train', {})
    clusters = load_model(s, model).predict_proba(data.images).argmax(1)
    want = cluster_metrics(clusters, data.labels)
    for key in ('acc', 'nmi', 'ari'): assert f'{key.upper()} {100*want[key]:.2f}' in out
    assert 'top-5' not in out                                      # three clusters: nothing to say
    assert {p.name for p in model.parent.iterdir()} - before == {'confusion.png', 'prototypes.png'}
    for name in ('confusion.png', 'prototypes.png'): assert Image.open(model.parent/name).size[0] > 50

def test_eval_judges_a_pretext_model(done, pictures):
    s = stage(recipes(pictures)['simclr'], done)
    scores = run_eval(s)
    assert 0 < scores['neighbor_accuracy'] <= 1 and 'kNN accuracy' in s.say.text

def test_a_finished_stage_is_not_repeated(done, pictures):
    for name, run in (('simclr', run_pretext), ('scan', run_scan), ('selflabel', run_selflabel)):
        s = stage(recipes(pictures)[name], done)
        before = s.model_file.stat().st_mtime_ns
        run(s)
        assert s.model_file.stat().st_mtime_ns == before and 'finished before' in s.say.text
        assert str(s.model_file) in s.say.text

@pytest.mark.parametrize('name', NAMES)
def test_is_a_module_too(name):
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    words = [sys.executable, '-m', f'scan_nb.{name}', '--help']
    found = subprocess.run(words, capture_output=True, text=True, env=env)
    assert found.returncode == 0 and found.stderr == ''
    assert all(word in found.stdout for word in (f'scan-nb {name}', '--config_env', '--config_exp'))

@pytest.mark.parametrize('name', ['simclr', 'scan'])
def test_killed_and_continued(name, done, files, tmp_path):
    "SIGKILL as soon as the first checkpoint is there; the same words continue, to the same bits."
    if name == 'scan': assert main(files('simclr')) == 0
    folder = home(tmp_path/'results', 'pretext/simclr' if name == 'simclr' else name)
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, '-m', f'scan_nb.{name}', *files(name)[1:]], env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder/'checkpoint.pth.tar').exists(): time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder/'checkpoint.pth.tar').exists() and not (folder/'model.pth.tar').exists()
    assert main(files(name)) == 0
    mine, other = (torch.load(home(root, folder.relative_to(home(tmp_path/'results')), 'model.pth.tar'),
                              weights_only=True)['model'] for root in (tmp_path/'results', done))
    assert all(torch.equal(mine[k], other[k]) for k in other)

def test_says_where_it_continues(pictures, tmp_path, monkeypatch):
    "A crash between training and the neighbors: the trained epochs are not lost."
    s = stage(recipes(pictures)['simclr'], tmp_path)
    with monkeypatch.context() as m:
        m.setattr(stages, 'find_pairs', lambda *a: 1/0)
        with pytest.raises(ZeroDivisionError): run_pretext(s)
    assert not s.model_file.exists()
    run_pretext(s)
    assert 'continues after epoch 2 of 2' in s.say.text

# -- where a stage starts --

def test_the_newest_pretext_is_the_start(done, tmp_path, pictures):
    s = stage(recipes(pictures)['scan'], tmp_path)
    for i, name in enumerate(('moco', 'simclr')):
        file = home(tmp_path, 'pretext', name, 'model.pth.tar')
        file.parent.mkdir(parents=True)
        file.write_bytes(home(done, 'pretext', name, 'model.pth.tar').read_bytes())
        os.utime(file, (1e9 - i, 1e9 - i))
    assert find_start(s).parent.name == 'moco'

def test_the_authors_place_is_known(pictures, tmp_path):
    "They write pretext/model.pth.tar, and lists of neighbors that begin with the image itself."
    root = tmp_path/'theirs'
    trained = run_pretext(stage(recipes(pictures)['simclr'], tmp_path/'ours'))
    state = torch.load(trained, weights_only=True)['model']
    home(root, 'pretext').mkdir(parents=True)
    torch.save(state, home(root, 'pretext', 'model.pth.tar'))   # a raw state dict
    near = np.load(trained.parent/'topk-train-neighbors.npy')
    np.save(home(root, 'pretext', 'topk-train-neighbors.npy'), np.c_[np.arange(90), near])
    s = stage(recipes(pictures)['scan'], root)
    run_scan(s)
    assert (np.load(home(root, 'scan', 'topk-train-neighbors.npy')) == near).all()
    assert 'mines' not in s.say.text

def test_neighbors_are_mined_when_there_are_none(done, pictures, tmp_path):
    s, file = stage(recipes(pictures)['scan'], tmp_path), tmp_path/'weights.pth.tar'
    file.write_bytes(home(done, 'pretext/simclr', 'model.pth.tar').read_bytes())
    run_scan(s, str(file))
    assert 'mines 4 neighbors' in s.say.text
    theirs = np.load(home(done, 'pretext/simclr', 'topk-train-neighbors.npy'))
    assert (np.load(home(tmp_path, 'scan', 'topk-train-neighbors.npy')) == theirs).all()

@pytest.mark.parametrize('name, run, word', [('scan', run_scan, 'simclr'),
                                             ('selflabel', run_selflabel, 'scan-nb scan')])
def test_says_what_is_missing(name, run, word, pictures, tmp_path):
    with pytest.raises(UserError, match=word): run(stage(recipes(pictures)[name], tmp_path))
    with pytest.raises(UserError, match='nowhere'):
        run(stage(recipes(pictures)[name], tmp_path), 'nowhere.pth.tar')

# -- what is refused --

def refused(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith('scan-nb: ') and err.count('\n') == 1 and 'Traceback' not in err
    return err

def test_another_recipe_in_the_folder_is_refused(done, pictures):
    old = home(done, 'pretext/simclr', 'stage.json').read_bytes()
    with pytest.raises(UserError, match=r'recipe\.temperature: 0\.1 → 0\.3'):
        run_pretext(stage(replace(recipes(pictures)['simclr'], temperature=.3), done))
    assert home(done, 'pretext/simclr', 'stage.json').read_bytes() == old

def test_another_start_is_refused(done, pictures):
    with pytest.raises(UserError, match='start: '):
        run_scan(stage(recipes(pictures)['scan'], done), str(home(done, 'pretext/moco', 'model.pth.tar')))

def test_other_images_are_refused(done, pictures):
    s = stage(recipes(pictures)['simclr'], done)
    with pytest.raises(UserError, match='images'): open_stage(s, load_part(s.recipe, 'train', {})[:50])

def test_faults_of_a_command(files, capsys, tmp_path):
    assert 'recipe for simclr' in refused(['moco', *files('simclr')[1:]], capsys)
    assert "did you mean 'epochs'" in refused(files('simclr', '--set', 'epoch=3'), capsys)
    assert 'scan-nb scan' in refused(files('selflabel'), capsys)
    assert 'model.pth.tar' in refused(files('eval'), capsys)
    assert 'absent.yml' in refused(['scan', '--config_exp', 'absent.yml'], capsys)
    assert 'config_exp' in refused(['eval'], capsys)

def test_a_model_of_another_network_is_refused(done, pictures):
    s = stage(recipes(pictures)['selflabel'], done)
    deeper = dict(backbone_options=dict(widths=[8, 16, 32]))
    other = [(dict(n_clusters=4), 'cluster_head'), (deeper, 'layer3')]
    for change, word in other:
        with pytest.raises(UserError, match=word):
            load_model(replace(s, recipe=replace(s.recipe, **change)), s.model_file)
    with pytest.raises(UserError, match='cluster_head'):
        load_model(s, home(done, 'pretext/simclr', 'model.pth.tar'))

@pytest.mark.parametrize('env, name, word', [
    ({}, 'imagenet', 'Where is ImageNet'),
    (dict(data=dict(imagenet_50=dict(root='x'))), 'imagenet_50', 'Which classes'),
    ({}, 'no-such-folder', 'no-such-folder'),
    (dict(data=dict(mine=dict(root='x', lables='y'))), 'mine', 'lables')])
def test_data_that_is_not_there(env, name, word):
    recipe = ScanRecipe(data=name, n_clusters=3, size=8)
    with pytest.raises(UserError, match=word): load_part(recipe, 'train', env)

# -- scores --

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 9), st.integers(1, 4))
def test_top_k_is_scikit_learns(seed, c, k):
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, c, generator=g), torch.randint(c, (40,), generator=g)
    match = torch.randperm(c, generator=g)
    by_class = torch.empty_like(logits)
    by_class[:, match] = logits
    want = top_k_accuracy_score(labels, by_class, k=k, labels=range(c))
    assert top_k_accuracy(logits, labels, match, k) == pytest.approx(want)

def test_scores_without_or_with_few_labels():
    logits = torch.eye(6)[torch.arange(60) % 6]*5
    none = cluster_scores(logits, None)
    assert none == dict(images=60, clusters=6, effective_clusters=pytest.approx(6))
    labels = torch.full((60,), -1)
    assert cluster_scores(logits, labels) == none
    labels[:6] = torch.arange(6).roll(2)
    assert cluster_scores(logits, labels) | dict(images=60) == cluster_scores(logits, labels)
    assert cluster_scores(logits, labels)['acc'] == 1 == cluster_scores(logits, labels)['top5']

def test_unlabeled_images_in_the_training_set(pictures, tmp_path, monkeypatch):
    "STL-10's way: some images have no label."
    data = load_part(recipes(pictures)['simclr'], 'train', {})
    partly = replace(data, labels=data.labels.clone().index_fill_(0, torch.arange(0, 90, 2), -1))
    monkeypatch.setattr(stages, 'load_part', lambda r, part, env: None if part == 'test' else partly)
    s = stage(recipes(pictures)['simclr'], tmp_path)
    run_pretext(s)
    assert 0 < json.loads((s.folder/'metrics.json').read_text())['train']['knn_accuracy'] <= 1
    s = stage(recipes(pictures)['scan'], tmp_path)
    run_scan(s)
    assert 0 < json.loads((s.folder/'metrics.json').read_text())['train']['acc'] <= 1

def test_larger_images_are_evaluated_at_their_center():
    x = torch.arange(2*3*9*8).view(2, 3, 9, 8)
    assert torch.equal(center_crop(x, 4), x[:, :, 2:6, 2:6]) and center_crop(x, 10).shape == x.shape
    assert center_crop(x, 4).data_ptr() != 0 and center_crop(x, 4)._base is not None    # nothing is copied

def test_neighbors_keep_their_distance_in_time():
    g = torch.Generator().manual_seed(0)
    images, times = torch.randint(256, (40, 1, 8, 8), generator=g).byte(), torch.arange(40.).double()*60
    data = ImageSet(images, times=times)
    r = PretextRecipe(data='x', n_clusters=2, size=8, time_window=150.)
    _, near = find_pairs(r, torch.nn.Flatten(), data, 5, torch.device('cpu'))
    assert ((times[near] - times[:, None]).abs() > 150).all()

# -- the shipped recipes --

def test_presets_name_data_that_can_be_loaded(monkeypatch):
    "Each name in a shipped recipe leads to the loader of that data set."
    from scan_nb.recipes import PAPER
    called = []
    for name in stages.LOADERS:
        monkeypatch.setitem(stages.LOADERS, name, lambda *a, name=name: called.append(name))
    monkeypatch.setattr(stages, 'stl10', lambda *a: called.append('stl-10'))
    monkeypatch.setattr(stages, 'imagenet_subset', lambda *a, **k: called.append('imagenet'))
    env = dict(data={name: dict(root='x', classes='y') for name in PAPER if name.startswith('imagenet')})
    for name, recipe in PAPER.items():
        load_part(recipe.scan, 'train', env)
        assert called[-1] == ('imagenet' if name.startswith('imagenet') else name)
