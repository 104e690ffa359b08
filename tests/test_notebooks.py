"Every notebook runs, stores what it shows, and keeps the form of a lesson."
import ast
import re
from functools import cache

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from run_notebooks import (NBS, ROOT, TIMES, directives, get_config, notebooks, reading, run, solutions,
                           tell_times)

LOCAL_PATH = re.compile(r'(?<![\w.~-])/(home|root|tmp|work|workspace|mnt|opt|Users|var/folders)/')
each_notebook = pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)

@cache
def read(path): return nbformat.read(path, as_version=4)

def code_cells(path): return [c for c in read(path).cells if c.cell_type == 'code']

def tree(cell): return ast.parse(TransformerManager().transform_cell(cell.source))

LAST = 99, ''

def room(name):
    "Where a notebook stands: (12, 'a') for 12a_x; index and tutorials come after all."
    if name == 'benchmarks': return 12, 'z'   # after all that it measures, before the command that runs it
    return (int(m[1]), m[2]) if (m := re.match(r'(\d+)([a-z]?)_', name)) else LAST

def module(path):
    "The module that a notebook exports: that of its name, but for two."
    others = {'12b_scan': 'pipeline', '13a_main': '__main__'}
    return others.get(path.stem, re.sub(r'^\d+[a-z]?_', '', path.stem))

ROOMS = {module(p): room(p.stem) for p in notebooks() if room(p.stem) < LAST}

def test_rooms_have_an_order():
    names = ('00_a', '00a_b', '01_c', '01a_d', '02_e', '12_f', '12a_g', '12b_h', 'benchmarks', '13_i',
             '13a_j', 'index')
    assert sorted(names, key=room) == [*names] and len({room(name) for name in names}) == len(names)
    assert len({*ROOMS.values()}) == len(ROOMS)
    assert ROOMS['pipeline'] < ROOMS['benchmarks'] < ROOMS['cli'] < ROOMS['__main__'] == max(ROOMS.values())

def outputs(path):
    "Pairs (kind, text) of all that cells show: streams, and each form of each display but pictures."
    for c in code_cells(path):
        for o in c.outputs:
            if o.output_type == 'error': yield 'error', o.evalue
            if o.output_type == 'stream': yield o.name, o.text
            yield from ((k, str(v)) for k, v in o.get('data', {}).items() if not k.startswith('image/'))

EXPORT = {'export', 'exports'}

# -- execution --

BESIDE = set(NBS.rglob('*'))

@each_notebook
def test_runs(path):
    faults = run(path, check=True)
    assert not faults, '\n'.join(faults)
    left = {p for p in {*path.parent.iterdir()} - BESIDE if p.suffix != '.ipynb'}
    assert not left, 'left beside the notebook'

def test_solutions_run_with_their_notebook(tmp_path):
    "Those of the exercises: in the state at its end, one after another, and their outputs are not compared."
    def answered(code):
        text = ('## Exercises\n\n1. Why?\n\n<details><summary>Solutions</summary>\n\n1. So.\n\n   ```python\n'
                '   for i in (x,):\n       y = 1\n   y\n   ```\n\n'
                f'   ```python\n   {code}\n   ```\n\n</details>\n')
        cells = [nbformat.v4.new_code_cell('x = 2'), nbformat.v4.new_markdown_cell(text)]
        nb = nbformat.v4.new_notebook(cells=cells)
        nbformat.write(nb, tmp_path/'a.ipynb')
        return nb
    found = [c.source for c in solutions(answered('assert x + y == 3'))]
    assert found == ['for i in (x,):\n    y = 1\ny\n', 'assert x + y == 3\n']
    assert not run(tmp_path/'a.ipynb', check=True)
    answered('assert x + y == 4')
    fault, = run(tmp_path/'a.ipynb', check=True)
    assert 'assert x + y == 4' in fault and 'AssertionError' in fault

# -- stored outputs --

@each_notebook
def test_has_outputs(path):
    assert any(c.outputs for c in code_cells(path)), 'no stored outputs: run `make notebooks`'

@each_notebook
def test_outputs_are_presentable(path):
    faults = [f'{kind}: {text[:80]!r}' for kind, text in outputs(path)
              if kind in ('error', 'stderr') or 'widget' in kind or LOCAL_PATH.search(text)]
    assert not faults, '\n'.join(faults)

@each_notebook
def test_names_no_path_of_one_machine(path):
    assert not [m[0] for c in read(path).cells for m in LOCAL_PATH.finditer(c.source)]

@each_notebook
def test_is_small(path): assert path.stat().st_size < 1_000_000

# -- form --

@each_notebook
def test_begins_with_title_and_claim(path):
    first = next(c for c in read(path).cells[:2] if c.cell_type == 'markdown')
    assert re.match(r'# \S.*\n\s*> \S', first.source), '`# Title`, then `> one-sentence claim`'

@pytest.mark.parametrize('path', [p for p in notebooks() if p.stem not in ('index', 'benchmarks')],
                         ids=lambda p: p.stem)
def test_says_how_long_it_takes(path):
    nb = read(path)
    told = TIMES.search(nb.cells[0].source)
    assert told and told[1] == f'about {reading(nb)} minutes.', 'run `make notebooks`'
    assert re.fullmatch(r'(less than a|1|2) minutes? on a CPU\.', told[2])

@pytest.mark.parametrize('path', [p for p in notebooks() if p.stem not in ('index', 'benchmarks')],
                         ids=lambda p: p.stem)
def test_opens_in_colab(path):
    "A badge below the claim; the first code clones and installs the package there, and goes to its folder."
    git, place = get_config(path=ROOT).git_url, path.relative_to(ROOT).as_posix()
    there = git.replace('//github.com', '//colab.research.google.com/github')
    assert f'colab-badge.svg)]({there}/blob/main/{place})\n' in read(path).cells[0].source
    first = code_cells(path)[0]
    assert f'clone -q --depth 1 {git} /content/' in first.source and not first.outputs
    assert first.source.endswith(f'%cd -q /content/scan_nb/{path.relative_to(ROOT).parent.as_posix()}')
    assert directives(first).keys() & {'hide', 'default_exp'}

def test_engine_rooms_can_be_skipped():
    said = {p.stem.partition('_')[0] for p in notebooks() for c in read(p).cells[:3]
            if 'Engine room: skip on a first reading' in c.source}
    assert said == {'00a', '00b', '01a', '01b', '02a', '02b', '03a', '03b', '08a', '08b', '08c', '11a', '11b',
                    '11c', '13a'}

def test_times_are_told_once():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# A\n\n> Claim.\n\nMore.')])
    nb.cells += [nbformat.v4.new_markdown_cell('word '*1000), nbformat.v4.new_code_cell('x = 1\n\n# y\n'*75)]
    for seconds, words in ((30, 'less than a minute'), (80, '1 minute'), (100, '2 minutes')):
        tell_times(nb, seconds)
        assert nb.cells[0].source == (
            f'# A\n\n> Claim.\n\nMore.\n\n*Reading: about 10 minutes. Running: {words} on a CPU.*')

@each_notebook
def test_cells_are_short(path):
    "An exported cell with a class holds all of its methods; another is one function, or part of a lesson."
    def lines(c): return len(re.findall(r'^\s*(?!\s|#\s*\|).', c.source, re.M))
    def exported(c): return directives(c).keys() & EXPORT
    def limit(c):
        return 160 if exported(c) and any(isinstance(n, ast.ClassDef) for n in tree(c).body) else 25
    faults = {c.id: lines(c) for c in code_cells(path) if lines(c) > limit(c)}
    lesson = [lines(c) for c in code_cells(path) if not exported(c)]
    assert not faults and np.percentile(lesson, 90) <= 15, faults or sorted(lesson)

LESSONS = [p for p in notebooks() if room(p.stem) < LAST and not room(p.stem)[1]]

@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_a_lesson_can_be_read_in_one_sitting(path):
    "What is longer has machinery in it that wants an engine room (a letter) of its own."
    lines = (ROOT/'scan_nb'/f'{module(path)}.py').read_text().count('\n')
    assert len(read(path).cells) <= 110 and lines <= 600 and reading(read(path)) <= 40

TAUGHT = [p for p in notebooks() if room(p.stem) < LAST and p.stem != 'benchmarks'
          and 'Engine room: skip' not in p.read_text(encoding='utf-8')]   # lessons, those with a letter too

@pytest.mark.parametrize('path', TAUGHT, ids=lambda p: p.stem)
def test_a_picture_comes_before_formulas_and_soon(path):
    cells = read(path).cells
    pictures = [i for i, c in enumerate(cells) if any('image/' in k for o in c.get('outputs', [])
                                                      for k in o.get('data', {}))]
    formulas = [i for i, c in enumerate(cells) if c.cell_type == 'markdown' and '$$' in c.source]
    before = [c for c in cells[:pictures[0]] if c.cell_type == 'code' and 'default_exp' not in directives(c)]
    assert len(before) < 5 and min(formulas, default=len(cells)) > pictures[0]

@pytest.mark.parametrize('path', TAUGHT, ids=lambda p: p.stem)
def test_each_exercise_has_a_solution(path):
    text, = (c.source.split('## Exercises\n')[1] for c in read(path).cells if '## Exercises\n' in c.source)
    asked, told = text.split('<details><summary>Solutions</summary>')
    asked, told = (re.findall(r'^(\d+)\.', part, re.M) for part in (asked, told))
    assert 2 <= len(asked) <= 4 and asked == told and text.rstrip().endswith('</details>')

@each_notebook
def test_exports_the_module_of_its_name(path):
    named = [d['default_exp'].strip() for c in code_cells(path) if 'default_exp' in (d := directives(c))]
    assert named == ([module(path)] if room(path.stem) < LAST else [])

def imported(tree):
    "The modules of scan_nb that a piece of code imports, at its top or inside a function."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['scan_nb' if node.level else '', node.module]))
            names = [f'{base}.{a.name}' for a in node.names] if base == 'scan_nb' else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else: continue
        yield from (n.split('.')[1] for n in names if re.match(r'scan_nb\.(?!__version__)[a-z_]', n))

@pytest.mark.parametrize('code, names', [
    ('import scan_nb.data', ['data']), ('from scan_nb.data import x', ['data']), ('import scan_nb', []),
    ('from scan_nb import data, scan as s', ['data', 'scan']), ('from . import data, __version__', ['data']),
    ('from .data import x', ['data']), ('from .  import __main__', ['__main__']), ('import data', []),
    ('def f():\n    if x: from scan_nb.data import y', ['data']), ('import scan_nb.cli as c, os', ['cli']),
    ("from importlib import import_module\nimport_module('scan_nb.cli')", ['cli']),
    ("if __name__ == '__main__':\n    from scan_nb.cli import main", ['cli'])])
def test_imports_are_found(code, names): assert [*imported(ast.parse(code))] == names

@each_notebook
def test_imports_only_lower_rooms(path):
    "Its own module is no exception: what it exports is defined in it."
    here, names = room(path.stem), {m for c in code_cells(path) for m in imported(tree(c))}
    above = {m for m in names & ROOMS.keys() if ROOMS[m] >= here}
    assert not above, f'room {here} imports {above}'

def test_no_room_knows_the_command_line():
    knowing = {p.stem for p in notebooks() for c in code_cells(p) if 'cli' in imported(tree(c))
               if room(p.stem) < LAST}
    assert knowing <= {'13a_main'}

def defined(cell):
    "The public functions, and the public classes and constants, that an exported cell defines."
    body = tree(cell).body if directives(cell).keys() & EXPORT else []
    functions = {n.name for n in body if isinstance(n, ast.FunctionDef)}
    others = {n.name for n in body if isinstance(n, ast.ClassDef)}
    others |= {t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    return ({n for n in names if n[0] != '_'} for names in (functions, others))

def used(cell):
    "Names that a cell mentions, alone or as an attribute."
    return {getattr(n, 'id', None) or getattr(n, 'attr', None) for n in ast.walk(tree(cell))}

@each_notebook
def test_shows_what_it_exports(path):
    "A function is called in a visible cell below its definition; a class or constant is at least used below."
    shown, below, unused = set(), set(), set()
    for cell in reversed(code_cells(path)):
        functions, others = defined(cell)
        unused |= functions-shown | others-below
        below |= used(cell)
        if not directives(cell).keys() & {*EXPORT, 'hide'}: shown |= used(cell)
    assert not unused, f'exported, but never used below: {unused}'
