"README.md is what the renderer makes of nbs/index.ipynb."
import base64
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from render import readme
from run_notebooks import NBS, ROOT

def test_readme_is_fresh():
    text, figures = readme()
    assert (ROOT/'README.md').read_text() == text, 'run `make readme`'
    assert {f'nbs/images/{p.name}' for p in (NBS/'images').glob('index_*')} == figures.keys()
    for name, data in figures.items(): assert (ROOT/name).read_bytes() == data

def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\((?!https?:|mailto:|#)([^)#\s]+)', (ROOT/'README.md').read_text())
    assert not [link for link in links if not (ROOT/link).exists()]

@pytest.fixture
def rendered(tmp_path):
    two = new_output('execute_result', {'text/plain': '2'})
    png = base64.b64encode(b'a picture').decode()
    figure = new_output('display_data', {'image/png': png, 'text/plain': '<Figure>'})
    cells = [new_markdown_cell('[data](00_data.ipynb), [licence](../LICENSE), [web](https://x.org/a)'),
             new_code_cell('#| hide\nsecret = 1'),
             new_code_cell('#| slow\n#| eval: false\n1+1', outputs=[two]),
             new_code_cell('plot()', outputs=[figure])]
    nbformat.write(new_notebook(cells=cells), tmp_path/'index.ipynb')
    return readme(tmp_path/'index.ipynb')

def test_relative_links_start_at_the_root(rendered):
    assert '[data](nbs/00_data.ipynb), [licence](LICENSE), [web](https://x.org/a)' in rendered[0]

def test_hidden_cells_and_directives_are_dropped(rendered):
    assert 'secret' not in rendered[0] and '#|' not in rendered[0]

def test_code_is_tagged_and_its_output_shown(rendered):
    assert '```python\n1+1\n```' in rendered[0] and '\n    2\n' in rendered[0]

def test_figures_become_files(rendered):
    assert '](nbs/images/index_0.png)' in rendered[0] and '<Figure>' not in rendered[0]
    assert rendered[1] == {'nbs/images/index_0.png': b'a picture'}
