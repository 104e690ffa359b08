"Cells flagged `gpu`, which no notebook runs here: on a tiny CIFAR-10, with the settings of the recipe."
import ast
import inspect
from contextlib import suppress
from importlib import import_module

import pytest
import torch
from run_notebooks import NBS, directives
from scan_nb import moco, models, selflabel, simclr, whole_network
from scan_nb.data import digits
from scan_nb.models import small_resnet
from scan_nb.recipe_files import PRESETS
from test_datasets import write_cifar10
from test_notebooks import code_cells, module, tree, used

pytestmark = pytest.mark.usefixtures('one_thread')
PAPER = PRESETS['cifar-10'].on('cuda')

def run(cell, names):
    "Run a cell; the value of its last expression."
    body = tree(cell).body
    last = body.pop().value if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), 'cell', 'exec'), names)
    if last: return eval(compile(ast.Expression(last), 'cell', 'eval'), names)

def flagged(path): return [c for c in code_cells(path) if 'gpu' in directives(c)]

def without_runs(path):
    "What a lesson exports, imports and defines, and none of its results."
    exported = vars(import_module(f'scan_nb.{module(path)}'))
    names = {**exported, 'device': torch.device('cpu'), 'data': digits()}
    for cell in code_cells(path):
        if directives(cell).keys() & {'export', 'exports', 'slow', 'gpu', 'hide'}: continue
        for node in tree(cell).body:
            if not isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef)): continue
            with suppress(NameError):   # a default that is a result
                exec(compile(ast.Module([node], []), 'lesson', 'exec'), names)
    return names

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "60 images of noise to learn from and 12 others; short trainings, whose arguments are kept."
    write_cifar10(tmp_path/'scan_nb', n=12)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, 'resnet18_cifar', lambda: small_resnet(3, (8, 16), stem_stride=2))
    asked = {}
    def shorten(room, name):
        train = getattr(room, name)
        def short(*args, **options):
            asked[name] = inspect.signature(train).bind(*args, **options).arguments
            asked[name] |= asked[name].pop('options', {})
            return train(*args, **options | dict(epochs=1, batch_size=20, progress=None))
        monkeypatch.setattr(room, name, short)
    for room in (simclr, moco, selflabel): shorten(room, f"train_{room.__name__.split('.')[1]}")
    shorten(whole_network, 'train_scan')
    return asked

def lesson(name):
    "Run the flagged cells of a lesson; what the last one shows."
    path = NBS/f'{name}.ipynb'
    names = without_runs(path)
    for cell in flagged(path): shown = run(cell, names)
    return shown

def check(asked, recipe, *settings):
    assert {name: asked[name] for name in settings} == {name: getattr(recipe, name) for name in settings}

def check_views(views, recipe):
    assert views.size == recipe.size and recipe.views_options.items() <= vars(views).items()

def test_lessons_train_on_cifar10(tiny, tmp_path):
    "In the order of the course: each takes up what those before have left in `runs/`."
    found = lesson('06_simclr')
    assert found.keys() == {'vote', 'k_means'} and all(0 <= v <= 1 for v in found.values())
    check(tiny['train_simclr'], PAPER.pretext, 'epochs', 'batch_size', 'lr', 'temperature', 'warmup')
    check_views(tiny['train_simclr']['augment'], PAPER.pretext)
    kept = (tmp_path/'runs/cifar10/simclr.pt').read_bytes()
    acc, why = lesson('09d_whole_network')
    assert 0 <= acc <= 1 and 'kept' in why
    check(tiny['train_scan'], PAPER.scan, 'epochs', 'batch_size')
    check_views(tiny['train_scan']['augment'], PAPER.scan)
    assert tiny['train_scan']['neighbors'].shape == (60, PAPER.scan.n_neighbors)
    for setting in ('lr', 'weight_decay'):
        assert tiny['train_scan']['optimizer'].param_groups[0][setting] == getattr(PAPER.scan, setting)
    scanned = (tmp_path/'runs/cifar10/scan.pt').read_bytes()
    before, after, why = lesson('10_selflabel')
    assert before == acc and 0 <= after <= 1 and 'kept' in why
    check(tiny['train_selflabel'], PAPER.selflabel, 'epochs', 'batch_size', 'lr', 'threshold',
          'entropy_weight', 'ema_decay')
    check_views(tiny['train_selflabel']['strong'], PAPER.selflabel)
    assert (tmp_path/'runs/cifar10/simclr.pt').read_bytes() == kept
    assert (tmp_path/'runs/cifar10/scan.pt').read_bytes() == scanned

def test_moco_trains_on_cifar10(tiny):
    assert 0 <= lesson('07_moco') <= 100
    asked = tiny['train_moco']
    assert (asked['lr'], asked['batch_size'], asked['key_momentum']) == (.03, 256, .999)

LITTLE = {'backbone': 'small_resnet', 'backbone_options': dict(widths=(8, 16), stem_stride=2),
          'pretext.epochs': 1, 'pretext.batch_size': 20, 'scan.epochs': 1, 'scan.batch_size': 20,
          'selflabel.epochs': 1, 'selflabel.batch_size': 20}

def test_the_tutorial_runs_each_recipe(tiny, tmp_path):
    "But for DINOv2, whose weights would be downloaded, another size of batch, and training on the stand-in."
    (tmp_path/'results').mkdir()
    names, shown = {}, []
    for cell in code_cells(NBS/'tutorials/cifar10.ipynb'):
        if used(cell) & {'scan', 'p', 'nbdev'}: continue
        shown.append(run(cell, names))
        if names.get('PAPER') is PRESETS['cifar-10']: names['PAPER'] = names['PAPER'].change(LITTLE)
        for name in ('large batches', 'DINOv2, frozen'): names.get('RECIPES', {}).pop(name, None)
    found = names['rows']()
    assert [row['recipe'] for row in found] == ['the paper', 'MoCo', '64 heads']
    assert all(0 <= float(row[key]) <= 1 for row in found for key in ('acc', 'nmi', 'knn'))
    table = next(x for x in reversed(shown) if x is not None).data
    assert table.count('\n') == 4 and 'not run yet' not in table

@pytest.mark.parametrize('name', ['06_simclr', '07_moco', '09d_whole_network', '10_selflabel'])
def test_flagged_cells_spoil_no_name_of_the_lesson(name):
    "A global name of the module, as `train`, must stay what its functions call."
    path = NBS/f'{name}.ipynb'
    made = {n.id for c in flagged(path) for n in ast.walk(tree(c))
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert flagged(path) and not made & vars(import_module(f'scan_nb.{module(path)}')).keys()
    assert not [c for c in flagged(path) if c.outputs]
