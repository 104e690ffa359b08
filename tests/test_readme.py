"README.md is what the renderer makes of nbs/index.ipynb."
import base64
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from render import readme
from run_notebooks import NBS, ROOT, notebooks

def stored(): return (ROOT/'README.md').read_text()

def test_readme_is_fresh():
    text, figures = readme()
    assert stored() == text, 'run `make readme`'
    assert {f'nbs/images/{p.name}' for p in (NBS/'images').glob('index_*')} == figures.keys()
    for name, data in figures.items(): assert (ROOT/name).read_bytes() == data

def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\((?!https?:|mailto:|#)([^)#\s]+)', stored())
    assert not [link for link in links if not (ROOT/link).exists()]

def test_readme_is_short(): assert len(stored().splitlines()) < 150

def test_readme_begins_with_a_picture_of_a_report():
    picture, = re.findall(r'\A# .*\n\n> .*\n\n!\[[^\]]+\]\((nbs/images/\S+\.png)\)', stored())
    data = (ROOT/picture).read_bytes()
    assert data.startswith(b'\x89PNG') and len(data) < 250_000

def test_code_of_the_readme_makes_no_tables_or_pictures():
    code = '\n'.join(re.findall(r'```python\n(.*?)```', stored(), re.S))
    assert code and not re.search(r'matplotlib|plt\.|show_|plot_|Markdown|\bcsv\b', code)

@pytest.mark.parametrize('path', [p for p in notebooks() if p.stem != 'index'], ids=lambda p: p.stem)
def test_map_has_each_notebook_and_marks_engine_rooms(path):
    link = f']({path.relative_to(ROOT).as_posix()})'
    row, = (line for line in stored().splitlines() if line.startswith('|') and link in line)
    assert (link in row.rsplit('|', 2)[1]) == ('Engine room: skip' in path.read_text())

@pytest.fixture
def rendered(tmp_path):
    two = new_output('execute_result', {'text/plain': '2'})
    three = new_output('execute_result', {'text/plain': '<Markdown>', 'text/markdown': '| three |'})
    png = base64.b64encode(b'a picture').decode()
    figure = new_output('display_data', {'image/png': png, 'text/plain': '<Figure>'})
    cells = [new_markdown_cell('[data](00_data.ipynb), [licence](../LICENSE), [web](https://x.org/a)'),
             new_code_cell('#| hide\nsecret = 1'),
             new_code_cell('#| slow\n#| eval: false\n1+1', outputs=[two]),
             new_code_cell('plot()', outputs=[figure]),
             new_code_cell('#| slow\n#| hide-input\nmake_table(3)', outputs=[three])]
    nbformat.write(new_notebook(cells=cells), tmp_path/'index.ipynb')
    return readme(tmp_path/'index.ipynb')

def test_relative_links_start_at_the_root(rendered):
    assert '[data](nbs/00_data.ipynb), [licence](LICENSE), [web](https://x.org/a)' in rendered[0]

def test_hidden_cells_and_directives_are_dropped(rendered):
    assert 'secret' not in rendered[0] and '#|' not in rendered[0]

def test_code_is_tagged_and_its_output_shown(rendered):
    assert '```python\n1+1\n```' in rendered[0] and '\n    2\n' in rendered[0]

def test_hidden_inputs_leave_their_outputs(rendered):
    assert 'make_table' not in rendered[0] and '\n| three |\n' in rendered[0]

def test_no_line_is_made_of_spaces(rendered): assert not re.search(r'^ +$', rendered[0], re.M)

def test_figures_become_files(rendered):
    assert '](nbs/images/index_0.png)' in rendered[0] and '<Figure>' not in rendered[0]
    assert rendered[1] == {'nbs/images/index_0.png': b'a picture'}
