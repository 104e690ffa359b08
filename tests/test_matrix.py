"Features that others computed: arrays and files, with images and without."
import csv
import numpy as np
import pytest, torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scan_nb import frozen, report
from scan_nb.cli import main
from scan_nb.data import UserError, digits
from scan_nb.frozen import add_features, read_matrix
from scan_nb.pipeline import SCAN
from scan_nb.recipes import FROZEN, OURS, matrix_recipe
from scan_nb.report import read_metrics

pytestmark = pytest.mark.usefixtures('one_thread')
FEW = {'n_clusters': 10, 'scan.tried_heads': 3, 'scan.heads_epochs': 5}
WORDS = [w for k, v in FEW.items() for w in ('--set', f'{k}={v}')] + ['--device', 'cpu']

@pytest.fixture(scope='module')
def data(): return digits()[:120]

@pytest.fixture(scope='module')
def z(data): return data.images.flatten(1).float()

@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))

@pytest.fixture
def no_figures(monkeypatch):
    "They take longer than a tiny run."
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})

def few(**options): return SCAN(recipe=FROZEN.change(FEW), device='cpu', **options)

# -- reading --

KINDS = st.sampled_from([np.float64, np.float32, np.int16, np.uint8])

@given(arrays(KINDS, (3, 4), elements=st.integers(0, 100)))
@settings(max_examples=30, deadline=None)
def test_the_same_numbers_from_anywhere(tmp_path_factory, x):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = tmp_path_factory.mktemp('matrix')
    np.save(folder/'a.npy', x)
    np.savez(folder/'b.npz', x)
    np.savez(folder/'c.npz', embeddings=x, other=x + 1, labels=x[:, 0])
    pq.write_table(pa.table({'embedding': x.tolist(), 'path': ['a', 'b', 'c']}), folder/'d.parquet')
    pq.write_table(pa.table({f'f{i}': x[:, i] for i in range(4)}), folder/'e.parquet')
    for source in (x, torch.from_numpy(x.copy()), x.tolist(), *sorted(folder.iterdir())):
        found = read_matrix(source)
        assert found.dtype == torch.float32 and found.tolist() == x.tolist(), source

def test_what_is_no_matrix(tmp_path):
    np.save(tmp_path/'flat.npy', np.zeros(3))
    np.save(tmp_path/'words.npy', np.array([['a', 'b']]))
    np.savez(tmp_path/'two.npz', a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    np.save(tmp_path/'pickled.npy', np.array([{}], object), allow_pickle=True)
    (tmp_path/'damaged.npy').write_bytes(b'\x93NUMPY')
    (tmp_path/'damaged.parquet').write_bytes(b'PAR1')
    (tmp_path/'x.csv').write_text('1,2')
    none = 'holds no matrix'
    for name, said in {'flat.npy': none, 'words.npy': none, 'two.npz': 'call one of',
                       'pickled.npy': 'damaged', 'damaged.npy': 'damaged', 'damaged.parquet': 'damaged',
                       'x.csv': 'no matrix: give', 'nowhere.npy': 'no file'}.items():
        with pytest.raises(UserError, match=said) as e: read_matrix(tmp_path/name)
        assert name in str(e.value)
    for wrong, said in ((np.zeros(3), '3'), (np.zeros((2, 0)), '2×0'), (digits(), 'ImageSet'), ({}, 'dict')):
        with pytest.raises(UserError, match=said): read_matrix(wrong)

def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path/'x.parquet').write_bytes(b'PAR1')
    monkeypatch.setattr(frozen, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs pyarrow'): read_matrix(tmp_path/'x.parquet')

@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_are_named(value):
    x = np.zeros((5, 3))
    x[2, 1] = x[4, 0] = value
    with pytest.raises(UserError, match='2 rows .* the first is row 2'): read_matrix(x)

# -- a run --

def test_with_images_and_without(data, z, tmp_path):
    shown = few(out=tmp_path/'a').fit(data.images, labels=data.labels, embeddings=z)
    alone = few(out=tmp_path/'b').fit(labels=data.labels, embeddings=z.numpy())
    np.testing.assert_array_equal(shown.labels_, alone.labels_)
    np.testing.assert_array_equal(alone.embeddings_, z.numpy())
    assert alone.metrics_['acc'] > .3 and 'kmeans_pixels' not in alone.metrics_['baselines']
    assert 'kmeans_pixels' in shown.metrics_['baselines']
    pages = [(tmp_path/k/'report.html').read_text() for k in 'ab']
    assert pages[0].count('<img') > pages[1].count('<img') > 2
    rows = list(csv.DictReader((tmp_path/'b/clusters.csv').open()))
    assert [int(r['cluster']) for r in rows] == alone.labels_.tolist()

def test_predict_takes_features(data, z, tmp_path, no_figures):
    scan = few(out=tmp_path/'run').fit(embeddings=z[:90], test=z[90:])
    loaded = SCAN.load(tmp_path/'run', 'cpu')
    for s in (scan, loaded):
        np.testing.assert_array_equal(s.predict(z[:90]), scan.labels_)
        np.testing.assert_array_equal(s.transform(z), z)
        with pytest.raises(UserError, match='63 features of each image, but 64'): s.predict(z[:, 1:])
        with pytest.raises(UserError, match='Features are'): s.predict(data.images)
    assert 0 <= scan.score(z, data.labels) <= 1
    assert scan.metrics_['splits']['test']['n_images'] == 30

def test_other_features_are_another_run(z, tmp_path, no_figures):
    few(out=tmp_path/'run').fit(embeddings=z)
    with pytest.raises(UserError, match='holds other results'): few(out=tmp_path/'run').fit(embeddings=z + 1)

def test_as_many_rows_as_images(data, z):
    with pytest.raises(UserError, match='120 images need 120 rows of embeddings, not 119'):
        few().fit(data.images, embeddings=z[1:])
    assert add_features(z, data)[10:20].embeddings.equal(z[10:20])

def test_any_recipe_gives_its_heads(z):
    base = OURS['digits'].change({'scan.heads_epochs': 3, 'scan.tried_heads': 2})
    r = matrix_recipe(64, base)
    assert r.scan.tried_heads == 2 and r.scan.epochs == 0 and r.pretext.setup == 'frozen'
    assert len(SCAN(recipe=base, device='cpu').fit(embeddings=z).labels_) == 120

def test_suggested_number(z):
    scan = few(n_clusters='auto').fit(embeddings=z[:40])
    k = scan.suggestion_.n_clusters
    assert k == scan.recipe_.n_clusters == len(scan.metrics_['splits']['all']['sizes'])

# -- the command --

@pytest.fixture
def folder(data, tmp_path):
    (tmp_path/'pictures').mkdir()
    for i, x in enumerate(data.images[:60, 0].numpy()):
        Image.fromarray(x).save(tmp_path/f'pictures/{i:03}.png')
    return tmp_path

@pytest.mark.parametrize('source', [True, False])
def test_command(folder, z, capsys, source, no_figures):
    np.save(folder/'z.npy', z[:60])
    run, given = folder/'run', ['--embeddings', str(folder/'z.npy')]
    assert main(['run', *[str(folder/'pictures')]*source, *given, '--out', str(run), *WORDS]) == 0
    assert '64 features of each' in capsys.readouterr().out
    rows = (run/'clusters.csv').read_text().splitlines()
    assert rows[1].startswith('000.png,' if source else ',')
    assert main(['predict', str(run), str(folder/'z.npy'), '--device', 'cpu']) == 0
    found = capsys.readouterr().out.splitlines()
    assert [r.split(',')[1:3] for r in found] == [r.split(',')[1:3] for r in rows]
    assert main(['suggest', str(run)]) == 0 and 'Suggested' in capsys.readouterr().out
    assert 'How many clusters' in (run/'report.html').read_text() and read_metrics(run)
    assert main(['run', *[str(folder/'pictures')]*source, *given, '--out', str(run), *WORDS]) == 0
    assert 'How many clusters' in (run/'report.html').read_text()   # nothing is lost

def test_wrong_words(folder, z, capsys):
    np.save(folder/'z.npy', z)
    for words, said in ((['run', str(folder/'pictures'), '--embeddings', str(folder/'z.npy')], '60 rows'),
                        (['run', '--embeddings', str(folder/'no.npy')], 'no file'),
                        (['run'], 'SOURCE is empty'), (['suggest', str(folder)], 'not a run folder')):
        more = ['--out', str(folder/'run'), '--device', 'cpu'] if words[0] == 'run' else []
        assert main(words + more) == 2
        assert said in capsys.readouterr().err.splitlines()[-1] and not (folder/'run').exists()
