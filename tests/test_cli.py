"The command line: whole runs from a shell, one sentence and exit code 2 for wrong input, and quick help."
import csv, io, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scan_nb import cli, data as data_module, pipeline
from scan_nb.cli import main
from scan_nb.data import UserError, digits
from scan_nb.evaluate import cluster_metrics
from scan_nb.pipeline import SCAN

REPO = Path(__file__).parents[1]
TINY = ['--device', 'cpu', '--n-clusters', '3', '--epochs', '2', '--set', 'widths=[8, 16]', '--set',
        'n_heads=2',
        '--set', 'heads_epochs=3', '--set', 'scan_epochs=1', '--set', 'selflabel_epochs=1', '--set',
        'n_neighbors=3']

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'.cache'))

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

def read(text): return list(csv.DictReader(io.StringIO(text)))

def shell(*words, **kw):
    code = 'import sys; from scan_nb.cli import main; sys.exit(main())'
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', **kw.pop('env', {})}
    return subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True,
                          env=env, **kw)

# -- run --

def test_folder_without_labels(run, pictures):
    rows = read((run/'clusters.csv').read_text())
    assert [r['path'] for r in rows] == [f'{i:02}.png' for i in range(60)]
    assert {r['cluster'] for r in rows} <= set('012')
    metrics = json.loads((run/'metrics.json').read_text())
    assert 'acc' not in metrics and metrics['skipped'] == [['broken.png', 'an empty file']]
    assert metrics['seconds'] > 0 and metrics['n_clusters'] <= 3 and (run/'report.html').exists()

def test_says_where_and_what(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['run', str(pictures), *TINY]) == 0
    out, err = capsys.readouterr()
    where = f'runs/{pictures.name}'
    for name in ('report.html', 'clusters.csv'):
        assert f'{where}/{name}' in out and Path(where, name).exists()
    assert '3 clusters of 60 images' in out and '1 file could not be read' in out and 'broken.png' in out
    assert all(bar in err for bar in ('1/4 SimCLR', '2/4 heads', '3/4 SCAN', '4/4 self-labelling', 'loss='))
    assert 'ACC' not in out

def test_class_folders_are_graded(tmp_path, capsys):
    for i, (x, y) in enumerate(zip(digits().images[:60, 0], digits().labels[:60].tolist())):
        (tmp_path/'d'/f'class{y % 3}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(tmp_path/'d'/f'class{y % 3}'/f'{i}.png')
    assert main(['run', str(tmp_path/'d'), '--out', str(tmp_path/'run'), *TINY]) == 0
    metrics = json.loads((tmp_path/'run/metrics.json').read_text())
    assert metrics['classes'] == ['class0', 'class1', 'class2'] and 0 < metrics['acc'] <= 1
    assert f"{100*metrics['acc']:.1f}" in capsys.readouterr().out.split('Self-labelling')[1].split('\n')[0]

def test_digits_is_known_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module, 'digits', lambda: digits()[:60])
    assert main(['run', 'digits', '--out', str(tmp_path/'run'), *TINY]) == 0
    recipe = pipeline.read_recipe(tmp_path/'run')
    assert recipe['settings']['views']['flip_p'] == 0 and recipe['data']['images'] == 60
    assert 'k-means on pixels' in capsys.readouterr().out

def test_fashion_mnist_reports_both_splits(tmp_path, monkeypatch, capsys):
    parts = dict(train=digits()[:60], test=digits()[60:90])
    monkeypatch.setattr(data_module, 'fashion_mnist', lambda split: parts[split])
    assert main(['run', 'fashion-mnist', '--out', str(tmp_path/'run'), *TINY]) == 0
    metrics = json.loads((tmp_path/'run/metrics.json').read_text())
    assert list(metrics['splits']) == ['train', 'test'] and metrics['acc'] == metrics['splits']['test']['acc']
    assert len(read((tmp_path/'run/clusters-test.csv').read_text())) == 30
    assert main(['eval', str(tmp_path/'run'), 'fashion-mnist', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert 'train images' in out and f"test: ACC {100*metrics['acc']:.1f}" in out

def test_whole_set_and_best_preset(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(data_module, 'fashion_mnist', lambda split: asked.append(split) or digits()[:90])
    monkeypatch.chdir(tmp_path)
    assert main(['run', 'fashion-mnist', '--preset', 'best', '--whole', *TINY]) == 0
    run = tmp_path/'runs/fashion-mnist-best-whole'
    recipe = pipeline.read_recipe(run)
    assert asked == ['all'] and recipe['data']['images'] == 90
    settings = recipe['settings']
    assert settings['second_views']['strip_p'] == .75 and settings['views']['erase'] == 11
    assert (run/'checkpoints'/'pretext2.pt').exists()
    assert list(json.loads((run/'metrics.json').read_text())['splits']) == ['all']
    err = capsys.readouterr().err
    assert err.index('About 1 minute on cpu') < err.index('1/4 SimCLR')
    assert main(['run', 'fashion-mnist', '--preset', 'best', '--whole', *TINY]) == 0
    assert 'About' not in capsys.readouterr().err   # the run is done

@pytest.mark.parametrize('source,words', [('fashion-mnist', 'choose best'), ('digits', 'leave --preset out')])
def test_an_unknown_preset(source, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module, 'fashion_mnist', lambda split: digits()[:90])
    assert words in refused(capsys, 'run', source, '--preset', 'finest', '--out', tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_options_reach_the_recipe(pictures, tmp_path):
    assert main(['run', str(pictures), '--out', str(tmp_path/'r'), *TINY, '--seed', '7', '--size', '10',
                 '--no-flip',
                 '--set', 'views.rotation=15', '--set', 'scan_lr=1e-5', '--set', 'strong.n_ops=2']) == 0
    s = pipeline.read_recipe(tmp_path/'r')
    shape, s = s['data']['shape'], s['settings']
    assert shape == [1, 10, 10] and s['seed'] == 7 and s['scan_lr'] == 1e-5
    assert s['views'] == dict(flip_p=0, rotation=15) and s['strong'] == dict(flip_p=0, n_ops=2)

def test_two_runs_are_equal(run, pictures, tmp_path):
    done = shell('run', pictures, '--out', tmp_path/'b', *TINY)
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    assert (tmp_path/'b/clusters.csv').read_bytes() == (run/'clusters.csv').read_bytes()

def test_killed_and_continued(run, pictures, tmp_path):
    "SIGKILL as soon as the first checkpoint is there; the same words continue."
    words = ['run', str(pictures), '--out', str(tmp_path/'c'), *TINY]
    code = f'import sys; sys.path.insert(0, {str(REPO)!r}); from scan_nb.cli import main; main({words!r})'
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while process.poll() is None and not list(tmp_path.glob('c/checkpoints/pretext*.pt')): time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(words) == 0
    assert (tmp_path/'c/clusters.csv').read_bytes() == (run/'clusters.csv').read_bytes()

def test_ctrl_c_says_how_to_continue(pictures, tmp_path, monkeypatch, capsys):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'train_scan', stop)
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY]) == 130
    assert 'same command continues' in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'.cache'))
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY]) == 0

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

def test_predict_other_sizes_and_modes(run, tmp_path, capsys):
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path/'a.jpg')
    assert main(['predict', str(run), str(tmp_path/'a.jpg')]) == 0
    assert len(read(capsys.readouterr().out)) == 1

def test_eval(run, pictures, tmp_path, capsys):
    assert main(['eval', str(run)]) == 0
    assert 'Self-labelling' in capsys.readouterr().out
    labelled = digits()[:60]
    for i, (x, y) in enumerate(zip(labelled.images[:, 0], labelled.labels.tolist())):
        (tmp_path/'d'/str(y)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(tmp_path/'d'/str(y)/f'{i}.png')
    assert main(['eval', str(run), str(tmp_path/'d')]) == 0
    acc = cluster_metrics(SCAN.load(run).predict(labelled.images), labelled.labels)['acc']
    assert f'ACC {100*acc:.1f}' in capsys.readouterr().out

def test_report(run, capsys):
    before = (run/'report.html').read_bytes()
    (run/'report.html').unlink()
    assert main(['report', str(run)]) == 0
    assert (run/'report.html').read_bytes() == before and 'report.html' in capsys.readouterr().out

# -- wrong input --

def refused(capsys, *words):
    "The one sentence that is said."
    assert main([str(w) for w in words]) == 2
    err = [line for line in re.split(r'[\r\n]+', capsys.readouterr().err) if line.strip()
           and '%|' not in line]
    assert len(err) == 1 and err[0].startswith('scan-nb: '), err
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
    (['--n-clusters', '1'], 'n_clusters is 1'), (['--n-clusters', '61'], '61 clusters'),
    (['--set', 'n_neighbors=60'], '60 neighbors'), (['--set', 'heads=3'], "'heads'"),
    (['--set', 'seed'], 'name=value'),
    (['--set', 'views.flip=0'], "'flip'"), (['--set', 'views=3'], 'views'), (['--device', 'tpu'], 'tpu'),
    (['--seed', '-1'], 'seed'), (['--epochs', '0'], 'pretext_epochs'), (['--size', '0'], 'size'),
    (['--set', 'backbone=vit'], 'vit'), (['--set', 'scan_lr=fast'], 'scan_lr')])
def test_bad_options(pictures, tmp_path, capsys, options, said):
    assert said in refused(capsys, 'run', pictures, '--out', tmp_path/'run', *TINY, *options)
    assert not (tmp_path/'run').exists()

def test_size_is_for_files(tmp_path, capsys):
    assert '8×8' in refused(capsys, 'run', 'digits', '--size', '16', '--out', tmp_path/'run')

def test_out_folder_of_others(run, pictures, bad, capsys):
    said = refused(capsys, 'run', pictures, '--out', run, *TINY, '--seed', '5')
    assert 'seed: 0 → 5' in said and 'choose another folder' in said
    assert 'not empty' in refused(capsys, 'run', pictures, '--out', bad/'other', *TINY)
    assert 'is a file' in refused(capsys, 'run', pictures, '--out', bad/'other/notes.txt', *TINY)
    assert os.listdir(bad/'other') == ['notes.txt']

def test_truncated_checkpoint(run, pictures, tmp_path, capsys):
    import shutil
    shutil.copytree(run, tmp_path/'run')
    file = tmp_path/'run/checkpoints/scan.pt'
    file.write_bytes(file.read_bytes()[:500])
    assert 'scan.pt' in refused(capsys, 'run', pictures, '--out', tmp_path/'run', *TINY)
    assert (tmp_path/'run/checkpoints/heads.pt').exists()

def test_fashion_mnist_missing(tmp_path, monkeypatch, capsys):
    def missing(split): raise UserError('Fashion-MNIST is missing: get it.')
    monkeypatch.setattr(data_module, 'fashion_mnist', missing)
    assert 'Fashion-MNIST is missing' in refused(capsys, 'run', 'fashion-mnist', '--out', tmp_path/'run')

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
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), *TINY, '--set', 'pretext_lr=1e30']) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('scan-nb: ') and 'loss' in last and re.search('nan|inf', last)

def test_our_own_mistakes_are_not_hidden(pictures, tmp_path, monkeypatch):
    def bug(*a, **k): raise ValueError('a bug')
    monkeypatch.setattr(pipeline, 'train_simclr', bug)
    with pytest.raises(ValueError, match='a bug'): main(['run', str(pictures), '--out', str(tmp_path/'run'),
                                                         *TINY])

@pytest.mark.parametrize('words', [[], ['fly'], ['run'], ['predict', 'r'],
                                   ['run', 'digits', '--n-clusters', 'ten']])
def test_bad_words(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and 'usage:' in capsys.readouterr().err

# -- the shell --

def test_exit_codes_and_streams_of_the_real_command(tmp_path):
    done = shell('run', tmp_path/'nowhere')
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.strip().splitlines()) == 1

def test_help_needs_no_torch(tmp_path):
    (tmp_path/'torch.py').write_text('raise ImportError("too heavy")')
    for words in (['--help'], ['run', '--help'], ['--version']):
        done = shell(*words, env=dict(PYTHONPATH=f'{tmp_path}{os.pathsep}{REPO}'))
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.fullmatch(r'\d+\.\d+\.\d+\n', done.stdout)

def test_a_closed_pipe_is_no_error(run, pictures):
    code = f'import sys; sys.path.insert(0, {str(REPO)!r}); from scan_nb.cli import main; sys.exit(main())'
    process = subprocess.Popen([sys.executable, '-u', '-c', code, 'predict', str(run), str(pictures),
                                '--device', 'cpu'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b'Traceback' not in process.stderr.read()
    process.wait()

def test_settings_ini_names_the_command():
    assert 'scan-nb=scan_nb.cli:main' in (REPO/'settings.ini').read_text()
    assert cli.main is main

def test_run_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['run', 'digits']) == 2
    assert 'one process' in capsys.readouterr().err
