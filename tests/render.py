"""README.md from `nbs/index.ipynb` with its stored outputs, no quarto.

    python tests/render.py readme      # writes README.md and its figures, nbs/images/index_*

A cell under `#| hide` is left out, and of one under `#| hide-input` only the outputs are shown.
"""
import posixpath
import re
import sys

import nbformat
from nbconvert import MarkdownExporter
from run_notebooks import NBS, ROOT, directives

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

if __name__ == '__main__':
    if sys.argv[1:] != ['readme']: sys.exit(__doc__)
    write_readme()
