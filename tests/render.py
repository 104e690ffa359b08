"""README.md from `nbs/index.ipynb`, or HTML pages of all notebooks; stored outputs, no quarto.

    python tests/render.py readme      # writes README.md and its figures, nbs/images/index_*
    python tests/render.py docs        # writes _docs/*.html

A cell under `#| hide` is left out, and of one under `#| hide-input` only the outputs are shown.
"""
import logging
import posixpath
import re
import sys

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from run_notebooks import NBS, ROOT, directives, notebooks

LEAD = re.compile(r'\A(?:[ \t]*#[ \t]*\|.*\n?)+')
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)')

def prepare(nb, link):
    "Drop hidden cells, inputs and directives; `link` maps the target of each relative link in the prose."
    nb.cells = [c for c in nb.cells if not directives(c).keys() & {'hide', 'default_exp'}]
    for c in nb.cells:
        if 'hide-input' in directives(c): c.metadata.transient = {'remove_source': True}
        if c.cell_type == 'code': c.source = LEAD.sub('', c.source)
        else: c.source = LINK.sub(lambda m: m[1] + link(m[2]), c.source)
    nb.metadata.language_info = {'name': 'python', 'pygments_lexer': 'ipython3'}
    return nb

def readme(path=NBS/'index.ipynb'):
    "The text of the README and its figures, a dict from path below the root of the repository to bytes."
    nb = prepare(nbformat.read(path, as_version=4), lambda target: posixpath.normpath(f'nbs/{target}'))
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    pictures = [o for o in outputs if any(kind.startswith('image/') for kind in o.get('data', {}))]
    for n, out in enumerate(pictures): out.metadata.filename = f'{path.stem}_{n}'
    text, found = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'nbs/images'})
    text = re.sub(r'^[ \t]+$', '', text, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n', found['outputs']

def write_readme():
    text, figures = readme()
    for old in (NBS/'images').glob('index_*'): old.unlink()
    for name, data in {'README.md': text.encode(), **figures}.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

def write_docs(dest=ROOT/'_docs'):
    logging.getLogger('traitlets').setLevel(logging.ERROR)      # no word on figures without alternative text
    exporter = HTMLExporter(embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)
    for path in notebooks():
        nb = prepare(nbformat.read(path, as_version=4), lambda target: re.sub(r'\.ipynb\b', '.html', target))
        nb.metadata.title = nb.cells[0].source.splitlines()[0].lstrip('# ')
        page = (dest/path.relative_to(NBS)).with_suffix('.html')
        page.parent.mkdir(parents=True, exist_ok=True)
        html, _ = exporter.from_notebook_node(nb, {'metadata': {'path': str(path.parent)}})
        page.write_text(html, encoding='utf-8')

if __name__ == '__main__':
    jobs = {'readme': write_readme, 'docs': write_docs}
    if len(sys.argv) != 2 or sys.argv[1] not in jobs: sys.exit(__doc__)
    jobs[sys.argv[1]]()
