"""Views on a GPU: the numbers of the lesson, programs that compile, and counts on pretending tensors.

The views as they were before, by the lesson's functions, fail where launches, copies and waits are counted
(`test_the_older_way_launches_copies_and_waits`)."""
import os
import subprocess
import sys
from dataclasses import fields
import pytest
import torch
from run_notebooks import ROOT
import test_placement
from scan_nb import augment as lesson, augment_fast as fast, views
from scan_nb.augment import to_float
from scan_nb.moco import MoCo, moco_step
from scan_nb.scan import _heads_step, _picker
from scan_nb.selflabel import EMA, _step
from scan_nb.simclr import simclr_step
from scan_nb.whole_network import Pairs, _scan_step
from test_augment import generator, images, plain
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

gpu = test_placement.gpu   # a fixture
KINDS = ['SimCLRAugment', 'WeakAugment', 'StrongAugment']
each_kind = pytest.mark.parametrize('kind', KINDS)
BOTH = dict(rotation=20, blur_p=.5, erase=2)   # what the lesson has, too
MOST = BOTH | dict(tint_p=.5, strip_p=.5, disc=True)

def python(*words, **env):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **env})

# ---- the programs

@pytest.mark.parametrize('interpreter', ['1', pytest.param('', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU'))], ids=['interpreter', 'gpu'])
def test_programs_give_what_the_lesson_gives(interpreter):
    words = '-m pytest -q -p no:cacheprovider tests/programs.py'.split()
    done = python(*words, TRITON_INTERPRET=interpreter)
    assert done.returncode == 0, done.stdout[-4000:]

POINTERS = {*('x out matrix bounds order factors shift hue_at gray sigma center side share tone detail '
              'ops amounts').split()}
NUMBERS = {'unit', 'fill', 'limit'}

@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('name', ['sample', 'jitter', 'blur', 'cover', 'strip', 'tint', 'operate'])
def test_programs_compile(name, capability, tmp_path, monkeypatch):
    "For an A100 and for an H100, in each variant; that takes no GPU."
    triton = pytest.importorskip('triton')
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    program = getattr(views, f'_{name}')
    flags = [n for n in program.arg_names if n.isupper() and n != 'BLOCK']
    kinds = ('*u8', '*fp32') if name in ('sample', 'strip') else ('*fp32',)
    for kind in kinds:
        for flag in (False, True)[:1 + len(flags)]:
            options = {'BLOCK': 1024, **dict.fromkeys(flags, flag)}
            types = {n: 'constexpr' if n in options else '*fp32' if n in POINTERS else
                     'fp32' if n in NUMBERS else 'i32' for n in program.arg_names}
            types |= {n: kind for n in ('x', 'out') if n in types and (n == 'x' or name == 'strip')}
            source = triton.compiler.ASTSource(fn=program, signature=types, constexprs=options)
            made = triton.compile(source, target=GPUTarget('cuda', capability, 32))
            assert len(made.asm['cubin']) > 1000 and made.metadata.shared < 48_000

# ---- counted on a GPU that isn't there

class Count(TorchDispatchMode):
    "Launches on tensors of a GPU, copies to it from the CPU, and what the CPU would wait for."
    WAITS = {'aten::nonzero', 'aten::item', 'aten::_local_scalar_dense', 'aten::masked_select', 'aten::equal',
             'aten::unique_dim', 'aten::_unique2', 'aten::bincount'}
    def __init__(self):
        super().__init__()
        self.launches, self.copies, self.waits = [], [], []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().partition('.')[0], kwargs or {}
        out = func(*args, **kwargs)
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        fake = {isinstance(v, FakeTensor) for v in [*given, *tree_leaves(out)] if isinstance(v, torch.Tensor)}
        a_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        masked = name.startswith('aten::index') and any(v.dtype == torch.bool for v in given)
        if True not in fake or func.namespace == 'prim' or a_view or 'empty' in name: return out
        if name in self.WAITS or masked: self.waits.append(name)
        if fake == {True}: self.launches.append(name)
        else:
            self.copies.append(name)
            if not kwargs.get('non_blocking', False): self.waits.append(name)
        return out

def counted(augment, channels=3, n=2):
    x = torch.zeros(12, channels, 32, 32, dtype=torch.uint8, device='cuda')
    views.has_kernels(x)   # compiles a program, once in a process
    with Count() as count: out = augment(x, generator(), n=n)
    assert out.device.type == 'cuda' and out.shape == (12*n, channels, augment.size, augment.size)
    return count

CASES = dict(simclr=(views.SimCLRAugment(32), 3), simclr_all=(views.SimCLRAugment(24, **MOST), 8),
             weak=(views.WeakAugment(24), 2), strong=(views.StrongAugment(32), 8),
             strong_disc=(views.StrongAugment(24, disc=True), 8), one_op=(views.StrongAugment(32, 1), 5))

@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('case', CASES)
def test_few_launches_one_copy_no_wait(gpu, case, channels):
    "The issue's limits are 40 launches for SimCLR and 150 for strong views, both sides together."
    augment, launches = CASES[case]
    count = counted(augment, channels)
    assert (len(count.launches), len(count.copies), count.waits) == (launches, 1, []), count.launches

@each_kind
def test_one_view_costs_no_more(gpu, kind):
    one, two = (counted(getattr(views, kind)(32), n=n) for n in (1, 2))
    assert len(two.launches) == len(one.launches) + 1 and len(one.copies) == len(two.copies) == 1

@pytest.mark.parametrize('kind, launches, copies', [('SimCLRAugment', 150, 25), ('StrongAugment', 500, 60)])
def test_the_older_way_launches_copies_and_waits(gpu, kind, launches, copies):
    "What is counted here was seen on a GPU: 109 waits in one call of the strong views."
    count = counted(getattr(lesson, kind)(32))
    assert len(count.launches) > launches and len(count.copies) == len(count.waits) > copies

def test_waits_are_counted(gpu):
    x, rows = torch.zeros(4, device='cuda'), torch.tensor([True, False, True, False])
    for wait in (lambda: rows.to(x.device), lambda: x[x > 0], lambda: x.sum().item(), lambda: x.nonzero()):
        with Count() as count:
            try: wait()
            except Exception as e: assert 'Data' in type(e).__name__ or 'Dynamic' in type(e).__name__   # noqa: PT017
            else: assert count.waits

def test_settings_arrive_as_they_are(gpu):
    p = dict(rows=torch.arange(4), settings=lesson.SimCLRAugment(8).draw(images(), generator()))
    there = views.send_all(p, torch.device('cuda'))
    for a, b in ((p, there), (p['settings'], there['settings'])):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                test_placement.there(b[name], *value.shape, dtype=value.dtype)
    assert views.send_all(there, torch.device('cuda')) is there
    assert views.send_all(p, torch.device('cpu')) is p

def steps(kind, held='cuda'):
    "The step of a stage on images that lie in the memory of the GPU or of the CPU, and its indices."
    x, simclr, strong = test_placement.images().to(held), views.SimCLRAugment(32), views.StrongAugment(32)
    near, rows = torch.arange(24).view(12, 2) % 12, torch.arange(8)
    if kind == 'simclr': return simclr_step(test_placement.contrastive(), x, simclr, .5, generator()), rows
    if kind == 'moco':
        state = MoCo(test_placement.contrastive(), test_placement.images(1), 24)
        return moco_step(state, x, simclr, .2, generator()), rows
    model = test_placement.clustering().train()
    if kind == 'scan':
        loss = dict(entropy_weight=5., prior=None)
        return _scan_step(model, x, Pairs(near), strong, loss, False, generator()), rows
    if not kind.startswith('heads'):
        weak = views.WeakAugment(32) if kind == 'selflabel, weak views' else None
        return _step(model, EMA(model, .9), x, strong, weak, generator(), 5., None, threshold=.9), rows
    z = torch.zeros(12, 16, device='cuda')
    pick = _picker(z, None, z.mean(0), z.std(0), None, 2 if 'two' in kind else 1)
    heads = test_placement.clustering(4).cluster_head
    return _heads_step(heads, pick, near.cuda(), 5., None, None, 'scan'), rows.cuda()

STEPS = ['simclr', 'moco', 'scan', 'selflabel', 'selflabel, weak views']

@pytest.mark.parametrize('kind, held', [*((k, h) for k in STEPS for h in ('cuda', 'cpu')), ('heads', 'cuda'),
                                        ('heads on two networks', 'cuda')])
def test_a_step_waits_for_nothing(gpu, kind, held):
    "All that it draws, and the images if the CPU holds them, come in one copy."
    views.has_kernels(torch.zeros(1, device='cuda'))
    step, rows = steps(kind, held)
    with Count() as count: losses = step(rows)
    assert losses['loss'].device.type == 'cuda' and losses['loss'].requires_grad
    assert (len(count.copies), count.waits) == (not kind.startswith('heads'), [])

# ---- several views in one call

@each_kind
@pytest.mark.parametrize('room', [lesson, views], ids=['lesson', 'views'])
@pytest.mark.parametrize('b, c', [(1, 3), (7, 1), (13, 3), (32, 5)])
def test_two_views_in_one_call_are_those_of_two_calls(kind, room, b, c):
    for switches in ({}, MOST if room is views else BOTH) if kind == 'SimCLRAugment' else ({},):
        augment, some, g, h = getattr(room, kind)(16, **switches), images(b, c), generator(b), generator(b)
        for x in (some, to_float(some)):
            twice = torch.cat([augment(x, g), augment(x, g)])
            assert torch.equal(augment(x, h, n=2), twice) and torch.equal(g.get_state(), h.get_state())
        assert torch.equal(augment(x, h, 3)[b:2*b], [augment(x, g) for _ in range(3)][1])

# ---- the three classes elsewhere

@each_kind
@pytest.mark.parametrize('c', [1, 2, 3, 7])
def test_views_are_those_of_the_lesson(kind, c):
    x = images(200, c, 24, 27)
    class_, own = getattr(views, kind), getattr(lesson, kind)
    cases = [(own, {}), (plain(kind), {})] + [(own, BOTH), (plain(kind), MOST)]*(kind == 'SimCLRAugment')
    for other, switches in cases:
        there, here = other(20, **switches), class_(20, **switches)
        drawn, settings = there.draw(x, generator(3)), here.draw(x, generator(3))
        assert settings.keys() - drawn.keys() <= {'strip', 'tone', 'detail'}
        for name, value in drawn.items(): assert torch.equal(value, settings[name]), name
        away = (there(x, generator(3)) - here(x, generator(3))).abs()
        assert (away > 1e-3).float().mean() < 2e-3 and away.mean() < 1e-4

@each_kind
def test_classes_differ_in_their_operations_alone(kind):
    there, here = (getattr(room, kind) for room in (lesson, views))
    assert issubclass(here, there) and here.__name__ == kind and not isinstance(there(8), here)
    known, more = ([(f.name, f.default) for f in fields(c)] for c in (there, here))
    assert more[:len(known)] == known
    assert {name for name, _ in more[len(known):]} <= {'tint_p', 'strip_p', 'disc'}
    own, base = {name for name in vars(here) if name[0] != '_'}, {n for c in there.__mro__ for n in vars(c)}
    assert own & {'warp', 'jitter', 'operate'} == {'warp', 'jitter', 'operate'} & base

@each_kind
def test_images_elsewhere_need_no_loop(kind, monkeypatch):
    def refuse(*args): raise AssertionError('a loop')
    monkeypatch.setattr(fast, 'in_threads', refuse)
    x, augment = images(4, 3, 9, 9), getattr(views, kind)(8)
    found = augment(x.to('meta'), generator())
    assert found.device.type == 'meta' and found.shape == (4, 3, 8, 8)
    with pytest.raises(AssertionError, match='a loop'): augment(x, generator())

def test_the_room_opens_without_triton():
    done = python('-c', 'import sys; sys.modules["triton"] = None; from scan_nb import views; import torch; '
                        'x = torch.zeros(2, 3, 9, 9, dtype=torch.uint8); '
                        'print(views.triton, *views.StrongAugment(8)(x, n=2).shape)')
    assert done.stdout.split() == ['None', '4', '3', '8', '8'], done.stderr

@each_kind
def test_a_gpu_for_which_triton_fails_gets_the_lesson(gpu, kind, monkeypatch):
    "A machine without a C compiler, say."
    def fails(*args): raise RuntimeError('no compiler')
    monkeypatch.setattr(views, 'cover_', fails)
    views._compiles.cache_clear()
    x = torch.zeros(4, 3, 9, 9, dtype=torch.uint8, device='cuda')
    with pytest.warns(UserWarning, match='without Triton, slowly: no compiler'): views.has_kernels(x)
    assert not views.has_kernels(x)
    assert getattr(views, kind)(8)(x, generator()).shape == (4, 3, 8, 8)
    views._compiles.cache_clear()
