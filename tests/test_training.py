"The loop, its schedule and its checkpoint: closed forms, bit-equal resume, kills, damage, wrong input."
import io, math, os, random, signal, sys, time
from contextlib import redirect_stderr
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from shell import forked, server
from torch import nn
from torch.nn import functional as F
from scan_nb import training
from scan_nb.data import UserError
from scan_nb.models import small_resnet
from scan_nb.training import (Checkpoint, CosineSchedule, StepSchedule, autocast, check_plain, cosine_factor,
                              make_generator, pick_device, seed_everything, seeded, steps_per_epoch, tune)

batches, train = training.batches, training.train   # of one process; test_distributed.py compares the others

pytestmark = pytest.mark.usefixtures('one_thread')

def sgd(lr=.1, n=1): return torch.optim.SGD([nn.Parameter(torch.zeros(2)) for _ in range(n)], lr=lr)

# -- devices --

@pytest.fixture
def machine(monkeypatch):
    def fake(gpus=0, mps=False):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: bool(mps))
    return fake

@pytest.mark.parametrize('gpus,mps,best', [(0, 0, 'cpu'), (2, 0, 'cuda'), (0, 1, 'mps'), (1, 1, 'cuda')])
def test_best_device(machine, gpus, mps, best):
    machine(gpus, mps)
    for name in (None, 'auto'): assert pick_device(name) == torch.device(best)
    assert pick_device('cpu') == torch.device('cpu')
    assert pick_device(torch.device(best)) == torch.device(best)

def test_numbered_devices(machine):
    machine(gpus=2)
    assert pick_device('cuda:1') == torch.device('cuda:1') and pick_device('cuda') == torch.device('cuda')
    assert pick_device('cpu:0') == torch.device('cpu:0')
    with pytest.raises(UserError, match="'cuda:2' is not available: choose from cuda:0, cuda:1, cpu."):
        pick_device('cuda:2')

@pytest.mark.parametrize('name', ['cuda', 'cuda:0', 'mps', 'meta', 'cpu:1'])
def test_absent_device(machine, name):
    machine()
    with pytest.raises(UserError, match='not available: choose from cpu.$'): pick_device(name)

@pytest.mark.parametrize('name', ['gpu', '', 'cuda:x', 'CPU', 3.5])
def test_device_that_does_not_exist(machine, name):
    machine()
    with pytest.raises(UserError) as e: pick_device(name)
    assert '\n' not in str(e.value) and repr(name) in str(e.value) and 'choose from cpu.' in str(e.value)

def test_a_cpu_computes_in_float32_as_written_whatever_is_asked_for():
    "Precision and compile are for CUDA: the same bits, and a network that is not compiled."
    def fit(**how):
        with seeded(0): model = small_resnet(widths=(4, 8))
        tune(model, **how)
        optimizer = torch.optim.SGD(model.parameters(), .1)
        x = torch.rand(8, 1, 8, 8, generator=make_generator(0))
        def step(i):
            with autocast('cpu', model): return dict(loss=model(x[i]).square().mean())
        return model, train(step, 8, optimizer, epochs=2, batch_size=4, generator=make_generator(0),
                            modules=[model])
    plain, history = fit()
    for how in (dict(precision='float32'), dict(precision='bf16', compile=True)):
        other, again = fit(**how)
        assert again == history and other._compiled_call_impl is None and other.precision == how['precision']
        states = zip(plain.state_dict().values(), other.state_dict().values())
        assert all(torch.equal(a, b) for a, b in states)

@pytest.mark.parametrize('precision', ['fp16', None, 16])
def test_precision_that_does_not_exist(precision):
    with pytest.raises(UserError, match="give 'bf16' or 'float32'"): tune(nn.Linear(1, 1), precision)

def test_autocast():
    with autocast('cpu'): assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

# -- random numbers --

def test_generators():
    a, b = make_generator(7), make_generator(np.int64(7))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(9, generator=a), torch.rand(9, generator=b))
    assert torch.equal(torch.get_rng_state(), state)
    c, d = make_generator(1), make_generator(2)
    assert not torch.equal(torch.rand(9, generator=c), torch.rand(9, generator=d))

@pytest.mark.parametrize('seed', [-1, 2**63, 1.0, '1', None, True])
def test_bad_seeds(seed):
    with pytest.raises(UserError, match='seed must be an integer'): make_generator(seed)

def test_seed_everything():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    seed_everything(5); a = draw()
    seed_everything(5); assert draw() == a
    seed_everything(6); assert draw() != a

def test_seeded_leaves_the_global_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    first = torch.rand(2)
    with seeded(9): a = nn.Linear(3, 3).weight
    with pytest.raises(KeyError):
        with seeded(9): raise KeyError
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    torch.manual_seed(2)
    with seeded(9): b = nn.Linear(3, 3).weight
    with seeded(10): c = nn.Linear(3, 3).weight
    assert torch.equal(a, b) and not torch.equal(a, c)

# -- schedule --

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(1e-4, 10))
def test_schedule_against_the_closed_form(steps, part, final, lr):
    warmup = int(part * steps)
    opt = sgd(lr)
    schedule = CosineSchedule(opt, steps, warmup, final)
    for t in range(steps + 3):
        if t < warmup: expected = lr * (t + 1) / warmup
        else:
            angle = math.pi * min(1, (t - warmup) / max(steps - warmup, 1))
            expected = lr * final + (lr - lr * final) * math.cos(angle / 2)**2    # cos² of half the angle
        assert math.isclose(opt.param_groups[0]['lr'], expected, rel_tol=1e-9, abs_tol=1e-12)
        schedule.step()

def test_schedule_against_torch():
    opt, ref_opt = sgd(.4), sgd(.4)
    ours, ref = CosineSchedule(opt, 50), torch.optim.lr_scheduler.CosineAnnealingLR(ref_opt, 50)
    for _ in range(50):
        assert math.isclose(opt.param_groups[0]['lr'], ref_opt.param_groups[0]['lr'], rel_tol=1e-9)
        ref_opt.step(); ref.step(); ours.step()
    assert opt.param_groups[0]['lr'] == 0.

def test_schedule_scales_every_group():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = torch.optim.SGD([dict(params=[p], lr=1.), dict(params=[q], lr=.1)])
    schedule = CosineSchedule(opt, 10, warmup=2)
    for t in range(10):
        assert [g['lr'] for g in opt.param_groups] == [cosine_factor(t, 10, 2), .1 * cosine_factor(t, 10, 2)]
        schedule.step()

def test_schedule_is_continuous_and_monotone():
    values = [cosine_factor(t, 100, 10, .1) for t in range(101)]
    assert values[:10] == sorted(values[:10]) and values[9] == values[10] == 1.
    assert values[10:] == sorted(values[10:], reverse=True) and math.isclose(values[-1], .1)

def test_schedule_state_round_trip():
    opt = sgd(.3)
    a = CosineSchedule(opt, 20, 5, .01)
    for _ in range(8): a.step()
    other = sgd(99.)
    b = CosineSchedule(other, 20, 5, .01)
    b.load_state_dict(a.state_dict())
    for _ in range(12):
        assert other.param_groups[0]['lr'] == opt.param_groups[0]['lr']
        a.step(); b.step()

def test_schedule_refuses_another_plan():
    state = CosineSchedule(sgd(), 20).state_dict()
    other = CosineSchedule(sgd(), 30)
    with pytest.raises(UserError, match="'steps': 20.*now .*'steps': 30"): other.load_state_dict(state)

@pytest.mark.parametrize('kw', [dict(steps=0), dict(warmup=6), dict(warmup=-1), dict(final=-.1),
                                dict(final=1.1), dict(final=math.nan)])
def test_schedule_refuses(kw):
    with pytest.raises(UserError, match='Schedule: steps ≥ 1'): CosineSchedule(sgd(), **{'steps': 5, **kw})

@given(st.lists(st.integers(0, 20), max_size=4), st.floats(0, 1), st.integers(0, 6))
def test_steps_against_the_definition(at, rate, warmup):
    opt = sgd(.4)
    schedule = StepSchedule(opt, at, rate, warmup)
    for t in range(24):
        expected = .4*(1 if t >= warmup else (t + 1)/warmup)
        for n in at:
            if n <= t: expected *= rate
        assert math.isclose(opt.param_groups[0]['lr'], expected, rel_tol=1e-9, abs_tol=1e-12)
        schedule.step()

def test_steps_against_torch():
    opt, ref_opt = sgd(.4), sgd(.4)
    ours, ref = StepSchedule(opt, [3, 7]), torch.optim.lr_scheduler.MultiStepLR(ref_opt, [3, 7])
    for _ in range(10):
        assert math.isclose(opt.param_groups[0]['lr'], ref_opt.param_groups[0]['lr'], rel_tol=1e-9)
        ref_opt.step(); ref.step(); ours.step()

def test_steps_state(tmp_path):
    opt, other = sgd(.4), sgd(9.)
    a, b = StepSchedule(opt, (4, 8), .5), StepSchedule(other, [4, 8], .5)
    for _ in range(5): a.step()
    saved = Checkpoint(tmp_path/'c.pt')
    saved.save(schedule=a.state_dict())
    b.load_state_dict(saved.load()['schedule'])
    for _ in range(5):
        assert other.param_groups[0]['lr'] == opt.param_groups[0]['lr']
        a.step(); b.step()
    for plan in (StepSchedule(sgd(), [4, 9], .5), CosineSchedule(sgd(), 10)):
        with pytest.raises(UserError, match='the plan was'): plan.load_state_dict(a.state_dict())

@pytest.mark.parametrize('kw', [dict(at=[-1]), dict(rate=1.5), dict(rate=-.1), dict(rate=math.nan),
                                dict(warmup=-1)])
def test_steps_refuse(kw):
    with pytest.raises(UserError, match='Schedule: at ≥ 0'): StepSchedule(sgd(), **{'at': [5], **kw})

# -- checkpoint --

STATE = dict(a=torch.arange(5.), b=dict(c=[1, 2.5, None, 'x', True], d=(1, 2)), e={3: 'z'})

def test_checkpoint_round_trip(tmp_path):
    c = Checkpoint(tmp_path/'new'/'c.pt')
    assert c.load() is None
    c.save(**STATE)
    back = c.load()
    assert torch.equal(back.pop('a'), STATE['a']) and back == {k: v for k, v in STATE.items() if k != 'a'}
    assert os.listdir(tmp_path/'new') == ['c.pt']

@pytest.mark.parametrize('bad,where', [
    (dict(loss=np.float64(1)), r"state\['loss'\] is a numpy.float64"),
    (dict(history=[dict(acc=np.float32(1))]), r"state\['history'\]\[0\]\['acc'\] is a numpy.float32"),
    (dict(head=np.int64(3)), 'numpy.int64'), (dict(x=np.zeros(2)), 'numpy.ndarray'),
    (dict(model=nn.Linear(1, 1)), 'Linear'), (dict(path=Path('x')), 'pathlib'),
    (dict(d={np.int64(1): 2}), 'a key of'),
    (dict(f=len), 'builtin'), (dict(s={1, 2}), 'builtins.set'), (dict(b=b'x'), 'bytes')])
def test_checkpoint_takes_only_plain_values(tmp_path, bad, where):
    c = Checkpoint(tmp_path/'c.pt')
    c.save(**STATE)
    with pytest.raises(TypeError, match=where): c.save(**bad)
    assert torch.equal(c.load()['a'], STATE['a'])

@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3)))
def test_what_passes_the_check_loads(value):
    check_plain(value)
    file = io.BytesIO()
    torch.save(dict(v=value), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)['v'] == value

def test_optimizer_states_are_plain():
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        net = nn.Linear(2, 2)
        opt = make(net.parameters(), lr=.1)
        net(torch.rand(3, 2)).sum().backward()
        opt.step()
        check_plain(opt.state_dict())

def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path/'c.pt'
    Checkpoint(path).save(w=torch.arange(100.), history=[dict(epoch=1, loss=.5)])
    whole = path.read_bytes()
    for n in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(UserError, match="c.pt' is damaged, or .*: delete it"): Checkpoint(path).load()
        assert path.stat().st_size == n                              # and left for the user to look at

@pytest.mark.parametrize('content', [b'', b'\0'*4096, b'not a checkpoint', bytes(range(256))*20,
                                     b'\x80\x04N.', b'PK\x03\x04'])
def test_garbage_is_noticed(tmp_path, content):
    path = tmp_path/'c.pt'
    path.write_bytes(content)
    with pytest.raises(UserError) as e: Checkpoint(path).load()
    assert str(path) in str(e.value) and '\n' not in str(e.value)

def test_flipped_bytes_in_a_tensor_are_noticed(tmp_path):
    path = tmp_path/'c.pt'
    Checkpoint(path).save(w=torch.full((1000,), 3.))
    data = bytearray(path.read_bytes())
    at = bytes(data).find(torch.full((20,), 3.).numpy().tobytes())
    data[at+40] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError): Checkpoint(path).load()

def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    torch.save(dict(x=Evil()), tmp_path/'c.pt')
    with pytest.raises(UserError): Checkpoint(tmp_path/'c.pt').load()
    assert not (tmp_path/'owned').exists()

def test_other_file_than_a_dict(tmp_path):
    torch.save([1, 2], tmp_path/'c.pt')
    with pytest.raises(UserError, match='or is no checkpoint'): Checkpoint(tmp_path/'c.pt').load()

def test_unreadable_path_is_an_os_error(tmp_path):
    with pytest.raises(OSError): Checkpoint(tmp_path).load()

@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_failed_write_keeps_the_old_file_and_no_litter(tmp_path, monkeypatch, error):
    c = Checkpoint(tmp_path/'c.pt')
    c.save(**STATE)
    def half(state, file):
        file.write(b'half')
        raise error
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(type(error)): c.save(value=2)
    assert torch.equal(c.load()['a'], STATE['a']) and os.listdir(tmp_path) == ['c.pt']

def test_write_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (calls.append('sync'), real_sync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (calls.append('rename'), real_replace(a, b)))
    Checkpoint(tmp_path/'c.pt').save(value=1)
    assert calls[:2] == ['sync', 'rename']

def test_neighboring_files_are_left_alone(tmp_path):
    others = ['d.pt', '.c[1].pt.bak', 'xc[1].pt', '.c1.pt.' + 8*'0a1b']
    for name in others: (tmp_path/name).touch()
    c = Checkpoint(tmp_path/'c[1].pt')
    (tmp_path/('.c[1].pt.' + 8*'0a1b')).touch()                         # of a killed program
    c.save(value=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, 'c[1].pt'])

def save_slowly(path, said):
    Checkpoint(path).save(value=1, w=torch.ones(1000))
    real = torch.save
    def slow(state, file):
        real(state, file)
        file.flush()
        said.send('writing')
        time.sleep(60)
    torch.save = slow
    Checkpoint(path).save(value=2, w=torch.ones(1000))

def pipe(): return server.Pipe(duplex=False)

def test_sigkill_in_the_middle_of_a_save(tmp_path):
    heard, said = pipe()
    p = forked(save_slowly, tmp_path/'c.pt', said)
    assert heard.poll(100) and heard.recv() == 'writing'
    p.kill()
    p.join()
    assert len(os.listdir(tmp_path)) == 2
    c = Checkpoint(tmp_path/'c.pt')
    assert c.load()['value'] == 1
    c.save(value=3)                                                  # the left-over is no obstacle
    assert c.load() == dict(value=3) and os.listdir(tmp_path) == ['c.pt']

def save_on_and_on(path, said):
    c = Checkpoint(path)
    for i in range(1, 10**6):
        c.save(i=i, w=torch.full((200_000,), float(i)))
        said.send(i)

def test_sigkill_at_random_moments(tmp_path):
    path, (heard, said), last = tmp_path/'c.pt', pipe(), 1
    p = forked(save_on_and_on, path, said)
    assert heard.poll(100)
    time.sleep(.37)
    p.kill()
    p.join()
    while heard.poll(): last = heard.recv()
    state = Checkpoint(path).load()
    assert state['i'] >= last and (state['w'] == state['i']).all()

# -- batches --

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_batches(n, batch_size):
    out = batches(n, batch_size, make_generator(0))
    flat = torch.cat(out)
    assert len(out) == steps_per_epoch(n, batch_size) == max(1, n // batch_size)
    assert {len(b) for b in out} == {min(n, batch_size)}
    assert len(flat.unique()) == len(flat) and 0 <= flat.min() and flat.max() < n
    assert flat.dtype == torch.int64
    if n % batch_size == 0 or n < batch_size: assert len(flat) == n

def test_order_changes_from_epoch_to_epoch_but_not_from_run_to_run():
    g, h = make_generator(0), make_generator(0)
    first, second = torch.cat(batches(40, 8, g)), torch.cat(batches(40, 8, g))
    assert not torch.equal(first, second) and torch.equal(first, torch.cat(batches(40, 8, h)))

@pytest.mark.parametrize('n,b', [(0, 4), (4, 0), (-1, 4), (4, -2)])
def test_batches_refuse(n, b):
    with pytest.raises(UserError, match='must be ≥ 1'): steps_per_epoch(n, b)
    with pytest.raises(UserError, match='must be ≥ 1'): batches(n, b, make_generator(0))

# -- the loop --

X = torch.randn(37, 1, 8, 8, generator=make_generator(1))
Y = torch.randint(0, 3, (37,), generator=make_generator(2))

def setup(optimizer='adam', schedule=True, epochs=6, batch_size=8, seed=0, net=None):
    "A small convolutional net with batch norm, its optimizer, schedule and a step that draws noise."
    if net is None:
        with seeded(seed): net = nn.Sequential(small_resnet(widths=(4, 8)), nn.Linear(8, 3))
    make = dict(adam=lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-4),
                sgd=lambda p: torch.optim.SGD(p, lr=.1, momentum=.9, weight_decay=1e-4))[optimizer]
    opt = make(net.parameters())
    sched = CosineSchedule(opt, epochs * steps_per_epoch(37, batch_size), warmup=3) if schedule else None
    g = make_generator(seed)
    def step(i):
        logits = net(X[i] + .1 * torch.randn(X[i].shape, generator=g))
        return dict(loss=F.cross_entropy(logits, Y[i]), acc=(logits.argmax(1) == Y[i]).float().mean())
    usual = dict(epochs=epochs, batch_size=batch_size, generator=g, schedule=sched, modules=[net])
    def run(n=37, **kw): return train(step, n, opt, **{**usual, **kw})
    return net, opt, run

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

def test_history():
    net, opt, run = setup()
    history = run(monitor=lambda epoch: dict(twice=2*epoch, t=torch.tensor(.5), a=np.float64(.25)))
    assert [r['epoch'] for r in history] == [1, 2, 3, 4, 5, 6]
    assert list(history[0]) == ['epoch', 'lr', 'loss', 'acc', 'twice', 't', 'a']
    assert all(type(v) in (int, float) for r in history for v in r.values())
    assert [r['twice'] for r in history] == [2, 4, 6, 8, 10, 12] and history[0]['t'] == .5
    assert [r['lr'] for r in history] == [1e-2 * cosine_factor(4*e, 24, 3) for e in range(6)]
    assert history[-1]['loss'] < history[0]['loss']

def test_means_are_those_of_the_batches():
    p = nn.Parameter(torch.zeros(1))
    seen = []
    def step(i):
        seen.append(i.float().mean().item())
        return dict(loss=(p * 0).sum() + i.float().mean(), n=len(i), one=1.5)
    row, = train(step, 10, torch.optim.SGD([p], lr=.1), epochs=1, batch_size=3, generator=make_generator(0))
    assert len(seen) == 3 and math.isclose(row['loss'], sum(seen)/3, rel_tol=1e-6)
    assert row['n'] == 3 and row['one'] == 1.5

def test_the_loop_is_the_textbook_loop():
    net, opt, run = setup(schedule=False, optimizer='sgd')
    ref, ref_opt, _ = setup(schedule=False, optimizer='sgd')
    run(epochs=2)
    g = make_generator(0)
    for _ in range(2):
        for i in torch.randperm(37, generator=g)[:32].split(8):
            loss = F.cross_entropy(ref(X[i] + .1 * torch.randn(X[i].shape, generator=g)), Y[i])
            ref_opt.zero_grad(); loss.backward(); ref_opt.step()
    assert same(net, ref)

@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
@pytest.mark.parametrize('schedule', [True, False])
@pytest.mark.parametrize('stop', [1, 3, 5])
def test_resume_is_bit_equal(tmp_path, optimizer, schedule, stop):
    straight, _, run = setup(optimizer, schedule)
    history = run()
    class Killed(BaseException): pass
    net, _, run = setup(optimizer, schedule)
    seen = []
    def killer(epoch):
        if epoch == stop + 1: raise Killed                           # the updates of this epoch are lost
        return {}
    with pytest.raises(Killed): run(checkpoint=Checkpoint(tmp_path/'c.pt'), monitor=killer)
    with seeded(99): other = nn.Sequential(small_resnet(widths=(4, 8)), nn.Linear(8, 3))
    net, opt, run = setup(optimizer, schedule, net=other)            # all must come from the file
    resumed = run(checkpoint=Checkpoint(tmp_path/'c.pt'), monitor=lambda e: seen.append(e))
    assert seen == list(range(stop + 1, 7))
    assert resumed == history and same(net, straight)

def train_until(path, last, said):
    torch.set_num_threads(1)                                         # sums in another order: other bits
    def tell(epoch):
        said.send(epoch)
        if epoch == last: os.kill(os.getpid(), signal.SIGKILL)
    setup()[2](checkpoint=Checkpoint(path), monitor=tell)

def test_resume_after_sigkill(tmp_path):
    heard, said = pipe()
    p = forked(train_until, tmp_path/'c.pt', 4, said)
    p.join()
    told = []
    while heard.poll(): told.append(heard.recv())
    assert p.exitcode == -signal.SIGKILL and told == [1, 2, 3, 4]
    straight, _, run = setup()
    history = run()
    net, _, run = setup(net=None)
    assert run(checkpoint=Checkpoint(tmp_path/'c.pt')) == history and same(net, straight)

def test_same_seed_same_run():
    (a, _, run_a), (b, _, run_b) = setup(seed=3), setup(seed=3)
    assert run_a() == run_b() and same(a, b)

def test_global_random_state_is_untouched():
    net, _, run = setup()
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run(epochs=1, schedule=None)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()

def test_finished_run_is_not_repeated(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    net, _, run = setup()
    history = run(checkpoint=c)
    other, _, run = setup(seed=5)
    def fail(epoch): raise AssertionError
    assert run(checkpoint=c, monitor=fail) == history and same(net, other)

def test_more_epochs_than_before(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    straight, _, run = setup(schedule=False)
    history = run(epochs=4)
    net, _, run = setup(schedule=False)
    run(epochs=2, checkpoint=c)
    net, _, run = setup(schedule=False)
    assert run(epochs=4, checkpoint=c) == history and same(net, straight)

def test_zero_epochs():
    net, _, run = setup()
    before = [p.clone() for p in net.parameters()]
    assert run(epochs=0) == [] and all(torch.equal(p, q) for p, q in zip(before, net.parameters()))

def test_two_modules_are_both_restored(tmp_path):
    def make():
        with seeded(0): net, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
        teacher.load_state_dict(net.state_dict())
        g = make_generator(0)
        def step(i):
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), net.parameters()): p.lerp_(q, .1)
            x = torch.randn(len(i), 2, generator=g)
            return dict(loss=(net(x) - teacher(x) - 1).square().mean())
        opt = torch.optim.Adam(net.parameters(), lr=.1)
        return net, teacher, lambda e, c=None: train(step, 8, opt, epochs=e, batch_size=4, generator=g,
                                                     modules=(net, teacher), checkpoint=c)
    net, teacher, run = make()
    history = run(5)
    c = Checkpoint(tmp_path/'c.pt')
    make()[2](2, c)
    net2, teacher2, run = make()
    assert run(5, c) == history and same(net, net2) and same(teacher, teacher2)

# -- what is refused --

def one_line(e): return '\n' not in str(e.value) and 'delete it' in str(e.value)

def test_truncated_checkpoint_stops_the_run(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    setup()[2](epochs=1, schedule=None, checkpoint=c)
    c.path.write_bytes(c.path.read_bytes()[:-500])
    before = c.path.read_bytes()
    with pytest.raises(UserError, match="c.pt' is damaged") as e: setup()[2](checkpoint=c)
    assert one_line(e) and c.path.read_bytes() == before

@pytest.mark.parametrize('change,words', [
    (dict(n=36), "'n': 37"), (dict(batch_size=9), "'batch_size': 8"), (dict(modules=[]), 'to another run'),
    (dict(modules=[nn.Linear(8, 3)]), 'to another run'), (dict(schedule=None), 'to another run'),
    (dict(epochs=1), 'holds 2 epochs, but only 1 are asked for')])
def test_foreign_checkpoint(tmp_path, change, words):
    c = Checkpoint(tmp_path/'c.pt')
    net, _, run = setup(epochs=2)
    run(checkpoint=c)
    before = c.path.read_bytes()
    net, _, run = setup(epochs=2)
    with pytest.raises(UserError, match=words) as e: run(**{**dict(checkpoint=c), **change})
    assert one_line(e) and c.path.read_bytes() == before

def test_changed_schedule(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    setup(epochs=2)[2](checkpoint=c)
    with pytest.raises(UserError, match="'steps': 8.*'steps': 12"): setup(epochs=3)[2](checkpoint=c)

def test_a_dict_of_something_else(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    c.save(model=torch.zeros(2))
    with pytest.raises(UserError, match='belongs to another run'): setup()[2](checkpoint=c)

@pytest.mark.parametrize('n,batch_size', [(0, 8), (8, 0)])
def test_nothing_to_train_on(n, batch_size):
    net, _, run = setup()
    with pytest.raises(UserError, match='must be ≥ 1'): run(n=n, batch_size=batch_size)

@pytest.mark.parametrize('n', [1, 2, 7])
def test_data_smaller_than_a_batch_still_trains(n):
    p = nn.Parameter(torch.zeros(1))
    sizes = []
    def step(i):
        sizes.append(len(i))
        return dict(loss=(p - 1).square().sum())
    opt = torch.optim.SGD([p], lr=.1)
    history = train(step, n, opt, epochs=3, batch_size=1000, generator=make_generator(0))
    assert sizes == [n]*3 and p.item() > .4 and len(history) == 3

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('when', [0, 3, 7])
def test_non_finite_loss(tmp_path, value, when):
    p = nn.Parameter(torch.zeros(1))
    t = [0]
    def step(i):
        t[0] += 1                                                    # never in the first epoch
        return dict(loss=(p - 1).square().sum() * (value if t[0] == when + 5 else 1.))
    c = Checkpoint(tmp_path/'c.pt')
    with pytest.raises(FloatingPointError, match=f'became (nan|{value}) in epoch {2 + when//4}') as e:
        train(step, 16, torch.optim.SGD([p], lr=.1), epochs=4, batch_size=4, generator=make_generator(0),
              modules=[nn.Linear(1, 1)], checkpoint=c)
    assert '\n' not in str(e.value) and len(c.load()['history']) == 1 + when//4  # the last good epoch is kept

def test_the_bar_notices_a_bad_loss_at_once():
    p, calls = nn.Parameter(torch.zeros(1)), []
    def step(i):
        calls.append(i)
        return dict(loss=p.sum() * math.nan)
    with pytest.raises(FloatingPointError):
        train(step, 100, torch.optim.SGD([p], lr=.1), epochs=1, batch_size=1, generator=make_generator(0))
    assert len(calls) == 1

def test_a_step_without_loss_is_an_error():
    with pytest.raises(KeyError): train(lambda i: dict(acc=torch.ones(())), 4, sgd(), epochs=1, batch_size=2,
                                        generator=make_generator(0))

# -- skipped batches, modes, progress --

def test_skipped_batches_change_nothing_and_are_counted():
    p = nn.Parameter(torch.ones(1))
    opt = torch.optim.Adam([p], lr=.1, weight_decay=.1)
    schedule = CosineSchedule(opt, 8)
    t = [0]
    def step(i):
        t[0] += 1
        return dict(loss=p.square().sum()) if t[0] in (2, 3) else None
    history = train(step, 8, opt, epochs=2, batch_size=2, generator=make_generator(0), schedule=schedule)
    assert [r['skipped'] for r in history] == [2, 4] and 'loss' in history[0] and 'loss' not in history[1]
    assert schedule.t == 8 and opt.state[p]['step'] == 2

def test_monitor_runs_in_eval_mode_and_modes_come_back():
    net, _, run = setup()
    net.train()
    net[0].bn1.eval()
    before = [m.training for m in net.modules()]
    def monitor(epoch):
        assert not any(m.training for m in net.modules())
        net.train()
    run(epochs=1, schedule=None, monitor=monitor)
    assert [m.training for m in net.modules()] == before

def test_modules_may_be_anything_with_a_state(tmp_path):
    class Counter:
        n = 0
        def state_dict(self): return dict(n=self.n)
        def load_state_dict(self, state): self.n = state['n']
    def go(epochs):
        counter, p = Counter(), nn.Parameter(torch.zeros(1))
        def step(i):
            counter.n += 1
            return dict(loss=p.sum())
        train(step, 4, torch.optim.SGD([p], lr=.1), epochs=epochs, batch_size=2, generator=make_generator(0),
              modules=[counter], monitor=lambda e: {}, checkpoint=Checkpoint(tmp_path/'c.pt'))
        return counter.n
    assert go(2) == 4 and go(5) == 10

def test_progress_bar(tmp_path):
    net, _, run = setup()
    err = io.StringIO()
    with redirect_stderr(err): run(progress='pretext', monitor=lambda e: dict(knn=.5))
    text = err.getvalue()
    assert text.count('\n') == 1
    for part in ('pretext: 100%', '24/24', 'loss=', 'knn=0.5'): assert part in text

def test_progress_bar_ends_its_line_on_an_error():
    def fail(epoch): raise KeyboardInterrupt
    err = io.StringIO()
    with redirect_stderr(err):
        try: setup()[2](progress='p', monitor=fail)
        except KeyboardInterrupt: print('message', file=sys.stderr)
    assert err.getvalue().endswith('\nmessage\n')

def test_progress_bar_continues(tmp_path):
    c = Checkpoint(tmp_path/'c.pt')
    setup(schedule=False)[2](epochs=3, checkpoint=c)
    err = io.StringIO()
    with redirect_stderr(err): setup(schedule=False)[2](epochs=6, checkpoint=c, progress='p')
    assert '12/24' in err.getvalue() and '24/24' in err.getvalue()

def test_silent_without_a_label(capfd):
    setup()[2](epochs=1, schedule=None)
    assert capfd.readouterr() == ('', '')

def test_nothing_is_read_in_the_loop(monkeypatch):
    "Reading a value makes the host wait for a GPU; within an epoch only the bar may, twice a second."
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: (reads.append(1), real(self))[1])
    monkeypatch.setattr(training.time, 'monotonic', lambda: 100.)    # no time goes by: the bar reads once
    p = nn.Parameter(torch.zeros(1))
    train(lambda i: dict(loss=p.sum(), a=p.sum()), 50, torch.optim.SGD([p], lr=.1), epochs=1, batch_size=1,
          generator=make_generator(0))
    assert len(reads) == 1 + 2                                       # and the means of two values


def test_a_row_that_says_stop_ends_the_run_for_good(tmp_path):
    model = torch.nn.Linear(2, 1)
    checkpoint = Checkpoint(tmp_path/'c.pt')

    def fit():
        optimizer = torch.optim.SGD(model.parameters(), .1)
        def step(i): return {'loss': model(torch.ones(len(i), 2)).square().mean()}
        return train(step, 8, optimizer, epochs=9, batch_size=4, generator=make_generator(0),
                     modules=[model], checkpoint=checkpoint,
                     monitor=lambda epoch: {'stop': 'enough'} if epoch == 3 else {})
    assert [row['epoch'] for row in fit()] == [1, 2, 3] and fit()[-1]['stop'] == 'enough'
