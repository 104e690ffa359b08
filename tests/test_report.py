"The report and what it is made of: right in what it shows, with or without labels, however far a run came."
import base64, csv, html, io, json, re, shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from test_stages import TINY, plain, three_digits
from scan_nb import report
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.evaluate import cluster_metrics, confusion, kmeans_baseline, label_free_metrics
from scan_nb.recipe_files import load_stages
from scan_nb.recipes import Recipe
from scan_nb.report import (STAGE_NAMES, choose_images, compare, describe_classes, draw_confusion, draw_figures,
                            draw_prototypes, read_examples, read_metrics, save_examples, summarize,
                            table_of_scores, write_clusters, write_report)
from scan_nb.run_folder import Outcome
from scan_nb.stages import run_pretext, run_scan

pytestmark = pytest.mark.usefixtures('one_thread')

def fake_run(folder, data, probabilities, points=None):
    "A run folder as a run would leave it, without training anything."
    folder.mkdir(parents=True, exist_ok=True)
    p, n, labels = torch.as_tensor(probabilities).float(), len(data), data.labels
    final = dict(n_images=n, n_clusters=len(p.argmax(1).unique())) | label_free_metrics(p)
    if labels is not None: final |= cluster_metrics(p.argmax(1), labels)
    stage = dict(kept=True, reason='kept: <it> was "better" & fine', epochs=2, seconds=1.5,
                 splits={'all': final})
    near = stage | dict(epochs=0, splits={'all': dict(n_images=n, knn_accuracy=.5)})
    rows = [dict(epoch=e, loss=1/e) for e in (1, 2)]
    metrics = dict(seconds=3., device='cpu', images={'all': n}, split='all', fitted_on='all', splits={'all': final},
                   stages={'pretext': stage | {'splits': {}}, 'neighbors': near, 'heads': stage, 'scan': stage},
                   notes=['Note <b>this</b>.'], skipped=[('a<b>.png', 'an empty file')],
                   baselines={'kmeans_pixels': {'all': final}} if labels is not None else {},
                   history={'pretext': rows, 'neighbors': [], 'heads': rows, 'scan': rows})
    del metrics['stages']['pretext']['splits']
    if labels is not None: metrics |= {'classes': data.classes or [str(i) for i in range(data.n_classes)]}
    (folder/'metrics.json').write_text(json.dumps(metrics))
    (folder/'recipe.yml').write_text('scan: {num_classes: 3, augmentation_kwargs: {flip_p: <i>0</i>}}\n')
    where = torch.arange(min(n, 50))
    features = data.images.flatten(1).float()
    save_examples(folder, data, features, p, features[where, :2] if points is None else points, where)
    return folder

def certain(clusters, n_clusters, sure=.9):
    p = torch.full((len(clusters), n_clusters), (1 - sure)/max(1, n_clusters - 1))
    return p.scatter(1, torch.as_tensor(clusters)[:, None], sure)

@pytest.fixture(scope='module')
def data(): return digits()[:200]

@pytest.fixture(scope='module')
def p(data):
    noise = torch.rand(200, 10, generator=torch.Generator().manual_seed(0))
    return (8*torch.nn.functional.one_hot(data.labels, 10)*noise + 3*noise).softmax(1)

@pytest.fixture(scope='module')
def run(data, p, tmp_path_factory): return fake_run(tmp_path_factory.mktemp('r')/'run', data, p)

class Checker(HTMLParser):
    "Tags are closed in order; sources and addresses are collected."
    VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}
    def __init__(self): super().__init__(); self.open, self.sources, self.ids, self.text = [], [], [], []
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [(tag, k, v) for k, v in attrs.items()
                         if k in ('src', 'href', 'srcset', 'data', 'action')]
        self.ids += [attrs['id']] if 'id' in attrs else []
        if tag not in self.VOID: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)

def check_page(path):
    text, checker = path.read_text(encoding='utf-8'), Checker()
    checker.feed(text)
    assert checker.open == []
    for tag, key, value in checker.sources:
        assert value.startswith('data:image/') if tag == 'img' else key == 'href' and value[1:] in checker.ids
    assert not re.search(r'https?:|//[a-z]|@import|url\(|<script|<link|<iframe|javascript:',
                         re.sub(r'"data:[^"]*"', '', text))
    assert len(checker.ids) == len(set(checker.ids))
    return text, checker

# -- the page --

def test_opens_offline(run):
    text, checker = check_page(write_report(run))
    assert text.startswith('<!doctype html>') and 'charset="utf-8"' in text and 'width=device-width' in text
    assert {'clusters', 'certain', 'map', 'steps', 'curves', 'recipe',
            *(f'cluster-{k}' for k in range(10))} <= set(checker.ids)

def test_every_picture_can_be_decoded(run):
    sources = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', write_report(run).read_text())
    assert len(sources) > 200
    for kind, raw in sources:
        with Image.open(io.BytesIO(base64.b64decode(raw, validate=True))) as image:
            image.load()
            assert image.format.lower() == kind

def test_shows_the_pixels_it_was_given(run, data, p):
    titles = dict(re.findall(r'src="data:image/png;base64,([^"]+)" alt="(image \d+):',
                             write_report(run).read_text()))
    assert len(titles) > 100
    for raw, name in titles.items():
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(raw))))
        assert any((pixels == data.images[i, 0].numpy()).all() for i in [int(name.split()[1])])

def test_sizes_and_certainty_are_right(run, p):
    text = html.unescape(' '.join(check_page(write_report(run))[1].text))
    text = ' '.join(text.split())
    confidence, clusters = p.max(1)
    for k, size in enumerate(torch.bincount(clusters, minlength=10).tolist()):
        mean = 100*float(confidence[clusters == k].mean())
        assert f'Cluster {k} {size} images, {size/2:.1f} %, {mean:.1f} % certain' in text
    assert '10 clusters of 200 images' in text and 'accuracy' in text

def test_frames_mark_exactly_the_other_labels(run):
    shown = read_examples(run)['examples']
    text = write_report(run).read_text()
    wrong = dict(zip(shown['index'].tolist(), (shown['match'][shown['cluster']] != shown['label']).tolist()))
    found = re.findall(r'<figure class="([^"]*)">\s*<img src="[^"]+" alt="image (\d+):', text)
    assert found and all(('wrong' in kind) == wrong[int(i)] for kind, i in found)

def test_without_labels_nothing_speaks_of_them(tmp_path, data, p):
    folder = fake_run(tmp_path/'run', ImageSet(data.images), p)
    text = re.sub('"data:[^"]*"', '', check_page(write_report(folder))[0])
    assert not re.search(r'ACC|NMI|ARI\b|accuracy</|labelled|confusion|class=".*wrong"|k-means', text)
    assert 'certain' in text and not (folder/'figures/confusion.png').exists()

def test_what_was_written_by_strangers_is_escaped(tmp_path, data, p):
    evil = '<script>alert(1)</script>"\'&.png'
    named = ImageSet(data.images, data.labels, [f'<i>{i}' for i in range(10)],
                     [f'{i}{evil}' for i in range(200)])
    text, checker = check_page(write_report(fake_run(tmp_path/'run', named, p)))
    assert '<script' not in text and '<i>' not in text and '<b>this' not in text
    assert evil in html.unescape(text) and 'Note <b>this</b>.' in ''.join(checker.text)
    assert 'a<b>.png' in ''.join(checker.text)

def test_written_again_from_the_folder_alone(run, tmp_path):
    shutil.copytree(run, tmp_path/'moved')
    first = write_report(run).read_text()
    (tmp_path/'moved/report.html').unlink(missing_ok=True)
    assert write_report(str(tmp_path/'moved')).read_text() == first

# -- any clustering --

def three(n_images, n_clusters, channels=1, side=8):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n_images, channels, side, side), generator=g).byte()
    return ImageSet(images), torch.randint(n_clusters, (n_images,), generator=g)

@pytest.mark.parametrize('n_images,n_clusters', [(2, 2), (3, 2), (30, 30), (100, 60), (40, 300)])
def test_any_number_of_clusters(tmp_path, n_images, n_clusters):
    images, clusters = three(n_images, n_clusters)
    text, checker = check_page(write_report(fake_run(tmp_path/'run', images, certain(clusters, n_clusters))))
    assert text.count('class="card"') == n_clusters and 'nan' not in ''.join(checker.text)

def test_empty_clusters_and_more_clusters_than_classes(tmp_path, data):
    clusters = data.labels*2                          # 0, 2, …, 18 of 20: every other one is empty
    text, checker = check_page(write_report(fake_run(tmp_path/'run', data, certain(clusters, 20))))
    assert text.count('class="card"') == 20 and '0 images, 0.0 %' in ' '.join(checker.text)
    words = ' '.join(' '.join(checker.text).split())
    assert '100.0 % of them are labelled' in words and '100.0 % majority accuracy' in words

def test_fewer_clusters_than_classes(tmp_path, data):
    _, checker = check_page(write_report(fake_run(tmp_path/'run', data, certain(data.labels//5, 2))))
    assert 'majority accuracy' in ' '.join(checker.text)

@pytest.mark.parametrize('channels,side,kind',
                         [(3, 20, 'png'), (3, 64, 'jpeg'), (1, 64, 'jpeg'), (3, 1, 'png')])
def test_color_and_large_images(tmp_path, channels, side, kind):
    images, clusters = three(30, 3, channels, side)
    text, _ = check_page(write_report(fake_run(tmp_path/'run', images, certain(clusters, 3))))
    assert f'src="data:image/{kind};' in text
    assert ('pixelated' in text.split('</style>')[0].split('--pixels:')[1]) == (side <= 32)

def test_page_of_large_images_stays_moderate(tmp_path):
    images, clusters = three(1500, 10, 3, 96)
    path = write_report(fake_run(tmp_path/'run', images, certain(clusters, 10)))
    assert path.stat().st_size < 10e6             # noise, which JPEG cannot compress

# -- pieces --

@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 8), st.integers(3, 24), st.integers(0, 99))
def test_choice_of_images(n, n_clusters, per_cluster, seed):
    g = torch.Generator().manual_seed(seed)
    p = (5*torch.rand(n, n_clusters, generator=g)).softmax(1)
    shown = choose_images(torch.rand(n, 4, generator=g), p, per_cluster, 10)
    confidence, clusters = p.max(1)
    for k in range(n_clusters):
        typical, doubtful = (rows[rows >= 0] for rows in (shown['typical'][k], shown['doubtful'][k]))
        both = torch.cat([typical, doubtful])
        assert (clusters[both] == k).all() and len(both.unique()) == len(both)
        size = int((clusters == k).sum())
        assert len(typical) == min(size, per_cluster - per_cluster//3)
        assert len(doubtful) == min(size - len(typical), per_cluster//3)
        if len(doubtful): assert (confidence[doubtful].max() <= confidence[typical[1:]]).all()
        assert (confidence[typical[1:]].diff() <= 0).all() and (confidence[doubtful].diff() >= 0).all()
    assert len(shown['surest']) == len(shown['least']) == min(n, 10)
    assert confidence[shown['least'][0]] == confidence.min()
    assert confidence[shown['surest'][0]] == confidence.max()

def test_style_and_figures_outside_are_left_alone(run):
    figure, before = plt.figure(), {k: v for k, v in plt.rcParams.items()}
    draw_figures(read_examples(run))
    assert dict(plt.rcParams.items()) == before and plt.get_fignums() == [figure.number]
    plt.close(figure)

def test_figures_are_files_too(run):
    write_report(run)
    names = {p.stem for p in (run/'figures').glob('*.png')}
    assert names == {'map', 'map-classes', 'confusion', 'curves-pretext', 'curves-heads', 'curves-scan'}

def test_as_many_clusters_as_classes_need_no_majority(run):
    assert 'majority' not in (run/'report.html').read_text()

def test_table_of_scores(run):
    metrics = read_metrics(run)
    table = table_of_scores(metrics, 'all')
    assert table['columns'] == ['ACC', 'NMI', 'ARI', 'certainty', 'effective clusters']
    assert [name for name, _ in table['rows']] == ['k-means on pixels', 'Heads on fixed features',
                                                   'SCAN, the whole network']
    assert table['rows'][-1][1][0] == f"{100*metrics['splits']['all']['acc']:.1f}"
    del metrics['baselines']['kmeans_pixels']['all']['nmi']
    assert table_of_scores(metrics, 'all')['rows'][0][1][1] == '–'

# -- damage --

@pytest.mark.parametrize('name', ['metrics.json', 'recipe.yml', 'examples.npz'])
def test_missing_and_damaged_files_are_named(run, tmp_path, name):
    shutil.copytree(run, tmp_path/'run')
    file = tmp_path/'run'/name
    for raw in (b'{"a": ', file.read_bytes()[:-30] if name == 'examples.npz' else b'\xff\xfe\x00{'):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=f'{name}.*damaged'): write_report(tmp_path/'run')
    file.unlink()
    with pytest.raises(UserError, match=f'no {name}'): write_report(tmp_path/'run')

def test_no_run(tmp_path):
    with pytest.raises(UserError, match='no run folder'): write_report(tmp_path/'x')
    with pytest.raises(UserError, match='finish the run'): write_report(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='no run folder'): write_report(Path(tmp_path/'file'))
