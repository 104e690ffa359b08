"Work ahead of the GPU: order, errors and ends of the thread, one copy for a batch, views in two parts."
import copy, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scan_nb.ahead import Views, ahead, each, take
from scan_nb.distributed import train
from scan_nb.models import ContrastiveModel, small_resnet
from scan_nb.simclr import simclr_step
from scan_nb.training import Checkpoint, make_generator, seeded
from scan_nb.views import SimCLRAugment, StrongAugment, WeakAugment, pack, send_all, unpack

pytestmark = pytest.mark.usefixtures('one_thread')
REPO = Path(__file__).resolve().parents[1]

# -- the thread ----------------------------------------------------------------------------------------------

@given(st.lists(st.integers(), max_size=12), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_order_is_kept(items, depth):
    assert list(ahead(lambda x: 2*x, iter(items), depth)) == [2*x for x in items]

@pytest.mark.parametrize('depth', [1, 2, 5])
def test_no_further_ahead_than_asked(depth):
    begun = []
    results = ahead(begun.append, range(20), depth)
    for asked in range(1, 10):
        next(results)
        time.sleep(.01)
        assert begun == list(range(asked + depth))

def test_it_is_one_other_thread_and_it_ends():
    before = threading.active_count()
    seen = set(ahead(lambda _: threading.get_ident(), range(9)))
    assert len(seen) == 1 and threading.get_ident() not in seen and threading.active_count() == before
    begun = []
    results = ahead(lambda i: (begun.append(i), time.sleep(.02)), range(99))
    next(results)
    results.close()
    n = len(begun)
    time.sleep(.06)
    assert len(begun) == n <= 3 and threading.active_count() == before

@pytest.mark.parametrize('at', [0, 1, 4])
def test_an_error_comes_in_its_place(at):
    def f(i):
        if i == at: raise OSError(f'page {i}')
        return i
    results = ahead(f, range(9))
    assert [next(results) for _ in range(at)] == list(range(at))
    with pytest.raises(OSError, match=f'page {at}'): next(results)
    assert list(results) == []

# -- one copy ------------------------------------------------------------------------------------------------

TYPES = [torch.uint8, torch.bool, torch.int16, torch.int64, torch.float32, torch.float64]

SHAPES = st.lists(st.integers(0, 5), max_size=3)

@given(st.lists(st.tuples(st.sampled_from(TYPES), SHAPES), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_unpacked_is_what_was_packed(shapes, seed):
    g = make_generator(seed)
    given = [(4*torch.randn(shape, generator=g)).to(dtype) for dtype, shape in shapes]
    packed = pack(given)
    assert packed.dtype == torch.uint8 and len(packed) <= sum(x.nbytes + 7 for x in given)
    for a, b in zip(given, unpack(packed, given), strict=True):
        assert b.dtype == a.dtype and torch.equal(a, b)
        assert b.numel() == 0 or b.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()

def test_strided_tensors_are_packed_in_their_order():
    x = torch.arange(12.).view(3, 4).T
    assert torch.equal(*[next(unpack(pack([v]), [v])) for v in (x, x.contiguous())])

def test_on_a_cpu_nothing_is_copied():
    tree = dict(a=torch.ones(3), b=dict(c=torch.zeros(2)))
    assert send_all(tree, torch.device('cpu')) is tree

# -- views ---------------------------------------------------------------------------------------------------

IMAGES = torch.randint(256, (40, 3, 12, 12), generator=make_generator(0), dtype=torch.uint8)

AUGMENT = dict(simclr=SimCLRAugment(12, rotation=20., blur_p=.5, erase=3), weak=WeakAugment(9),
               strong=StrongAugment(12),
               function=lambda x, g: x.roll(torch.randint(9, (), generator=g).item(), 0))

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('kind', AUGMENT)
def test_views_are_those_of_the_augmentation(kind, n):
    augment, rows = AUGMENT[kind], torch.tensor([3, 3, 39, 0])
    a, b = make_generator(1), make_generator(1)
    views = Views(augment, IMAGES, torch.device('cpu'), n)
    found = views.render(views.draw(rows, a))
    assert torch.equal(found, torch.cat([augment(IMAGES[rows], b) for _ in range(n)]))
    assert torch.equal(a.get_state(), b.get_state())
    assert torch.equal(views.take(views.draw(rows, a)), IMAGES[rows])

def test_images_are_picked_where_they_lie():
    rows, there = torch.arange(3), torch.device('meta')
    assert take(IMAGES, rows, there).device == there and torch.equal(take(IMAGES, rows), IMAGES[:3])

# -- a training whose batches a thread prepares --------------------------------------------------------------

@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "`each` prepares ahead, although all is on the CPU."
    def each_ahead(step, batches):
        for batch in ahead(step.ready, batches): yield step.compute(batch)
    monkeypatch.setattr('scan_nb.distributed.each', each_ahead)

def fit(images, epochs=3, checkpoint=None, monitor=None):
    with seeded(0): model = ContrastiveModel(small_resnet(3, (4, 8)))
    g, optimizer = make_generator(0), torch.optim.SGD(model.parameters(), .05, .9)
    step = simclr_step(model, images, SimCLRAugment(12), .5, g)
    history = train(step, len(images), optimizer, epochs=epochs, batch_size=8, generator=g, modules=[model],
                    checkpoint=checkpoint, monitor=monitor)
    return history, model.state_dict(), g.get_state()

def mapped(tmp_path):
    np.save(tmp_path/'images.npy', IMAGES.numpy())
    return torch.from_numpy(np.load(tmp_path/'images.npy', mmap_mode='c'))

def equal(a, b):
    assert a[0] == b[0] and torch.equal(a[2], b[2])
    for x, y in zip(a[1].values(), b[1].values(), strict=True): assert torch.equal(x, y)

def test_the_same_weights_and_the_same_random_numbers(as_on_a_gpu, tmp_path, monkeypatch):
    found = fit(mapped(tmp_path))
    monkeypatch.undo()
    equal(found, fit(IMAGES))

def test_an_error_of_the_reader_ends_the_run_which_then_goes_on(as_on_a_gpu, tmp_path):
    class Torn:
        "A file whose disk fails in the second epoch."
        shape, device, reads = IMAGES.shape, IMAGES.device, 0
        def __len__(self): return len(IMAGES)
        def __getitem__(self, rows):
            self.reads += 1
            if self.reads == 8: raise OSError('read error')
            return IMAGES[rows]
    checkpoint = Checkpoint(tmp_path/'run.pt')
    with pytest.raises(OSError, match='read error'): fit(Torn(), checkpoint=checkpoint)
    assert len(checkpoint.load()['history']) == 1
    equal(fit(IMAGES, checkpoint=checkpoint), fit(IMAGES))

CHILD = '''
import sys; sys.path[:0] = [{tests!r}]
import test_ahead, torch
from pathlib import Path
torch.set_num_threads(1)
def each_ahead(step, batches):
    for batch in test_ahead.ahead(step.ready, batches): yield step.compute(batch)
test_ahead.train.__globals__['each'] = each_ahead
folder = Path({folder!r})
found = test_ahead.fit(test_ahead.mapped(folder), 40, test_ahead.Checkpoint(folder/'run.pt'),
                       lambda epoch: print(epoch, flush=True))
'''

def test_killed_while_the_thread_reads(tmp_path):
    code = CHILD.format(tests=str(REPO/'tests'), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, 'PYTHONPATH': str(REPO)})
    for line in child.stdout:
        if line.strip() == '3': break
    time.sleep(random.random()*.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    checkpoint = Checkpoint(tmp_path/'run.pt')
    done = len(checkpoint.load()['history'])
    assert 2 <= done < 40
    equal(fit(IMAGES, done + 2, checkpoint), fit(IMAGES, done + 2))

def test_plain_steps_get_indices():
    assert list(each(lambda i: i.tolist(), torch.arange(6).split(4))) == [[0, 1, 2, 3], [4, 5]]

# -- a batch that teaches nothing ----------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [True, False])
def test_a_skipped_batch_leaves_weights_and_momentum(fused):
    "Whether the optimizer skips by itself, as on a GPU, or the CPU looks."
    def run(skipped):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([p], lr=.1, weight_decay=.1, fused=fused)
        def step(i):
            losses = dict(loss=(p*(i.item() + 1)).square().sum())
            if skipped is None: return losses
            return losses | dict(skipped=torch.tensor(float(i.item() in skipped)))
        rows = train(step, 8, optimizer, epochs=2, batch_size=1, generator=make_generator(0))
        return p.detach().clone(), copy.deepcopy(optimizer.state[p]), rows
    p, state, rows = run({1, 4, 6})
    assert [r['skipped'] for r in rows] == [3, 3] and state['step'] == 10
    everything = run(set())
    assert all('skipped' not in r for r in everything[2]) and everything[1]['step'] == 16
    for a, b in zip(everything[:2], run(None)[:2]):
        assert torch.equal(a, b) if torch.is_tensor(a) else all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(p, everything[0]) and rows[0]['loss'] != everything[2][0]['loss']
    assert not run(set(range(8)))[0].ne(1).any()
