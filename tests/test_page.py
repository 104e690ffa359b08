"The page of a report: what its script does, in a browser where there is one."
import json, re, time
import numpy as np
import pytest, torch
from PIL import Image
from browser import CHROMIUM, Browser
from scan_nb.cli import main
from scan_nb.data import ImageSet
from scan_nb.files import _pairs_of, read_clusters, read_names, write_clusters, write_text
from scan_nb.page import SCRIPT
from scan_nb.recipe_files import to_yaml
from scan_nb.recipes import ScanRecipe
from scan_nb.report import save_examples, write_report
from test_report import certain, check_page, fake_run

N, K = 1451, 12

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A report of 1,451 pictures in files, without labels; some have strange names, some are copies."
    top, g = tmp_path_factory.mktemp('page'), torch.Generator().manual_seed(0)
    clusters = torch.randint(K, (N,), generator=g)
    colors = torch.randint(60, 196, (K, 3, 1, 1), generator=g)
    images = (colors[clusters] + torch.randint(-50, 50, (N, 3, 40, 40), generator=g)).byte()
    images[1] = images[0]
    images[2] = 0
    paths = [f'{i % 7}/{i:04}{" #?%<b>&é" if i % 50 == 0 else ""}.png' for i in range(N)]
    for path, x in zip(paths, images):
        (top/'in'/path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(top/'in'/path, compress_level=1)
    data, p, run = ImageSet(images, paths=paths), certain(clusters, K), top/'run'
    fake_run(run, data, p)
    (run/'recipe.yml').write_text(to_yaml({'scan': ScanRecipe(data=str(top/'in'), n_clusters=K)}))
    z = images.flatten(1).float().sub(128)
    near = torch.nn.functional.normalize(z, dim=1) @ torch.nn.functional.normalize(z, dim=1).T
    near = near.fill_diagonal_(-2).topk(5).indices
    where = torch.linspace(0, N - 1, 1000).round().long()
    points = torch.stack([clusters[where] % 4, clusters[where]//4], 1) + torch.rand(1000, 2, generator=g)/2
    save_examples(run, data, z, p, points, where, (z, near))
    write_text(run/'clusters.csv', write_clusters(data, p))
    return top, write_report(run)

# -- without a browser --

def test_the_page_alone(made):
    text, checker = check_page(made[1])
    assert made[1].stat().st_size < 10e6
    assert {*re.findall(r"find\('(\w+)'\)", SCRIPT)} <= {*checker.ids}
    assert re.findall(r'data-cluster="(\d+)"', text) == [str(k) for k in range(K)]
    assert text.count('<circle') == 1000 and {'names', 'alike', 'alone', 'map'} <= {*checker.ids}
    assert sum(key == 'href' and value[:3] == '../' for _, key, value in checker.sources) > 12*24
    pair = text.partition('id="alike"')[2].partition('1.0000, cluster')[0]
    assert all(name in pair for name in ('title="0/0000 #?%&lt;b&gt;&amp;é.png', 'title="1/0001.png'))
    seal = re.search(r"script-src 'sha256-([^']+)'", text)
    assert seal and "default-src 'none'" in text
    assert not re.search(r'https?:|fetch|XMLHttp|WebSocket|import\(|eval|innerHTML|document\.write', SCRIPT)
    labels = re.findall(r'aria-label="name of cluster\s+(\d+)"', text)
    assert labels == [str(k) for k in range(K)]

def test_names_of_the_run_stand_in_the_fields(made):
    top, page = made
    (top/'run/names.yml').write_text('3: "a \\"b\\" <c>"')
    text = write_report(top/'run').read_text()
    (top/'run/names.yml').unlink()
    assert re.findall(r'data-cluster="3" value="([^"]*)"', text) == ['a &#34;b&#34; &lt;c&gt;']
    assert {r[4] for r in read_clusters(top/'run/clusters.csv') if r[2] == 3} == {'a "b" <c>'}
    write_report(top/'run')

def test_every_sign_that_can_be_typed_is_read_again(tmp_path):
    "`quoted` of the script, in Python: a text of JSON, in which some signs become numbers."
    some = re.search(r"JSON\.stringify\(.*\n +/(\[.+\])/g,\n", SCRIPT)[1]
    signs = [chr(i) for i in (*range(0xd800), *range(0xe000, 0x10000), *range(0x10000, 0x110000, 999))]
    for i in range(0, len(signs), 1000):
        text = json.dumps(''.join(signs[i:i+1000]), ensure_ascii=False)
        text = re.sub(some, lambda m: f'\\u{ord(m[0]):04x}', text)
        (tmp_path/'names.yml').write_text(f'1: {text}\n', encoding='utf-8', newline='')
        assert _pairs_of(tmp_path/'names.yml') == [('1', ''.join(signs[i:i+1000]))]

# -- in a browser --

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROMIUM: pytest.skip('no Chromium here')
    with Browser(tmp_path_factory.mktemp('chromium')) as browser: yield browser

ODD = {0: 'cats', 3: 'cats', 5: 'no', 7: "it's: #1 \"x\" \\ é 猫 😀", 11: '  two   spaces '}
WANT = ODD | {11: 'two spaces'}

def test_names_are_typed_kept_saved_and_used(made, browser, tmp_path):
    top, page = made
    browser.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
    browser.open(page)
    assert browser.js('document.getElementById("said").textContent') == f'0 of {K} clusters have a name.'
    for k, name in ODD.items(): browser.write(f'[data-cluster="{k}"]', name)
    assert browser.js('document.getElementById("said").textContent') == (
        f'5 of {K} clusters have a name. Clusters 0 and 3 become one.')
    browser.write('[data-cluster="5"]', 'CATS')
    assert 'differ by too little' in browser.js('document.getElementById("said").textContent')
    browser.write('[data-cluster="5"]', 'no')
    browser.open(page)   # as on another day
    assert browser.js('[...document.querySelectorAll("[data-cluster]")].map(f => f.value)') == [
        ODD.get(k, '') for k in range(K)]
    browser.click('#save')
    end = time.time() + 20
    while not (tmp_path/'names.yml').exists() and time.time() < end: time.sleep(.05)
    assert read_names(tmp_path/'names.yml', K) == WANT
    assert main(['sort', str(top/'run'), '--to', str(top/'out'), '--names', str(tmp_path/'names.yml')]) == 0
    rows = read_clusters(top/'run/clusters.csv')
    assert len([*(top/'out/cats').iterdir()]) == sum(r[2] in (0, 3) for r in rows)
    assert len([*(top/'out').glob('*/*.png')]) == N and (top/'out/two spaces').is_dir()
    assert main(['sort', str(top/'run'), '--undo']) == 0 and not (top/'out').exists()
    browser.click('#forget')
    assert not any(browser.js('[...document.querySelectorAll("[data-cluster]")].map(f => f.value)'))

def test_newer_names_of_the_page_win(made, browser):
    top, page = made
    browser.open(page)
    browser.write('[data-cluster="1"]', 'typed')
    for text, value in (('1: newer', 'newer'), (None, 'typed')):
        if text: (top/'run/names.yml').write_text(text)
        else: (top/'run/names.yml').unlink()
        browser.open(write_report(top/'run'))
        assert browser.js('document.querySelector("[data-cluster=\'1\']").value') == value
    browser.click('#forget')

def test_the_map_shows_pictures(made, browser):
    browser.open(made[1])
    seen = 'document.getElementById("seen")'
    assert browser.js(f'{seen}.hidden')
    for i in (0, 500, 999):
        at = browser.middle(f'circle:nth-of-type({i + 1})')
        browser.mouse('mouseMoved', at)
        assert not browser.js(f'{seen}.hidden')
        name, cluster = browser.js(f'{seen}.textContent').strip().rsplit(': cluster ', 1)
        shown = browser.js(f'[...{seen}.firstChild.getContext("2d").getImageData(0, 0, 40, 40).data]')
        want = torch.from_numpy(np.array(Image.open(made[0]/'in'/name))).float().mean((0, 1))
        assert torch.allclose(torch.tensor(shown).view(-1, 4)[:, :3].float().mean(0), want, atol=6)
    browser.mouse('mouseMoved', (1, 1))
    assert browser.js(f'{seen}.hidden')
    browser.js('document.querySelector(".map svg").focus()')
    texts = []
    for key in ('ArrowRight', 'ArrowRight', 'ArrowLeft', 'ArrowLeft'):
        browser.key(key)
        texts.append(browser.js(f'{seen}.textContent'))
    assert texts[0] == texts[2] and len({*texts}) == 3
    browser.key('Escape')
    assert browser.js(f'{seen}.hidden')

@pytest.mark.parametrize('width', [400, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_readable(width, scheme, made, browser):
    browser.call('Emulation.setDeviceMetricsOverride', width=width, height=800, deviceScaleFactor=1,
                 mobile=width < 500)
    browser.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
    browser.open(made[1])
    assert browser.js('document.documentElement.scrollWidth') <= width
    def light(name):
        return sum(map(int, re.findall(r'\d+', browser.js(f'getComputedStyle(document.body).{name}'))))
    paper, ink = light('backgroundColor'), light('color')
    assert (paper > 600 and ink < 200) if scheme == 'light' else (paper < 150 and ink > 600)
    unnamed = browser.js('''[...document.querySelectorAll(
        'a, button, input, img:not([hidden]), [tabindex]')].filter(
        e => !(e.textContent.trim() || e.ariaLabel || e.alt || e.querySelector('[alt]'))).length''')
    assert unnamed == 0
    assert browser.js('[...document.images].every(i => i.complete && i.naturalWidth > 0)')
    browser.call('Emulation.clearDeviceMetricsOverride')

def test_links_open_the_files(made, browser):
    browser.open(made[1])
    links = browser.js('[...document.querySelectorAll(".thumbs a")].map(a => a.href)')
    odd = next(a for a in links if '%3Cb%3E' in a)
    browser.call('Page.navigate', url=odd)
    browser.until('document.contentType == "image/png" && document.images[0].naturalWidth == 40')

def test_no_script_but_our_own(made, browser, tmp_path):
    text = made[1].read_text()
    (tmp_path/'report.html').write_text(text.replace('</main>', '<script>window.evil = 1</script></main>'))
    browser.open(tmp_path/'report.html')
    assert browser.js('window.evil === undefined')
    assert browser.js('document.getElementById("said").textContent').startswith('0 of')
