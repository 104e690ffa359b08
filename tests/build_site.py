"""The website: notebooks with the outputs that they store, a reference of every public name, a search.

    python tests/build_site.py [folder]      # into _docs

Nothing is executed, and nothing is fetched, now or when a page is read. Pages are written as Markdown into a
temporary folder and rendered by Sphinx; MyST-NB reads notebooks, website/conf.py says how all of it looks.
"""
import ast
import base64
import re
import sys
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import TemporaryDirectory

import nbformat
from jinja2 import Environment, FileSystemLoader
from nbformat.v4 import new_markdown_cell
from reference import Module, command_page, module_page
from render import prepare
from run_notebooks import NBS, ROOT, TIMES, directives, get_config, notebooks
from sphinx.cmd.build import main as sphinx

from scan_nb.cli import _parser

HERE = Path(__file__).parent/'website'
CONFIG = get_config(path=ROOT)
GIT = CONFIG.git_url
BADGE = re.compile(r'\n*\[!\[[^]]*\]\(\S*colab-badge\S*\)\]\(\S*\)')
ENGINE = 'Engine room: skip on a first reading.'

def spoken(text):
    "Markdown as it would be read out."
    return re.sub(r'\s+', ' ', re.sub(r'!?\[([^]]*)\]\([^)]*\)|[*`$\\"{}]', r'\1', text)).strip()

def only_imports(code):
    "Perhaps with how figures and numbers are to look."
    try: lines = ast.parse(code).body
    except SyntaxError: return False    # a line for the shell
    looks = re.compile(r'(\w+\.)?(set_style|set_printoptions)\(')
    imports = [n for n in lines if isinstance(n, ast.Import | ast.ImportFrom)]
    return bool(imports) and all(n in imports or looks.match(ast.unparse(n)) for n in lines)

class Notebook:
    "A notebook of the course, and what other pages say of it."
    def __init__(self, path):
        self.path, self.nb = path, nbformat.read(path, as_version=4)
        self.doc = path.relative_to(NBS).with_suffix('').as_posix()
        self.head = self.nb.cells[0].source
        self.title, self.claim = re.match(r'# (.+)\n\s*> (.+)', self.head).groups()
        self.number = (re.match(r'\d+[a-z]?', path.stem) or [''])[0]
        self.kind = ('tutorial' if path.parent.name == 'tutorials' else '' if not self.number else
                     'engine room' if any(ENGINE in c.source for c in self.nb.cells[:3]) else 'lesson')

    def write_thumbnail(self, folder):
        "The richest figure that it stores; in a notebook without one: that of the first page."
        figures = [(base64.b64decode(data), kind[6:]) for c in self.nb.cells for o in c.get('outputs', [])
                   for kind, data in o.get('data', {}).items() if kind.startswith('image/')]
        figures.append(((NBS/'images/index_0.png').read_bytes()*(not figures), 'png'))
        data, kind = max(figures, key=lambda figure: len(figure[0]))
        self.thumbnail = f'{self.path.stem}.{kind}'
        (folder/self.thumbnail).write_bytes(data)

    def facts(self):
        "The line below the claim."
        read, run = m.groups() if (m := TIMES.search(self.head)) else ('', '')
        place = f'{GIT}/blob/main/nbs/{self.doc}.ipynb'
        colab = place.replace('//github.com', '//colab.research.google.com/github')
        kind = f'{self.kind} {self.number}'.strip().capitalize()
        words = [kind + ': skip it on a first reading'*(self.kind == 'engine room'),
                 read and f'{read[:-1]} to read', run and f'{run[:-1]} to run',
                 f'[notebook]({place})', f'[Colab]({colab})']
        return '{.facts}\n' + ' · '.join(w for w in words if w)

    def link(self, target):
        "Notebooks and pictures are pages here; other files of the repository are read where it is."
        if '.ipynb' in target or target.startswith('images/'): return target
        return f'{GIT}/blob/main/{(self.path.parent/target).resolve().relative_to(ROOT)}'

    def page(self, below, targets, home):
        """What Sphinx gets: nothing hidden, a text below the claim, a target at some cells, an alternative
        text for each figure (`#| fig-alt`, or what stands above it), a link on each name that has a home."""
        seen = {c.id: directives(c).get('fig-alt') for c in self.nb.cells}
        nb = prepare(self.nb, self.link)
        text = BADGE.sub('', TIMES.sub('', self.head))
        nb.cells[0].source = text.replace(f'> {self.claim}', f'> {self.claim}\n\n{below}\n', 1)
        cells, title, said = [], self.title, ''
        for c in nb.cells:
            if c.id in targets: cells.append(new_markdown_cell(f'(cell-{c.id})='))
            if c.cell_type == 'markdown':
                c.source = re.sub(rf'{ENGINE}\s*', '', c.source)   # is said below the claim
                title = (re.findall(r'^#+ (.+)', c.source, re.M) or [title])[-1]
                prose = [p for p in re.split(r'\n\s*\n', c.source) if p.strip() and p[0] not in '#|!$`']
                said = prose[-1] if prose else said
                c.source = re.sub(r'(?<![`[])`(\w*[A-Z_]\w*)`(?![`\]])', lambda m: (
                    f'[{m[0]}]({home[m[1]]})' if m[1] in home else m[0]), c.source)
            elif c.metadata.pop('transient', None): c.metadata.tags = ['remove-input']
            elif only_imports(c.source): c.metadata.tags = ['hide-input']
            c.metadata.mystnb = dict(code_prompt_show='Imports', code_prompt_hide='Imports',
                                     image=dict(alt=seen[c.id] or spoken(f'{title}: {said}')[:250]))
            cells.append(c)
        nb.cells = cells
        return nb

def write_pages(top):
    "All pages of the site, below a folder."
    copytree(NBS/'images', top/'images')
    for folder in ('reference', 'thumbnails', *{p.parent.relative_to(NBS) for p in notebooks()}):
        (top/folder).mkdir(exist_ok=True)
    books = [Notebook(p) for p in notebooks()]
    titles = {b.path.stem: f'{b.number} {b.title}'.strip() for b in books}
    modules = [Module(p) for p in (ROOT/'scan_nb').glob('[!_]*.py')]
    modules.sort(key=lambda m: [*titles].index(m.notebook))
    names = [n for m in modules for n in m.names]
    cells = {n.cell for n in names}
    def home(stem):     # of a name that has several: in the module of the notebook, else in the last one
        ordered = sorted(names, key=lambda n: n.module.notebook == stem)
        return {b.path.stem: f'/{b.doc}.ipynb' for b in books} | {
            n.name: f'#scan_nb.{n.module.name}.{n.name}' for n in ordered}
    known = dict(modules=modules, version=CONFIG.version, git=GIT)
    for kind in ('lesson', 'engine room', 'tutorial'):
        known[kind.split()[-1]] = [b for b in books if b.kind == kind]
    for b in known['tutorial']: b.write_thumbnail(top/'thumbnails')
    pages = Environment(loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True)
    def template(name): return pages.get_template(f'{name}.md').render(known)
    texts = {name: template(name) for name in ('learn', 'use', 'extend', 'contribute')}
    texts['changelog'] = (NBS/'changelog.md').read_text(encoding='utf-8')
    texts['command_line'] = command_page(_parser())
    texts |= {f'reference/{m.name}': module_page(m, titles[m.notebook]) for m in modules}
    for name, text in texts.items(): (top/f'{name}.md').write_text(text, encoding='utf-8')
    for b in books:
        page = b.page(template('doors') if b.doc == 'index' else b.facts(), cells, home(b.path.stem))
        nbformat.write(page, top/f'{b.doc}.ipynb')

def build(to=ROOT/'_docs'):
    "The site in a folder, in place of what was there. Sphinx's exit status: a warning is an error."
    with TemporaryDirectory() as top:
        pages, trees, site = (Path(top)/name for name in ('pages', 'trees', 'site'))
        pages.mkdir()
        write_pages(pages)
        fault = sphinx(['-q', '-W', '--keep-going', '-c', str(HERE), '-d', str(trees), str(pages), str(site)])
        rmtree(to, ignore_errors=True)
        if not fault: copytree(site, to)
        return fault

if __name__ == '__main__': sys.exit(build(*map(Path, sys.argv[1:])))
