"The website: what its pages hold, and what a reader does with it, in a browser where there is one."
import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from browser import CHROMIUM, Browser
from build_site import Notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_notebooks import NBS, ROOT, notebooks
from test_notebooks import LESSONS
from test_package import MODULES

PUBLIC = {f'scan_nb.{p.stem}.{name}' for p in MODULES
          for name in getattr(importlib.import_module(f'scan_nb.{p.stem}'), '__all__', [])}

class Page(HTMLParser):
    "The ids, pictures, links and text of a page, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.pictures, self.links, self.loads, self.texts, self.inside = set(), [], [], [], [], []
        self.feed(path.read_text(encoding='utf-8'))
        self.text = ''.join(self.texts)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag == 'img': self.pictures.append(attrs)
        if tag == 'a' and 'href' in attrs: self.links.append(attrs['href'])
        if attrs.get('rel') in ('stylesheet', 'preload', 'icon'): self.loads.append(attrs['href'])
        if 'src' in attrs: self.loads.append(attrs['src'])
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag: pass

    def handle_data(self, data):
        if not {'script', 'style'} & {*self.inside[-1:]}: self.texts.append(data)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    top = tmp_path_factory.mktemp('site')/'_docs'
    done = subprocess.run([sys.executable, ROOT/'tests/build_site.py', top], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr   # a warning is an error
    return top

@pytest.fixture(scope='module')
def pages(site):
    return {p: Page(p) for p in site.rglob('*.html') if '_static' not in p.parts}

# -- pages --

def test_every_notebook_has_a_page(site, pages):
    assert {site/p.relative_to(NBS).with_suffix('.html') for p in notebooks()} <= pages.keys()

def test_the_first_page_leads_to_the_chinese_one(site, pages):
    first, chinese = pages[site/'index.html'], pages[site/'zh/index.html']
    assert 'zh/index.html' in first.links and '自标注' in chinese.text
    lessons = {f'../{p.stem}.html' for p in LESSONS}
    assert lessons <= {urldefrag(link)[0] for link in chinese.links}

def test_every_public_name_is_in_the_reference(site, pages):
    found = {name for p in pages if p.parent.name == 'reference' for name in pages[p].ids}
    assert len(PUBLIC) > 400 and PUBLIC <= found

def test_the_search_knows_every_public_name(site):
    index = json.loads((site/'searchindex.js').read_text().removeprefix('Search.setIndex(').removesuffix(')'))
    assert PUBLIC <= {f'{module}.{entry[4]}' for module, some in index['objects'].items() for entry in some}

def test_parameters_are_told_as_the_source_does(site, pages):
    text = re.sub(r'\s+', ' ', pages[site/'reference/neighbors_fast.html'].text)
    for told in ('k int 20 neighbors per image, 1 ≤ k < N', 'Raises UserError for a k or embeddings that',
                 'Returns Tensor: N×k int64 on the same device, nearest first, never the image itself'):
        assert told in text

def test_every_command_is_told(site, pages):
    from scan_nb.cli import COMMANDS
    assert {f'command-{name}' for name in COMMANDS} <= pages[site/'command_line.html'].ids
    assert '--n-clusters K' in pages[site/'command_line.html'].text

def test_every_picture_has_a_text(pages):
    pictures = [(p.name, x) for p, page in pages.items() for x in page.pictures]
    without = [(name, x['src']) for name, x in pictures if not x.get('alt', '').strip()]
    assert len(pictures) > 150 and not without

def test_links_lead_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, part = urldefrag(link)
            if re.match(r'[a-z]+:', target) or not target + part: continue
            file = (path.parent/unquote(target)).resolve() if target else path
            if not file.exists() or part and file in pages and unquote(part) not in pages[file].ids:
                broken.append(f'{path.name}: {link}')
    assert not broken

def test_everything_is_loaded_from_the_site(site, pages):
    assert not [(p.name, x) for p, page in pages.items() for x in page.loads if re.match(r'[a-z]+:|//', x)]
    styles = [p.read_text() for p in site.rglob('*.css')]
    assert styles and not any(re.search(r'(url\(|@import )["\']?(https?:|//)', text) for text in styles)

def test_no_directive_is_shown(pages):
    shown = re.compile(r'^\s*#\s?\| ?(export|hide|slow|eval|default_exp)', re.M)
    assert not [p.name for p, page in pages.items() if shown.search(page.text)]

def test_hidden_cells_vanish_and_hidden_inputs_leave_their_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr('build_site.NBS', tmp_path)
    shown = new_output('execute_result', {'text/plain': 'the answer'})
    cells = [new_markdown_cell('# Title\n\n> Claim.\n\n[![Open in Colab](https://x/colab-badge.svg)](https://x)'),
             new_code_cell('#| hide\nsecret = 1'),
             new_code_cell('#| hide-input\nquestion()', outputs=[shown]),
             new_code_cell('#| export\ndef f(): pass', id='abc'), new_markdown_cell('`f_g` and `x_y`')]
    nbformat.write(new_notebook(cells=cells), tmp_path/'01_a.ipynb')
    nb = Notebook(tmp_path/'01_a.ipynb').page('facts', {'abc'}, {'f_g': '#m.f_g'})
    sources = [c.source for c in nb.cells]
    assert sources == ['# Title\n\n> Claim.\n\nfacts\n', 'question()', '(cell-abc)=', 'def f(): pass',
                       '[`f_g`](#m.f_g) and `x_y`']
    assert nb.cells[1].metadata.tags == ['remove-input'] and nb.cells[1].outputs == [shown]

# -- in a browser --

class Watched(Browser):
    "Keeps the addresses of all that is asked for."
    asked = ()
    def receive(self):
        message = super().receive()
        if message.get('method') == 'Network.requestWillBeSent':
            self.asked = *self.asked, message['params']['request']['url']
        return message

    def open(self, file):
        self.call('Page.navigate', url='about:blank')   # or the page before counts as loaded
        self.until("location.protocol == 'about:'")
        super().open(file)

    def size(self, width):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 500)

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROMIUM: pytest.skip('no Chromium here')
    with Watched(tmp_path_factory.mktemp('chromium')) as browser:
        browser.call('Network.enable')
        still = dict(name='prefers-reduced-motion', value='reduce')     # no gliding to what is clicked
        browser.call('Emulation.setEmulatedMedia', features=[still])
        yield browser

def at(name): return f"location.href.endsWith({name!r}) && document.readyState == 'complete'"

def test_doors_and_lessons_lead_on(site, browser):
    browser.size(1300)
    browser.open(site/'index.html')
    browser.click('.doors .sd-card')
    browser.until(at('learn.html'))
    for selector, page in (('.lesson a', '00_data.html'), ('a.right-next', '01_augment.html'),
                           ('a.right-next', '02_models.html'), ('a.left-prev', '01_augment.html')):
        browser.click(selector)
        browser.until(at(page))

def test_the_search_finds_a_function(site, browser):
    browser.size(1300)
    browser.open(site/'09_scan.html')
    browser.click('.search-button__button')
    browser.until("document.querySelector('#pst-search-dialog').open")
    browser.call('Input.insertText', text='mine_neighbors')
    browser.key('End')     # results come as one types
    browser.until("!!document.querySelector('#search-results ul.search a')")
    browser.js("document.querySelector('#pst-search-dialog form').requestSubmit()")
    browser.until(at('search.html?q=mine_neighbors'))
    found = "#search-results a[href*='neighbors_fast.html#scan_nb.neighbors_fast.mine_neighbors']"
    browser.until(f'!!document.querySelector("{found}")')
    browser.click(found)
    browser.until("location.hash == '#scan_nb.neighbors_fast.mine_neighbors'")

def test_formulas_are_typeset(site, browser):
    browser.open(site/'09_scan.html')
    browser.until("document.querySelectorAll('mjx-container svg').length > 20")
    widths = '[...document.querySelectorAll("mjx-container")].map(x => x.getBoundingClientRect().width)'
    assert min(browser.js(widths)) > 4
    text = browser.js("document.querySelector('article').innerText")
    assert not re.search(r'\$\$|\\\(|\\\[|\\sum|\\frac', text) and 'Math input error' not in text

def test_dark_and_light(site, browser):
    "Chosen once, for all pages."
    browser.size(1300)
    browser.open(site/'learn.html')
    brightness = []
    for mode in ('dark', 'light'):
        browser.click('.theme-switch-button')
        browser.until("!!document.querySelector('.theme-switch-button + .show')")
        browser.click(f'.theme-change-button[data-mode="{mode}"]')
        browser.open(site/'09_scan.html')
        paint = browser.js('getComputedStyle(document.body).backgroundColor')
        brightness.append(sum(map(int, re.findall(r'\d+', paint)[:3]))/765)
    assert brightness[0] < .2 and brightness[1] > .9

NARROW = ['index', 'learn', 'use', 'extend', 'contribute', 'changelog', 'command_line', '09_scan',
          'benchmarks', 'tutorials/frozen_heads', 'reference/neighbors_fast', 'reference/recipes', 'genindex',
          'teaching', 'zh/index']

def test_a_narrow_screen_is_enough(site, browser):
    "Code and tables scroll by themselves, the page does not."
    browser.size(400)
    wide = []
    for name in NARROW:
        browser.open(site/f'{name}.html')
        widths = ['document.documentElement', 'document.querySelector(".bd-article-container")']
        if max(browser.js(f'{part}.scrollWidth') for part in widths) > 400: wide.append(name)
    assert not wide

def test_no_request_leaves_the_site(site, browser):
    "All that the tests above asked for, and pages with a formula, a figure, a search."
    for name in ('index', '01_augment', 'search'): browser.open(site/f'{name}.html')
    top = site.as_uri()
    assert any(x.endswith('.png') for x in browser.asked)
    assert not {x for x in browser.asked if not x.startswith((top, 'data:', 'about:'))}
