"The report, and what it is made of: right in what it shows, with and without labels, however far a run came."
import base64, csv, html, io, os, re, shutil
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image
from test_stages import TINY, plain, three_digits
from scan_nb import report, run_folder
from scan_nb.data import ImageSet, UserError, digits
from scan_nb.evaluate import cluster_metrics, confusion, kmeans_baseline, label_free_metrics
from scan_nb.recipe_files import load_stages
from scan_nb.recipes import Recipe
from scan_nb.report import (STAGE_NAMES, choose_images, compare, describe_classes, draw_confusion,
                            draw_figures, draw_prototypes, find_oddities, read_examples, read_metrics,
                            save_examples, summarize, table_of_scores, write_report)
from scan_nb.files import seal, write_clusters
from scan_nb.page import SCRIPT
from scan_nb.stages import run_pretext, run_scan, run_selflabel

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close('all')

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
    features = {k: v for k, v in stage.items() if k != 'splits'}
    metrics = dict(
        seconds=3., device='cpu', images={'all': n}, split='all', fitted_on='all', splits={'all': final},
        stages={'pretext': features, 'neighbors': near, 'heads': stage, 'scan': stage},
        baselines={'kmeans_pixels': {'all': final}} if labels is not None else {},
        notes=['Note <b>this</b>.'], skipped=[('a<b>.png', 'an empty file')],
        history={'pretext': rows, 'neighbors': [], 'heads': rows, 'scan': rows})
    if labels is not None: metrics |= {'classes': data.classes or [str(i) for i in range(data.n_classes)]}
    (folder/'metrics.json').write_text(seal(metrics))
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
        if tag == 'img': assert value.startswith('data:image/')
        elif value[0] == '#': assert key == 'href' and value[1:] in checker.ids
        else:
            assert key == 'href' and value[0] == '.'
            assert os.path.isfile(os.path.join(os.fsencode(path.parent), unquote_to_bytes(value)))
    parts = text.split(f'<script>{SCRIPT}</script>')
    assert len(parts) == 2 and not re.search(
        r'https?:|//[a-z]|@import|url\(|<script|<link|<iframe|javascript:| on[a-z]+=',
        re.sub(r'"data:[^"]*"', '', ''.join(parts)))
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
    assert text.count('<script') == 1 and '<i>' not in text and '<b>this' not in text
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

@pytest.mark.parametrize('side,n_clusters', [(96, 300), (32, 300), (224, 12)])
def test_page_of_many_clusters_stays_moderate(side, n_clusters, tmp_path):
    "As of 50,000 images; and no picture on it is larger than 96 pixels."
    n, images = 50_000, Many(three(500, n_clusters, 3, side)[0].images)
    clusters, folder = torch.arange(n) % n_clusters, tmp_path/'run'
    p, z = certain(clusters, n_clusters), torch.rand(n, 8, generator=torch.Generator().manual_seed(0))
    few, small = three(30, 3)
    fake_run(folder, few, certain(small, 3))
    metrics = read_metrics(folder)
    metrics['splits']['all'] |= dict(sizes=torch.bincount(clusters).tolist())
    metrics |= dict(images={'all': n}, sha256=None)
    del metrics['sha256']
    (folder/'metrics.json').write_text(seal(metrics))
    save_examples(folder, images, z, p, z[:1000, :2], torch.arange(1000), (z, torch.randint(n, (n, 5))))
    text = write_report(folder).read_text()
    assert 1e6 < len(text) < 10e6
    for raw in re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', text.partition('id="map"')[0]):
        assert max(Image.open(io.BytesIO(base64.b64decode(raw))).size) <= 96

class Many:
    "50,000 images, of which only those asked for take room."
    labels, facts = None, {}
    paths = ['a/long/way/to/the/picture.png']*50_000
    def __init__(self, few): self.few, self.images = few, self
    def __len__(self): return 50_000
    def __getitem__(self, index): return self.few[index % len(self.few)]

def test_a_folder_of_an_older_run_has_its_map(run, tmp_path):
    "Without small pictures of its points, without twins."
    shutil.copytree(run, tmp_path/'run')
    shown = dict(np.load(run/'examples.npz'))
    for name in ('points_images', 'points_path'): del shown[name]
    np.savez(tmp_path/'run/examples.npz', **shown)
    text, checker = check_page(write_report(tmp_path/'run'))
    assert 'alt="map of the images"' in text and '<circle' not in text and 'alike' not in checker.ids

# -- names, twins, images that fit nowhere --

def test_names_on_the_page(run, tmp_path):
    shutil.copytree(run, tmp_path/'run')
    (tmp_path/'run/names.yml').write_text('1: "<cats>"\n4: dogs')
    text, checker = check_page(write_report(tmp_path/'run'))
    fields = re.findall(r'data-cluster="(\d+)" value="([^"]*)"', text)
    assert fields == [(str(k), {1: '&lt;cats&gt;', 4: 'dogs'}.get(k, '')) for k in range(10)]
    names = re.findall('<text [^>]*>([^<]*)</text>', text)
    assert '&lt;cats&gt;' in names and 'dogs' in names and '0' in names
    (tmp_path/'run/names.yml').write_text('1: cats\n4: CATS')
    with pytest.raises(UserError, match='differ by too little'): write_report(tmp_path/'run')

def test_wrong_names_cost_no_other_result(made, tmp_path):
    data, features, scan = made
    found = in_folder(scan, tmp_path)
    (tmp_path/'names.yml').write_text('77: cats')
    with pytest.raises(UserError, match="no cluster '77'"):
        summarize([features, found], {'all': data}, tmp_path)
    assert read_metrics(tmp_path)['acc'] and (tmp_path/'examples.npz').exists()
    (tmp_path/'names.yml').write_text('1: cats')
    metrics = summarize([features, found], {'all': data}, tmp_path)
    names = [r['name'] for r in csv.DictReader(io.StringIO((tmp_path/'clusters.csv').read_text()))]
    want = ['cats' if k == 1 else metrics['names'][k] for k in found.clusters['scan']['all'].tolist()]
    assert names == want and 'cats' not in metrics['names']
    shown = read_examples(tmp_path)['examples']
    assert len(shown['alone']) == 24 and shown['points_images'].shape == (90, 1, 8, 8)

@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_twins_and_loners(n, k, count, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g)*9
    z[torch.randint(n, (n//2,), generator=g)] = 2*z[0]
    cosine = torch.nn.functional.normalize(z, dim=1) @ torch.nn.functional.normalize(z, dim=1).T
    near = cosine.clone().fill_diagonal_(-2).topk(min(k, n - 1)).indices
    odd = find_oddities(z, near, count)
    pairs, like = odd['twins'], odd['twins_cosine']
    assert len(pairs) <= count and pairs.shape == (len(like), 2)
    assert len(pairs.flatten().unique()) == 2*len(pairs)
    assert (pairs[:, 0] < pairs[:, 1]).all() and (like >= .999).all() and (like.diff() <= 0).all()
    assert torch.allclose(cosine[pairs[:, 0], pairs[:, 1]], like, atol=1e-5)
    rest = [i for i in range(n) if i not in pairs.flatten().tolist()]
    if len(pairs) < count and len(rest) > 1:   # no two of the others that are neighbors are alike
        assert not any(cosine[i, j] > .9991 and j in near[i].tolist() for i in rest for j in rest if i != j)
    mean = cosine.gather(1, near).mean(1)
    assert torch.allclose(odd['alone_cosine'], mean.sort().values[:count], atol=1e-5)
    assert torch.allclose(mean[odd['alone']], odd['alone_cosine'], atol=1e-5)

# -- however far a run has come --

@pytest.fixture(scope='module')
def made():
    "Images, a pretext task, and SCAN with more clusters than there are classes."
    data = three_digits()
    recipe = Recipe.for_images(data, base=TINY.change({'n_clusters': 5, 'scan.heads_epochs': 0}))
    features = run_pretext(recipe.pretext, {'all': data})
    return data, features, run_scan(recipe.scan, {'all': data}, features)

def in_folder(outcome, folder):
    shutil.rmtree(folder, ignore_errors=True)
    found = replace(outcome)
    found.write(folder)
    return found

WORDS = r'(?<!no )accuracy|\bACC\b|\bNMI\b|labelled|k-means|same class'   # that only labels allow

@pytest.mark.parametrize('labels', [True, False])
def test_features_alone(labels, made, tmp_path):
    data = made[0] if labels else ImageSet(made[0].images)
    found = in_folder(made[1], tmp_path/'run')
    metrics = summarize([found], {'all': data}, tmp_path/'run')
    text, checker = check_page(write_report(tmp_path/'run'))
    words = ' '.join(' '.join(checker.text).split())
    assert 'Features of 90 images' in words and 'Found by SCAN' in words and 'class="card"' not in text
    assert bool(re.search(WORDS, words)) == labels == ('kNN accuracy' in words)
    assert metrics['splits'] == metrics['baselines'] == {}
    assert not list((tmp_path/'run').glob('clusters*.csv'))
    assert {f.stem for f in (tmp_path/'run/figures').iterdir()} == {
        'map-classes' if labels else 'map', 'curves-pretext'}
    assert {'map', 'steps', 'curves', 'recipe'} <= {*checker.ids} and 'clusters' not in checker.ids
    assert list(load_stages(tmp_path/'run/recipe.yml')) == ['pretext']

@pytest.mark.parametrize('labels', [True, False])
def test_scan_alone_with_more_clusters_than_classes(labels, made, tmp_path):
    data = made[0] if labels else ImageSet(made[0].images)
    found = in_folder(made[2], tmp_path/'run')
    metrics = summarize([found], {'all': data}, tmp_path/'run')
    text, checker = check_page(write_report(tmp_path/'run'))
    words = ' '.join(' '.join(checker.text).split())
    assert '5 clusters of 90 images' in words and text.count('class="card"') == 5
    assert bool(re.search(WORDS, words)) == labels
    assert all((name in words) == labels for name in ('majority accuracy', 'k-means on features', 'labelled'))
    assert [name for name, _ in table_of_scores(metrics, 'all')['rows']][-1] == STAGE_NAMES['scan']
    rows = list(csv.DictReader(io.StringIO((tmp_path/'run/clusters.csv').read_text())))
    clusters = found.clusters['scan']['all']
    assert [int(r['cluster']) for r in rows] == clusters.tolist()
    if not labels: assert {r['name'] for r in rows} == {''} and 'names' not in metrics
    else:   # each image bears the name of its cluster: that of a class of its own, or of the majority
        match = describe_classes(clusters.long(), data.labels, 5)['match']
        assert metrics['names'] == [data.classes[k] if k >= 0 else '' for k in match.tolist()]
        assert [r['name'] for r in rows] == [metrics['names'][k] for k in clusters.tolist()]

def test_two_sets_of_images(made, tmp_path):
    data, features, _ = made
    images = dict(train=data, test=data[::3])
    scan = run_scan(made[2].recipe, images, features)
    metrics = summarize([features, scan], images | dict(pretext=data[:1]), tmp_path)
    assert list(metrics['splits']) == ['train', 'test'] and metrics['images'] == dict(train=90, test=30)
    for found in (metrics['baselines']['kmeans_pixels'], metrics['stages']['scan']['splits']):
        assert [*found] == ['train', 'test']
    clusters = {k: [row.split(',')[2] for row in (tmp_path/f'clusters{k}.csv').read_text().splitlines()[1:]]
                for k in ('', '-test')}
    assert clusters[''][::3] == clusters['-test'] and len(clusters['']) == 90

def test_stages_that_saw_other_sets(made):
    "Held-out images in one stage, none in the next: what can be graded is."
    data, features, scan = made
    whole, parts = dict(all=data), dict(train=data, test=data[::3])
    recipe = Recipe.for_images(data, base=TINY.change({'n_clusters': 5, 'selflabel.epochs': 1})).selflabel
    for before, images in ((run_scan(scan.recipe, parts, features), whole), (scan, parts)):
        metrics = summarize([features, before, run_selflabel(recipe, images, before)], images)
        assert [*metrics['splits']] == [*metrics['stages']['selflabel']['splits']] == [*images]
        assert metrics['stages']['scan']['splits'].keys() <= images.keys()

def test_in_memory_nothing_is_written(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, *outcomes = made
    metrics = summarize(outcomes, {'all': data})
    assert not list(tmp_path.iterdir())
    assert metrics['acc'] == metrics['stages']['scan']['splits']['all']['acc']
    assert plain(summarize(outcomes, {'all': data}, tmp_path)) == plain(metrics)
    assert read_metrics(tmp_path) == metrics
    assert metrics['seconds'] == sum(s['seconds'] for s in metrics['stages'].values()) > 0

@pytest.mark.parametrize('skipped, said', [
    ([], []), ([('{}', 'b')], ["1 file could not be read and was left out, such as '{}' (b)."]),
    ([('a', 'b'), ('c', 'd')], ["2 files could not be read and were left out, such as 'a' (b)."])])
def test_notes(skipped, said, made):
    data, *outcomes = made
    outcomes[-1] = replace(outcomes[-1], note='Look here.')
    metrics = summarize(outcomes, {'all': replace(data, skipped=skipped)})
    assert metrics['notes'] == ['Look here.', *said] and metrics['skipped'] == skipped

# -- comparisons --

def test_comparisons_are_kept_in_the_folder(made, tmp_path, monkeypatch):
    data, features, scan = made
    found = [features, in_folder(scan, tmp_path)]
    z = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    blind = compare(found, {'all': ImageSet(data.images)}, z)
    assert blind['clusters'] == {} and blind['points'].shape == (90, 2)
    assert torch.equal(blind['index'], torch.arange(90))
    monkeypatch.setattr(report, 'embed_2d', lambda *a: 1/0)
    graded = compare(found, {'all': data}, z)   # labels have come: k-means joins the map
    assert torch.equal(graded['points'], blind['points'])
    for name, x, normalize in (('pixels', data.images, False), ('features', features.embeddings, True)):
        want = kmeans_baseline(x, 5, scan.recipe.seed, normalize=normalize)
        assert torch.equal(graded['clusters'][f'kmeans_{name}']['all'].long(), want)
    monkeypatch.setattr(report, 'kmeans_baseline', lambda *a, **k: 1/0)
    assert plain(compare(found, {'all': data}, z)) == plain(graded)
    assert plain(compare(found, {'all': ImageSet(data.images)}, z)['points']) == plain(graded['points'])

def test_k_means_learns_from_the_images_that_were_learned_from(made, monkeypatch):
    "Whatever has labels; it is asked for those that have."
    data, *outcomes = made
    monkeypatch.setattr(report, 'embed_2d', lambda z, seed: z[:, :2])
    splits = dict(train=ImageSet(data.images), test=data[:2])
    found = compare(outcomes, splits, torch.zeros(90, 2))['clusters']['kmeans_pixels']
    want = kmeans_baseline(data.images, 5, outcomes[1].recipe.seed)[:2]
    assert torch.equal(found['test'].long(), want)

def test_thumbnails_of_large_images_are_no_rival(made, monkeypatch):
    data, *outcomes = made
    monkeypatch.setattr(report, 'embed_2d', lambda z, seed: z[:, :2])
    def rivals(side):
        images = torch.nn.functional.interpolate(data.images, (side, side))
        return [*compare(outcomes, dict(train=replace(data, images=images)), torch.zeros(90, 2))['clusters']]
    assert rivals(96) == ['kmeans_pixels', 'kmeans_features'] and rivals(97) == ['kmeans_features']

def test_comparisons_of_many_images_look_at_some(made, monkeypatch):
    data, *outcomes = made
    many, seen = data[torch.arange(10_050) % 90], []
    monkeypatch.setattr(report, 'embed_2d', lambda z, seed: z)
    def kmeans(x, k, seed, normalize, on):
        seen.append((len(x), len(on)))
        return torch.zeros(len(on)).long()
    monkeypatch.setattr(report, 'kmeans_baseline', kmeans)
    z = torch.arange(10_050.)[:, None]
    found = compare(outcomes, {'all': many}, z)
    assert seen == [(10_000, 10_050)]*2 and len(found['points']) == 1000
    steps = found['index'].diff()
    assert torch.equal(found['points'][:, 0].long(), found['index']) and 9 <= steps.min() <= steps.max() <= 11
    assert found['index'][[0, -1]].tolist() == [0, 10_049]

# -- clusters as a table --

@hypothesis_settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\r\0'), min_size=1),
                min_size=1, max_size=6), st.booleans(), st.booleans())
def test_clusters_survive_strange_names(texts, named, array):
    "Of files, and of classes."
    n, p = len(texts), torch.eye(3)[torch.arange(len(texts)) % 3]
    images = ImageSet(torch.zeros(n, 1, 2, 2).byte(), paths=texts)
    names = [texts[0], texts[-1], ''] if named else None
    text = write_clusters(images, p.numpy() if array else p, names)
    rows = list(csv.reader(io.StringIO(text, newline='')))
    assert rows[0] == ['path', 'index', 'cluster', 'confidence', 'name']
    assert [r[0] for r in rows[1:]] == texts and [int(r[2]) for r in rows[1:]] == [i % 3 for i in range(n)]
    assert [r[1] for r in rows[1:]] == [str(i) for i in range(n)] and {r[3] for r in rows[1:]} == {'1.000000'}
    assert [r[4] for r in rows[1:]] == [names[i % 3] if names else '' for i in range(n)]

def test_images_without_files_have_no_path(data, p):
    assert {row.split(',')[0] for row in write_clusters(data, p).splitlines()[1:]} == {''}

# -- pictures of their own --

def test_a_picture_of_the_confusion(data, p, tmp_path, monkeypatch):
    shown, plot = [], report.plot_confusion
    def watch(*a):
        shown.append(a)
        return plot(*a)
    monkeypatch.setattr(report, 'plot_confusion', watch)
    partly = replace(data, labels=data.labels.clone().index_fill_(0, torch.arange(9), -1))
    for some in (data, partly, replace(data, classes=None)):
        file = draw_confusion(p, some, tmp_path/'confusion.png')
        *found, classes = shown.pop()
        assert all(map(torch.equal, found, confusion(p.argmax(1), some.labels)))
        assert classes == [str(i) for i in range(10)]
        with Image.open(file) as image: assert image.format == 'PNG' and min(image.size) > 100
    assert not plt.get_fignums() and [f.name for f in tmp_path.iterdir()] == ['confusion.png']

def test_a_picture_of_the_prototypes(made, tmp_path, monkeypatch):
    "One image of each cluster that is in use, at its full size, chosen by what the model sees of it."
    shown, show = [], report.show_images
    def watch(images, titles):
        shown.append((images, titles))
        return show(images, titles)
    monkeypatch.setattr(report, 'show_images', watch)
    data, features, scan = made
    model, framed = scan.load(), replace(data, images=torch.nn.functional.pad(data.images, [2]*4))
    p = certain(data.labels*2, 6)
    for some, size in ((data, 8), (framed, 12), (framed, 8)):
        assert draw_prototypes(model, p, some, size, tmp_path/'prototypes.png').exists()
        images, titles = shown.pop()
        assert titles == ['0', '2', '4'] and images.shape[2:] == some.images.shape[2:]
        assert all((some.images[some.labels == c] == x).flatten(1).all(1).any() for c, x in enumerate(images))
    assert not plt.get_fignums()

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
    (run/'figures').mkdir(exist_ok=True)
    (run/'figures/of-labels-that-are-gone.png').write_bytes(b'')
    write_report(run)
    names = {p.stem for p in (run/'figures').glob('*.png')}
    assert names == {'map', 'map-classes', 'confusion', 'curves-pretext', 'curves-heads', 'curves-scan'}

def test_only_the_first_process_takes_figures_away(run, monkeypatch):
    write_report(run)
    before = sorted((run/'figures').iterdir())
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})
    for room in (report, run_folder): monkeypatch.setattr(room, 'place', lambda: (1, 2))
    write_report(run)
    assert sorted((run/'figures').iterdir()) == before and before

def test_as_many_clusters_as_classes_need_no_majority(run):
    assert 'majority' not in write_report(run).read_text()

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

def test_any_flipped_bit_in_the_numbers_is_noticed(run, tmp_path):
    raw, want = (run/'metrics.json').read_bytes(), read_metrics(run)
    for at in range(0, len(raw), 3):
        wrong = bytearray(raw)
        wrong[at] ^= 1 << at%8
        (tmp_path/'metrics.json').write_bytes(wrong)
        try: assert read_metrics(tmp_path) == want   # a space between two lines
        except UserError as e: assert 'metrics.json' in str(e) and 'damaged' in str(e)

def test_no_run(tmp_path):
    with pytest.raises(UserError, match='no run folder'): write_report(tmp_path/'x')
    with pytest.raises(UserError, match='finish the run'): write_report(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='no run folder'): write_report(Path(tmp_path/'file'))
