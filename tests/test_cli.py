"The command line: a run at once or stage by stage, one sentence for wrong input, quick help."
import csv, io, json, os, re, runpy, shlex, shutil, signal, subprocess, sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from PIL import Image
from scan_nb import cli, datasets, report, stages
from scan_nb.cli import main
from scan_nb.data import UserError, digits
from scan_nb.datasets import DATASETS, open_images, synthetic_aurora
from scan_nb.evaluate import cluster_metrics
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import PRESETS, load_stages, to_yaml
from scan_nb.recipes import PretextRecipe, Recipe, ScanRecipe, SelfLabelRecipe
from shell import start, stop, without_figures
from test_datasets import FAKE, write_cifar10, write_stl

REPO = Path(__file__).parents[1]
NAMES = ('run', 'simclr', 'moco', 'frozen', 'scan', 'selflabel', 'predict', 'sort', 'eval', 'report',
         'bench')
SMALL = ['--device', 'cpu', '--n-clusters', '3', '--epochs', '2', '--set', 'backbone_options.widths=[8, 16]',
         '--set', 'scan.tried_heads=2', '--set', 'scan.heads_epochs=3', '--set', 'pretext.n_neighbors=3']
TINY = [*SMALL, '--set', 'scan.epochs=1', '--set', 'selflabel.epochs=1']

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'.cache'))

@pytest.fixture
def no_figures(monkeypatch):
    "Reports without pictures of curves, which take longer than a tiny run."
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "60 gray PNGs in no subfolder, and one that is none."
    folder = tmp_path_factory.mktemp('pictures')
    for i, x in enumerate(digits().images[:60, 0]): Image.fromarray(x.numpy()).save(folder/f'{i:02}.png')
    (folder/'broken.png').write_bytes(b'')
    return folder

@pytest.fixture(scope='module')
def run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'run'
    os.environ['XDG_CACHE_HOME'] = str(folder.parent/'cache')
    assert main(['run', str(pictures), '--out', str(folder), *TINY]) == 0
    return folder

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "Public data sets in little, in their true formats; the words that say where they and the results are."
    root = tmp_path_factory.mktemp('sets')
    write_stl(root, train=24, test=9, unlabeled=6)
    write_cifar10(root)
    (root/'FashionMNIST/raw').mkdir(parents=True)
    for name, raw in FAKE.items(): (root/'FashionMNIST/raw'/name).write_bytes(raw)
    (root/'env.yml').write_text(f'root_dir: {root}/results\ndata:\n  CIFAR_10: {root}\n  fashion_mnist: '
                                f'{{root: {root}}}\n  stl10: {{root: {root}, cache: {root}/cache}}\n')
    return ['--config_env', str(root/'env.yml')]

def with_labels(folder, n_classes=10):
    "The first 60 digits in class folders."
    for i, (x, y) in enumerate(zip(digits().images[:60, 0], digits().labels[:60].tolist())):
        (folder/f'class{y % n_classes}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(folder/f'class{y % n_classes}'/f'{i}.png')
    return str(folder)

def read(text): return list(csv.DictReader(io.StringIO(text)))

def images_of(folder, part='pretext/simclr'):
    "How many images of which split a stage has seen."
    return {k: v['images'] for k, v in json.loads((folder/part/'stage.json').read_text())['images'].items()}

def same(a, b, *names):
    "To the byte: what differs is named."
    assert [name for name in names if (a/name).read_bytes() != (b/name).read_bytes()] == []

# -- run --

def test_folder_without_labels(run, pictures):
    rows = read((run/'clusters.csv').read_text())
    assert [r['path'] for r in rows] == [f'{i:02}.png' for i in range(60)]
    assert {r['cluster'] for r in rows} <= set('012')
    metrics = json.loads((run/'metrics.json').read_text())
    assert 'acc' not in metrics and metrics['skipped'] == [['broken.png', 'an empty file']]
    assert metrics['seconds'] > 0 and metrics['n_clusters'] <= 3 and (run/'report.html').exists()

def test_says_where_and_what(pictures, tmp_path, capsys, monkeypatch, no_figures):
    monkeypatch.chdir(tmp_path)
    assert main(['run', str(pictures), *TINY]) == 0
    out, err = capsys.readouterr()
    where = f'runs/{pictures.name}'
    for name in ('report.html', 'clusters.csv'):
        assert f'{where}/{name}' in out and Path(where, name).exists()
    assert '3 clusters of 60 images' in out and '1 file could not be read' in out and 'broken.png' in out
    assert all(bar in err for bar in ('1/4 SimCLR', '2/4 heads', '3/4 SCAN', '4/4 self-labelling', 'loss='))
    assert 'ACC' not in out

def test_class_folders_are_graded(tmp_path, capsys, no_figures):
    source = with_labels(tmp_path/'d', 3)
    assert main(['run', source, '--out', str(tmp_path/'run'), *TINY]) == 0
    metrics = json.loads((tmp_path/'run/metrics.json').read_text())
    assert metrics['classes'] == ['class0', 'class1', 'class2'] and 0 < metrics['acc'] <= 1
    assert f"{100*metrics['acc']:.1f}" in capsys.readouterr().out.split('Self-labelling')[1].split('\n')[0]

def test_digits_is_known_by_name(tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.setattr(datasets, 'digits', lambda: digits()[:60])
    assert main(['run', 'Digits', '--out', str(tmp_path/'run'), *TINY]) == 0
    assert {r.views_options['flip_p'] for r in load_stages(tmp_path/'run/recipe.yml').values()} == {0}
    assert images_of(tmp_path/'run') == {'all': 60} and 'k-means on pixels' in capsys.readouterr().out

@pytest.mark.parametrize('name', ['cifar10', 'CIFAR-10'])
def test_both_splits_of_a_data_set_in_any_spelling(name, sets, tmp_path, capsys, no_figures):
    recipe = ['--recipe', 'folder'] if name == 'CIFAR-10' else []
    assert main(['run', name, '--out', str(tmp_path/'run'), *recipe, *sets, *TINY]) == 0
    assert images_of(tmp_path/'run') == dict(train=35, test=7)
    assert load_stages(tmp_path/'run/recipe.yml')['scan'].data == 'cifar-10'
    metrics = json.loads((tmp_path/'run/metrics.json').read_text())
    assert list(metrics['splits']) == ['train', 'test'] and metrics['acc'] == metrics['splits']['test']['acc']
    assert len(read((tmp_path/'run/clusters-test.csv').read_text())) == 7
    assert ('that of cifar10 itself is made for a GPU' in capsys.readouterr().out) == (name == 'cifar10')
    assert main(['eval', str(tmp_path/'run'), name, *sets, '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert 'train (35 images): ACC' in out and f"test (7 images): ACC {100*metrics['acc']:.2f}" in out

def test_whole_set_and_best_recipe(sets, tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.chdir(tmp_path)
    words = ['run', 'fashion-mnist', '--recipe', 'best', '--whole', *sets, *SMALL]
    assert main(words) == 0
    run = tmp_path/'runs/fashion-mnist-best-whole'
    pretext = load_stages(run/'recipe.yml')['pretext']
    assert pretext.more_views[0]['strip_p'] == .75 and pretext.views_options['erase'] == 11
    assert (run/'pretext/simclr/checkpoint-2.pth.tar').exists() and images_of(run) == {'all': 30}
    assert list(json.loads((run/'metrics.json').read_text())['splits']) == ['all']
    err = capsys.readouterr().err
    assert err.count('About') == 1 and err.index('About 1 minute on cpu') < err.index('1/4 SimCLR')
    assert main(words) == 0
    assert 'About' not in capsys.readouterr().err   # the run is done

def test_options_reach_the_recipe(pictures, tmp_path, no_figures):
    assert main(['run', str(pictures), '--out', str(tmp_path/'r'), *TINY, '--seed', '7', '--size', '10',
                 '--no-flip', '--set', 'pretext.views_options.rotation=15', '--set', 'scan.lr=1e-5',
                 '--set', 'scan.views_options.n_ops=2']) == 0
    s = load_stages(tmp_path/'r/recipe.yml')
    assert json.loads((tmp_path/'r/scan/stage.json').read_text())['images']['all']['shape'] == [1, 10, 10]
    assert {r.seed for r in s.values()} == {7} and s['scan'].lr == 1e-5 and s['scan'].size == 10
    assert s['pretext'].views_options == dict(flip_p=0, rotation=15)
    assert s['scan'].views_options == dict(flip_p=0, n_ops=2)
    assert s['selflabel'].views_options == dict(flip_p=0)

def test_a_home_folder_and_a_name_that_is_no_text(tmp_path):
    "A shell leaves `--out=~/run` as it is, and the name of a file may hold any bytes."
    folder, odd = with_labels(tmp_path/'d', 3), [os.fsdecode(b'class0/%c.png' % i) for i in (0xff, 0xfe)]
    os.rename(f'{folder}/class0/0.png', f'{folder}/{odd[0]}')
    Path(folder, odd[1]).touch()
    for words in (['run', folder, '--out=~/run', *TINY], ['report', '~/run'], ['eval', '~/run'],
                  ['predict', '~/run', folder, '--device', 'cpu']):
        process = start(*words, out=tmp_path/'said', first=without_figures, HOME=str(tmp_path))
        process.join()
        out, err = process.said()
        assert process.exitcode == 0, err
    assert f'{folder}/{odd[0]}' in [row['path'] for row in read(out)]
    known = read((tmp_path/'run/clusters.csv').read_text(errors='surrogateescape'))
    assert len(known) == 60 and odd[0] in [row['path'] for row in known]

def test_names_with_line_ends(tmp_path, capsys, no_figures):
    for i, x in enumerate(digits().images[:20, 0]):
        folder = tmp_path/'in'/f'{"ab"[i % 2]}\nc'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(folder/f'{i}\n.png')
    (tmp_path/'in/a\nc/x\r\ny.png').touch()
    assert main(['run', str(tmp_path/'in'), '--out', str(tmp_path/'run'), *TINY]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == '2 classes, a c, b c, of 20 images, from the subfolders: they only grade.'
    assert "1 unreadable, such as 'a c/x y.png' (an empty file)" in said[2]
    assert 'Views' in said[3] and 'Results' in said[4]
    with open(tmp_path/'run/clusters.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert {r['path'] for r in rows} == {f'{"ab"[i % 2]}\nc/{i}\n.png' for i in range(20)}

def test_a_run_says_what_it_understood(tmp_path, capsys, no_figures):
    "Splits and classes from folders; what was left out; copies; results of a run are no data."
    folder = tmp_path/'d'
    for i, x in enumerate(digits().images[:60, 0].numpy()):
        part = folder/('train', 'val')[i % 3 == 0]/'abc'[i % 3]
        part.mkdir(parents=True, exist_ok=True)
        wide = Image.fromarray(np.pad(x, ((0, 0), (0, 8))))
        wide.save(part/f'{i}.gif', save_all=True, append_images=[wide.rotate(90)]*(i == 5))
    (folder/'train/b/copy.gif').write_bytes((folder/'train/b/1.gif').read_bytes())
    Image.new('RGBA', (9, 9)).save(folder/'train/c/clear.png')
    (folder/'train/a').mkdir()
    for name in ('c/one.heic', 'c/notes.txt', 'b/broken.png'): (folder/'train'/name).touch()
    for seed in (0, 1):
        out = folder/f'runs/{seed}'
        assert main(['run', str(folder), '--out', str(out), '--seed', str(seed), *TINY]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:6] == [
            '41 train and 20 test images of 8×8 pixels, gray, from 61 .gif, 2 .png of 8 to 16 pixels; '
            'the subfolders say which is which.',
            "3 classes, a, b, c, of 41 images, from the subfolders: they only grade.",
            "Left out: 2 unreadable, such as 'train/b/broken.png' (an empty file); 49 % of the pictures, "
            'beside their middle squares; 1 further pages or frames of 1 files; 1 .heic, which are not read.',
            '1 images are exact copies of others.',
            'Views: as for photographs, since too few images to tell; --kind says otherwise.',
            f'Results: {out}']
        assert any('ACC' in line for line in said)
    metrics = json.loads((out/'metrics.json').read_text())
    assert metrics['data'] == said[:4] and metrics['images'] == dict(train=41, test=20)
    assert said[0] in (out/'report.html').read_text()

def test_a_class_may_have_any_name(tmp_path):
    folder = Path(with_labels(tmp_path/'d', 4))
    for i, name in enumerate(('$\\badmacro$', 'a$b$c', '%s{}', '<b>')):
        (folder/f'class{i}').rename(folder/name)
    assert main(['run', str(folder), '--out', str(tmp_path/'run'), *TINY, '--n-clusters', '4']) == 0
    assert (tmp_path/'run/figures/confusion.png').stat().st_size > 1000

KILL = signal.SIGKILL
MOMENTS = {'pretext/simclr/checkpoint.pth.tar': KILL, 'pretext/simclr/model.pth.tar': KILL,
           'scan/heads.pth.tar': signal.SIGINT, 'scan/checkpoint.pth.tar': KILL, 'clusters.csv': KILL}

def test_killed_again_and_again(run, pictures, tmp_path, no_figures):
    "A signal as soon as a file is there, in another process; the same words continue, to the byte."
    words = ['run', str(pictures), '--out', str(tmp_path/'c'), *TINY]
    for file, how in MOMENTS.items():
        stopped = stop(*words, at=tmp_path/'c'/file, out=tmp_path/'said', how=how)
        assert stopped.exitcode == (130 if how == signal.SIGINT else -how), file
        assert (tmp_path/'c'/file).exists() and not (tmp_path/'c/report.html').exists()
        assert ('The same command continues' in stopped.said()[1]) == (how == signal.SIGINT)
    assert main(words) == 0
    same(tmp_path/'c', run, 'clusters.csv', 'model.safetensors', 'recipe.yml')

def test_ctrl_c_says_how_to_continue(pictures, tmp_path, monkeypatch, capsys, no_figures):
    def interrupt(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(stages, 'train_scan', interrupt)
        assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY]) == 130
    assert 'same command continues' in capsys.readouterr().err
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY]) == 0
    with monkeypatch.context() as m:
        m.setattr(report, 'write_report', interrupt)
        assert main(['report', str(tmp_path/'run')]) == 130
    assert capsys.readouterr().err.endswith('Stopped.\n')

# -- stage by stage --

SHARED = dict(data='stl-10', test_data='stl-10', n_clusters=3, size=16, backbone='small_resnet',
              backbone_options=dict(widths=[8, 16]), views='simclr', epochs=3, batch_size=12)
RECIPE = Recipe(PretextRecipe(**SHARED, lr=.1, n_neighbors=4),
                ScanRecipe(**SHARED, lr=1e-3, n_neighbors=3, heads_epochs=3, tried_heads=4),
                SelfLabelRecipe(**SHARED, lr=1e-3, threshold=.2))

@pytest.fixture(scope='module')
def chain(sets, tmp_path_factory):
    "The commands in their order, with one file: what was said, and the folder after each of them."
    root, said, after = tmp_path_factory.mktemp('chain'), {}, {}
    where, every, pretext = Path(sets[1]).with_name('results')/'stl-10', root/'all.yml', RECIPE.pretext
    every.write_text(to_yaml(RECIPE))
    (root/'simclr.yml').write_text(to_yaml(pretext))
    (root/'moco.yml').write_text(to_yaml(replace(pretext, setup='moco', queue_size=24)))
    for name in ('moco', 'simclr', 'scan', 'selflabel'):
        file = root/'moco.yml' if name == 'moco' else every
        with redirect_stdout(io.StringIO()) as out:
            assert main([name, '--config_exp', str(file), *sets, '--device', 'cpu']) == 0
        said[name], after[name] = out.getvalue(), root/'after'/name
        shutil.copytree(where, after[name])
    return SimpleNamespace(root=root, said=said, after=after, folder=where, file=str(every),
                           words=['--config_exp', str(every), *sets, '--device', 'cpu'])

def test_commands_say_what_they_do(chain):
    for name, said in chain.said.items():
        part = f'pretext/{name}' if name in ('moco', 'simclr') else name
        assert f'{name} begins: 3 epochs, ' in said and 'images of 3×96×96, on cpu in float32' in said
        assert said.count(' result: ') == 1 and str(chain.folder/part/'model.pth.tar') in said
        assert (f'{name} train (24 images): ' in said) and (f'{name} test (9 images): ' in said)
    assert f"scan starts from {chain.folder/'pretext/simclr'}" in chain.said['scan']   # the newest
    assert f"selflabel starts from {chain.folder/'scan'}" in chain.said['selflabel']
    seen = images_of(chain.folder)
    assert seen == dict(train=24, test=9, pretext=30) == images_of(chain.folder, 'pretext/moco')
    assert images_of(chain.folder, 'scan') == dict(train=24, test=9)

RESULTS = 'clusters.csv', 'clusters-test.csv', 'model.safetensors', 'recipe.yml'

def test_a_run_is_the_commands_in_their_order(chain, sets, tmp_path, no_figures):
    words = ['run', 'STL10', '--recipe', chain.file, *sets, '--device', 'cpu']
    assert main([*words, '--out', str(tmp_path/'run')]) == 0
    same(tmp_path/'run', chain.folder, *RESULTS)
    for part in ('pretext/simclr', 'scan', 'selflabel'):
        same(tmp_path/'run'/part, chain.folder/part, 'stage.json', 'recipe.yml', 'topk-train-neighbors.npy')

def test_a_run_goes_on_where_commands_ended(chain, sets, tmp_path, capsys, no_figures):
    folder = shutil.copytree(chain.after['scan'], tmp_path/'run')
    before = {p: p.stat().st_mtime_ns for p in folder.glob('**/model.pth.tar')}
    words = ['run', 'stl_10', '--recipe', chain.file, *sets, '--device', 'cpu']
    assert main([*words, '--out', str(folder)]) == 0
    same(folder, chain.folder, *RESULTS) and 'About' not in capsys.readouterr().err
    assert len(before) == 3 and all(p.stat().st_mtime_ns == t for p, t in before.items())

def test_a_folder_with_a_table_of_splits(tmp_path, monkeypatch, no_figures):
    "Recipe and table say what is held out, for a run as for the commands; both give the run its name."
    monkeypatch.chdir(tmp_path)
    folder = Path(with_labels(tmp_path/'d', 3))
    rows = [f"{p.name},{'test' if p.stem[-1] == '5' else 'train'}\n" for p in folder.glob('*/*.png')]
    (tmp_path/'splits.csv').write_text('path,split\n' + ''.join(rows))
    place = f'{{root: {folder}, splits: splits.csv}}'
    (tmp_path/'env.yml').write_text(f'root_dir: results\ndata: {{mine: {place}}}\n')
    (tmp_path/'own.yml').write_text(to_yaml(RECIPE.change(dict(data='mine', test_data='mine', size=8))))
    for name in ('simclr', 'scan', 'selflabel'):
        assert main([name, '--config_exp', 'own.yml', '--config_env', 'env.yml', '--device', 'cpu']) == 0
    assert main(['run', 'mine', '--recipe', 'own.yml', '--config_env', 'env.yml', '--device', 'cpu']) == 0
    assert images_of(tmp_path/'results/mine') == dict(train=54, test=6) == images_of(tmp_path/'runs/mine-own')
    same(tmp_path/'results/mine', tmp_path/'runs/mine-own', *RESULTS)

def test_aurora_by_its_name(tmp_path, monkeypatch, no_figures):
    "A preset that looks different on a CPU, with settings on top."
    monkeypatch.setattr(datasets, 'synthetic_aurora', lambda **options: synthetic_aurora(120, **options))
    (tmp_path/'env.yml').write_text(f'root_dir: {tmp_path}\n')
    common = ['--config_env', str(tmp_path/'env.yml'), '--device', 'cpu', '--set', 'seed=3', '--set',
              'backbone_options.widths=[8,16]']
    own = dict(simclr=['--set', 'pretext.epochs=1', '--set', 'pretext.n_neighbors=5'],
               scan=['--set', 'scan.epochs=1', '--set', 'scan.tried_heads=3', '--set', 'scan.n_neighbors=5'],
               selflabel=['--set', 'selflabel.epochs=1'])
    for name, settings in own.items(): assert main([name, '--config_exp', 'aurora', *common, *settings]) == 0
    assert main(['run', 'Aurora', '--out', str(tmp_path/'run'), *common, *sum(own.values(), [])]) == 0
    same(tmp_path/'run', tmp_path/'aurora', *RESULTS)
    recipe = load_stages(tmp_path/'run/recipe.yml')['pretext']
    assert recipe.time_window == 600 and recipe.size == 32
    assert images_of(tmp_path/'run') == dict(train=20, test=100)   # whole days

def test_commands_killed_and_continued(chain, sets, tmp_path):
    "SIGKILL as soon as the first checkpoint is there; the same words continue, to the same bits."
    env = Path(sets[1]).read_text().replace('/results', '/others')
    (tmp_path/'env.yml').write_text(env)
    folder = chain.folder.parents[1]/'others/stl-10'
    for name, part in dict(simclr='pretext/simclr', scan='scan').items():
        words = [name, '--config_exp', chain.file, '--config_env', str(tmp_path/'env.yml'), '--device', 'cpu']
        stopped = stop(*words, at=folder/part/'checkpoint.pth.tar', out=tmp_path/'said')
        assert stopped.exitcode == -signal.SIGKILL and not (folder/part/'model.pth.tar').exists()
        assert main(words) == 0
        same(folder, chain.after[name], f'{part}/model.pth.tar', 'model.safetensors')

@pytest.fixture(scope='module')
def tile(sets, tmp_path_factory):
    "A training image of the chain as a file."
    folder, root = tmp_path_factory.mktemp('tile'), Path(sets[1]).parent
    x = open_images('stl-10', 'train', place=dict(root=root, cache=root/'cache')).images[5]
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder/'5.png')
    return folder/'5.png'

@pytest.mark.parametrize('name', ['simclr', 'scan'])
def test_however_far_a_run_has_come(name, chain, sets, tile, tmp_path, capsys, no_figures):
    folder = shutil.copytree(chain.after[name], tmp_path/'run')
    assert main(['report', str(folder)]) == 0
    page = (folder/'report.html').read_text()
    assert ('3 clusters of 24 images' if name == 'scan' else 'Features of 24 images') in page
    assert main(['eval', str(folder)]) == 0
    out = capsys.readouterr().out
    assert 'test images, percent' in out and ('SCAN' if name == 'scan' else 'kNN accuracy') in out
    model = SCAN.load(folder, 'cpu')
    data = open_images('stl-10', 'train', place=dict(root=Path(sets[1]).parent, cache=tmp_path))
    assert model.transform(data).shape == (24, 16)
    words = ['predict', str(folder), str(tile)], ['eval', str(folder), 'stl10', *sets]
    if name == 'simclr':
        for each in words: assert 'no clusters yet' in refused(capsys, *each, '--device', 'cpu')
        with pytest.raises(UserError, match='finish its scan stage'): model.predict(data)
    else:
        assert [main([*each, '--device', 'cpu']) for each in words] == [0, 0]
        out, known = capsys.readouterr().out, read((folder/'clusters.csv').read_text())
        assert read(out)[0]['cluster'] == known[5]['cluster'] and read(out)[0]['name'] == known[5]['name']
        metrics = json.loads((folder/'metrics.json').read_text())
        assert f"test (9 images): ACC {100*metrics['splits']['test']['acc']:.2f}" in out
        assert model.predict(data).tolist() == [int(row['cluster']) for row in known]

def test_eval_of_a_model_file(chain, sets, tmp_path, capsys):
    model = tmp_path/'there/model.pth.tar'
    model.parent.mkdir()
    shutil.copy(chain.folder/'selflabel/model.pth.tar', model)
    assert main(['eval', *chain.words, '--model', str(model), '--visualize_prototypes']) == 0
    out = capsys.readouterr().out
    test = open_images('stl-10', 'test', place=dict(root=Path(sets[1]).parent, cache=tmp_path))
    want = SCAN.load(chain.folder, 'cpu').scores(test)
    for key in ('acc', 'nmi', 'ari'): assert f'{key.upper()} {100*want[key]:.2f}' in out
    assert 'top-5' not in out                                      # three clusters: nothing to say
    assert {p.name for p in model.parent.iterdir()} == {'model.pth.tar', 'confusion.png', 'prototypes.png'}
    for name in ('confusion.png', 'prototypes.png'): assert Image.open(model.parent/name).size[0] > 50
    assert main(['eval', *chain.words]) == 0                       # the result of the last stage
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[0]

def test_eval_of_a_pretext_model(chain, sets, capsys):
    assert main(['eval', '--config_exp', str(chain.root/'simclr.yml'), *sets, '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    steps = json.loads((chain.folder/'pretext/simclr/metrics.json').read_text())
    scores = steps['neighbors']['splits']['test']
    assert f"kNN accuracy {100*scores['knn_accuracy']:.2f}" in out and 'test (9 images)' in out
    assert f"neighbors of the same class {100*scores['neighbor_accuracy']:.2f}" in out

def test_eval_of_another_network_is_refused(chain, capsys):
    eval_ = ['eval', *chain.words, '--model', chain.folder/'selflabel/model.pth.tar']
    assert 'cluster_head' in refused(capsys, *eval_, '--set', 'n_clusters=4')
    assert 'layer3' in refused(capsys, *eval_, '--set', 'backbone_options.widths=[8, 16, 32]')
    assert 'cluster_head' in refused(capsys, *eval_[:-1], chain.folder/'pretext/simclr/model.pth.tar')

def test_a_start_by_hand(chain, sets, tmp_path, capsys):
    (tmp_path/'env.yml').write_text(Path(sets[1]).read_text().replace('/results', '/third'))
    words = ['scan', '--config_exp', chain.file, '--config_env', str(tmp_path/'env.yml'), '--device', 'cpu']
    assert 'run `scan-nb simclr`, `scan-nb moco` or `scan-nb frozen` first' in refused(capsys, *words)
    assert "no file 'nowhere.pth.tar'" in refused(capsys, *words, '--start', 'nowhere.pth.tar')
    assert main([*words, '--start', str(chain.folder/'pretext/simclr/model.pth.tar')]) == 0
    same(chain.folder.parents[1]/'third/stl-10', chain.after['scan'], 'model.safetensors', 'clusters.csv')
    said = refused(capsys, *words, '--start', chain.folder/'pretext/moco/model.pth.tar')
    assert 'holds other results' in said and 'start: ' in said

def test_faults_of_a_command(chain, sets, tmp_path, capsys):
    (tmp_path/'env.yml').write_text(Path(sets[1]).read_text().replace('/results', '/nothing'))
    words = ['--config_exp', chain.file, '--config_env', tmp_path/'env.yml', '--device', 'cpu']
    assert 'recipe for simclr: run `scan-nb simclr`' in refused(capsys, 'moco', *words)
    assert "did you mean 'epochs'" in refused(capsys, 'simclr', *words, '--set', 'epoch=3')
    assert 'scan.epochs is -1' in refused(capsys, 'scan', *words, '--set', 'epochs=-1')
    assert 'run `scan-nb scan` first' in refused(capsys, 'selflabel', *words)
    assert 'model.pth.tar' in refused(capsys, 'eval', *words)
    assert "There is no file 'absent.yml'" in refused(capsys, 'scan', '--config_exp', 'absent.yml')
    assert 'absent.yml' in refused(capsys, 'scan', '--config_exp', chain.file, '--config_env', 'absent.yml')
    assert 'config_exp' in refused(capsys, 'eval')
    said = refused(capsys, 'simclr', *chain.words, '--set', 'temperature=.3')
    assert 'pretext.temperature: 0.1 → 0.3' in said
    assert not (chain.folder.parents[1]/'nothing').exists()

def test_wrong_names_stop_a_command_before_it_begins(chain, capsys):
    file = chain.folder/'names.yml'
    try:
        for name, k in dict(scan=3, selflabel=3, simclr=24).items():   # 24 images have at most 24 clusters
            file.write_text(f'{k}: cats')
            assert main([name, *chain.words]) == 2
            out, err = capsys.readouterr()
            assert f"there is no cluster '{k}'" in err and 'finished before' not in out
    finally: file.unlink()

# -- the other commands --

def test_predict_files(run, pictures, capsys):
    files = [pictures/f'{i:02}.png' for i in (5, 3, 40)]
    assert main(['predict', str(run), *map(str, files)]) == 0
    rows, known = read(capsys.readouterr().out), read((run/'clusters.csv').read_text())
    assert [(r['path'], r['index']) for r in rows] == [(str(f), str(i)) for i, f in enumerate(files)]
    assert [r['cluster'] for r in rows] == [known[i]['cluster'] for i in (5, 3, 40)]
    assert [float(r['confidence']) for r in rows] == pytest.approx([float(known[i]['confidence'])
                                                                    for i in (5, 3, 40)], abs=2e-6)

def test_predict_a_folder_into_a_file(run, pictures, tmp_path, capsys):
    assert main(['predict', str(run), str(pictures), '--out', str(tmp_path/'p.csv'), '--device', 'cpu']) == 0
    out, err = capsys.readouterr()
    assert out == '' and 'broken.png' in err and 'an empty file' in err
    assert [r['cluster'] for r in read((tmp_path/'p.csv').read_text())] == [
        r['cluster'] for r in read((run/'clusters.csv').read_text())]

def test_names_reach_every_table(run, pictures, tmp_path, capsys, no_figures):
    shutil.copytree(run, tmp_path/'run')
    (tmp_path/'run/names.yml').write_text('0: mine\n2: mine')
    (tmp_path/'other.yml').write_text('1: yours')
    files = ['predict', str(tmp_path/'run'), str(pictures), '--device', 'cpu']
    other = ['--names', str(tmp_path/'other.yml')]
    for more, names in ([], ['mine', '', 'mine']), (other, ['', 'yours', '']):
        assert main([*files, *more]) == 0
        rows = read(capsys.readouterr().out)
        assert [r['name'] for r in rows] == [names[int(r['cluster'])] for r in rows] and len(rows) == 60
    assert main(['report', str(tmp_path/'run')]) == 0
    rows = read((tmp_path/'run/clusters.csv').read_text())
    assert {(r['cluster'], r['name']) for r in rows} <= {('0', 'mine'), ('1', ''), ('2', 'mine')}
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY]) == 0
    assert 'mine' in {r['name'] for r in read((tmp_path/'run/clusters.csv').read_text())}
    (tmp_path/'run/names.yml').write_text('7: mine')
    capsys.readouterr()
    run, out = str(tmp_path/'run'), str(tmp_path/'out')
    again = ['run', str(pictures), '--out', run, *TINY]
    for words in (files, ['report', run], ['sort', run, '--to', out], again):
        assert main(words) == 2
        assert "there is no cluster '7'" in capsys.readouterr().err
    assert not (tmp_path/'out').exists()

def test_sort_and_undo(run, pictures, tmp_path, capsys):
    shutil.copytree(run, tmp_path/'run')
    words, before = ['sort', str(tmp_path/'run')], {p.name: p.read_bytes() for p in pictures.iterdir()}
    for how in ([], ['--copy'], ['--link'], ['--move']):
        assert main([*words, '--to', str(tmp_path/'a b'), *how]) == 0
        out = capsys.readouterr().out.splitlines()
        assert sum(int(line.split()[0]) for line in out[:-1]) == 60
        assert out[-1].endswith(f"--to '{tmp_path}/a b' --undo")
        names = {p.name for p in (tmp_path/'a b').glob('*/*')}
        assert names == {*before} - {'broken.png'}
        assert len({*pictures.iterdir()}) == (1 if how == ['--move'] else 61)
        assert main([*words, '--undo'] if how else shlex.split(out[-1].partition('scan-nb ')[2])) == 0
        assert 'as it was before' in capsys.readouterr().out and not (tmp_path/'a b').exists()
    assert {p.name: p.read_bytes() for p in pictures.iterdir()} == before

def test_sort_says_what_is_wrong(run, pictures, tmp_path, capsys):
    shutil.copytree(run, tmp_path/'run')
    shutil.copytree(pictures, tmp_path/'in')
    (tmp_path/'in/00.png').unlink()
    some, to = ['sort', str(tmp_path/'run')], ['--to', str(tmp_path/'out')]
    for words, said in (
            (['sort', *to], 'needs a run folder'), (['sort', '--undo'], 'needs a run folder'),
            (some, 'add --to DIR'),
            ([*some, *to, '--copy', '--move'], 'choose one'), ([*some, '--undo'], 'nothing to undo'),
            ([*some, *to, '--source', str(tmp_path/'x')], '--source'),
            ([*some, *to, '--source', str(tmp_path/'in')],
             f"Files left out: 1, such as '{tmp_path}/in/00.png' (no such file).")):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count('\n') == 1
    assert len([*(tmp_path/'out').glob('*/*')]) == 59
    changed = next((tmp_path/'out').glob('*/*'))
    changed.write_text('')
    assert main([*some, '--undo']) == 2
    assert f"Files that stay: 1, such as '{changed}'" in capsys.readouterr().err

def test_predict_other_sizes_and_modes(run, tmp_path, capsys):
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path/'a.jpg')
    assert main(['predict', str(run), str(tmp_path/'a.jpg')]) == 0
    assert len(read(capsys.readouterr().out)) == 1

def test_eval(run, tmp_path, capsys):
    assert main(['eval', str(run)]) == 0
    assert 'Self-labelling' in capsys.readouterr().out
    assert main(['eval', str(run), with_labels(tmp_path/'d'), '--device', 'cpu']) == 0
    labelled = digits()[:60]
    acc = cluster_metrics(SCAN.load(run).predict(labelled.images), labelled.labels)['acc']
    assert f'all (60 images): ACC {100*acc:.2f}' in capsys.readouterr().out

def test_report(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path/'run')
    (folder/'report.html').unlink()
    assert main(['report', str(folder)]) == 0
    same(folder, run, 'report.html') and str(folder/'report.html') in capsys.readouterr().out

# -- wrong input --

def refused(capsys, *words):
    "The one sentence that is said."
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    out, err = capsys.readouterr()
    err = [line for line in re.split(r'[\r\n]+', err) if line.strip() and '%|' not in line]
    said = out.splitlines()   # nothing, or what was understood of the images
    assert len(err) == 1 and err[0].startswith('scan-nb: '), (out, err)
    assert not said or len(said) <= 6 and said[-1].startswith('Results: '), said
    return err[0]

@pytest.fixture
def bad(tmp_path):
    for name in ('empty', 'zero', 'one', 'corrupt', 'other'): (tmp_path/name).mkdir()
    (tmp_path/'zero/a.png').write_bytes(b'')
    (tmp_path/'corrupt/a.png').write_bytes(b'\x89PNG\r\n\x1a\n and then nothing')
    Image.new('L', (8, 8)).save(tmp_path/'one/a.png')
    (tmp_path/'other/notes.txt').write_text('mine')
    return tmp_path

@pytest.mark.parametrize('name,said', [('empty', 'no image'), ('zero', 'an empty file'),
                                       ('one', 'only one image'),
                                       ('corrupt', 'a.png'), ('missing', 'no folder')])
def test_bad_folders(bad, capsys, name, said):
    assert said in refused(capsys, 'run', bad/name, '--out', bad/'run', *TINY)
    assert not (bad/'run').exists()

@pytest.mark.parametrize('options,said', [
    ('--n-clusters 1', 'n_clusters is 1'), ('--n-clusters 61', '61 clusters'),
    ('--set pretext.n_neighbors=60', '60 neighbors'), ('--set heads=3', "'heads'"),
    ('--set seed', 'name=value'), ('--set epochs=3', 'pretext.epochs or scan.epochs'),
    ('--set pretext.views_options.flip=0', "'flip'"), ('--set pretext.views=3', 'pretext.views is 3'),
    ('--device tpu', 'tpu'), ('--seed -1', 'seed is -1'), ('--epochs 0', 'pretext.epochs is 0'),
    ('--size 0', 'size is 0'), ('--set backbone=vit', 'vit'), ('--set scan.lr=fast', 'scan.lr is'),
    ('--set pretext.time_window=5', 'times'), ('--config_env absent.yml', 'absent.yml'),
    ('--recipe absent.yml', 'absent.yml')])
def test_bad_options(pictures, tmp_path, capsys, options, said):
    assert said in refused(capsys, 'run', pictures, '--out', tmp_path/'run', *TINY, *options.split())
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('source', ['digits', 'fashion-mnist'])
def test_an_unknown_recipe(source, chain, sets, tmp_path, capsys):
    said = refused(capsys, 'run', source, '--recipe', 'finest', '--out', tmp_path/'run', *sets)
    assert "no recipe 'finest'" in said and 'did you mean' in said and all(name in said for name in PRESETS)
    said = refused(capsys, 'run', source, '--recipe', chain.root/'moco.yml', '--out', tmp_path/'run', *sets)
    assert 'has no scan stage' in said and not (tmp_path/'run').exists()

NEAR = {'cifar': 'cifar-10', 'fashion': 'fashion-mnist', 'DIGIT': 'digits'}

@pytest.mark.parametrize('source,near', NEAR.items())
def test_an_unknown_data_set(source, near, tmp_path, capsys):
    said = refused(capsys, 'run', source, '--out', tmp_path/'run', '--device', 'cpu')
    assert f"did you mean '{near}'" in said and ', '.join(DATASETS) in said
    assert not (tmp_path/'run').exists()

def test_data_that_is_not_there(chain, tmp_path, capsys, monkeypatch):
    (tmp_path/'env.yml').write_text('data: {imagenet_100: {root: nowhere}, mine: {root: nowhere, lables: y}}')
    env = ['--config_env', tmp_path/'env.yml', '--device', 'cpu', '--out', tmp_path/'run']
    assert 'SOURCE is empty' in refused(capsys, 'run', '')
    assert 'Where is ImageNet' in refused(capsys, 'run', 'imagenet50', *env)
    assert 'Which classes has imagenet_100' in refused(capsys, 'run', 'ImageNet-100', *env)
    assert "'lables' is no setting of mine" in refused(capsys, 'run', 'mine', *env)
    monkeypatch.setattr(datasets, 'DEBIAN_FASHION', str(tmp_path))
    def offline(*_): raise UserError('Fashion-MNIST is missing: get it.')
    monkeypatch.setattr(datasets, 'download_fashion', offline)
    assert 'Fashion-MNIST is missing' in refused(capsys, 'run', 'fashion-mnist', *env)
    said = refused(capsys, 'simclr', '--config_exp', chain.file, '--set', 'data=stl', '--device', 'cpu')
    assert "did you mean 'stl-10'" in said and not (tmp_path/'run').exists()

def test_size_is_for_files(tmp_path, capsys):
    assert '8×8' in refused(capsys, 'run', 'digits', '--size', '16', '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_out_folder_of_others(run, pictures, bad, capsys):
    said = refused(capsys, 'run', pictures, '--out', run, *TINY, '--seed', '5')
    assert 'seed: 0 → 5' in said and 'choose another folder' in said
    assert 'not empty' in refused(capsys, 'run', pictures, '--out', bad/'other', *TINY)
    assert 'is a file' in refused(capsys, 'run', pictures, '--out', bad/'other/notes.txt', *TINY)
    assert os.listdir(bad/'other') == ['notes.txt']

def test_truncated_checkpoint(run, pictures, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path/'run')
    file = folder/'scan/checkpoint.pth.tar'
    file.write_bytes(file.read_bytes()[:500])
    (folder/'scan/model.pth.tar').unlink()
    assert str(file) in refused(capsys, 'run', pictures, '--out', folder, *TINY)
    assert (folder/'scan/heads.pth.tar').exists()

def test_bad_predict_eval_report(run, pictures, bad, capsys):
    assert 'no file' in refused(capsys, 'predict', run, pictures/'00.png', bad/'nothing.png')
    assert 'no image' in refused(capsys, 'predict', run, bad/'empty')
    assert 'not a run folder' in refused(capsys, 'predict', bad/'other', pictures/'00.png')
    assert 'no labels' in refused(capsys, 'eval', run, pictures)
    assert 'no run folder' in refused(capsys, 'eval', bad/'nowhere')
    assert 'finish the run' in refused(capsys, 'report', bad/'other')
    assert main(['predict', str(run), str(bad/'zero/a.png')]) == 2
    assert 'None of the files' in capsys.readouterr().err

def test_unwritable_result(run, pictures, tmp_path, capsys):
    assert 'no/such/p.csv' in refused(capsys, 'predict', run, pictures/'00.png', '--out',
                                      tmp_path/'no/such/p.csv')

def test_a_diverging_loss_is_said(pictures, tmp_path, capsys):
    words = ['run', str(pictures), '--out', str(tmp_path/'run'), *TINY, '--set', 'pretext.lr=1e30']
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('scan-nb: ') and 'loss' in last and re.search('nan|inf', last)

def test_our_own_mistakes_are_not_hidden(pictures, tmp_path, monkeypatch):
    def bug(*a, **k): raise ValueError('a bug')
    monkeypatch.setattr(stages, 'find_pairs', bug)
    with pytest.raises(ValueError, match='a bug'):
        main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY])

@pytest.mark.parametrize('words', [[], ['fly'], ['predict', 'r'], ['simclr'],
                                   ['run', 'digits', '--n-clusters', 'ten']])
def test_bad_words(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and 'usage:' in capsys.readouterr().err

# -- the shell --

def test_exit_codes_and_streams(tmp_path, monkeypatch):
    process = start('run', tmp_path/'nowhere', out=tmp_path/'said')
    process.join()
    out, err = process.said()
    assert process.exitcode == 2 and out == '' and len(err.strip().splitlines()) == 1
    monkeypatch.setattr(sys, 'argv', ['scan_nb', 'run', str(tmp_path/'nowhere')])
    with pytest.raises(SystemExit) as e: runpy.run_module('scan_nb', run_name='__main__')
    assert e.value.code == 2

def test_a_closed_pipe_is_no_error(run, pictures, tmp_path):
    os.mkfifo(tmp_path/'said.out')
    process = start('predict', run, pictures, '--device', 'cpu', out=tmp_path/'said')
    os.close(os.open(tmp_path/'said.out', os.O_RDONLY))   # nobody reads
    process.join()
    assert process.exitcode == 1 and 'Traceback' not in (tmp_path/'said.err').read_text()

def shell(*words, **env):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(REPO)} | env
    return subprocess.run([sys.executable, '-m', 'scan_nb', *words], capture_output=True, text=True, env=env)

CONFIG = ['--config_env', '--config_exp']

def test_help_needs_no_torch_and_is_there_for_every_command(tmp_path):
    (tmp_path/'torch.py').write_text('raise ImportError("too heavy")')
    for words in (['--version'], ['--help'], *([name, '--help'] for name in NAMES)):
        done = shell(*words, PYTHONPATH=f'{tmp_path}{os.pathsep}{REPO}')
        assert done.returncode == 0 and not done.stderr, done.stderr
        wanted = {'--version': [], '--help': [*NAMES]}.get(words[0], [f'scan-nb {words[0]}'])
        if words[0] in ('simclr', 'moco', 'frozen', 'scan', 'selflabel', 'eval'): wanted += CONFIG
        assert all(word in done.stdout for word in wanted)
        if words == ['--version']: assert re.fullmatch(r'\d+\.\d+\.\d+\n', done.stdout)

def test_settings_ini_names_the_command():
    assert 'scan-nb=scan_nb.cli:main' in (REPO/'settings.ini').read_text()
    assert cli.main is main
