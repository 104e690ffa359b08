"NT-Xent against a float64 double loop; the training against a loop written out, killed, and without values."
import inspect
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.models import ContrastiveModel, small_resnet
from scan_nb.ahead import send, take
from scan_nb.simclr import channels_last, digits_model, nt_xent, simclr_step, train_simclr
from scan_nb.training import Checkpoint, CosineSchedule, StepSchedule, cosine_factor, make_generator, seeded
from scan_nb.distributed import batches
from torch import nn
from torch.nn import functional as F
from run_notebooks import ROOT

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def pair(b, d, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, b, d, generator=g, dtype=dtype), dim=2)

def each_anchor(z1, z2, temperature):
    "The losses of all 2B anchors by a double loop over Python floats."
    z, b = [*z1.tolist(), *z2.tolist()], len(z1)
    losses = []
    for i in range(2*b):
        similar = [sum(p*q for p, q in zip(z[i], z[j]))/temperature for j in range(2*b) if j != i]
        twin = sum(p*q for p, q in zip(z[i], z[(i+b) % (2*b)]))/temperature
        most = max(similar)
        losses.append(most + math.log(sum(math.exp(s-most) for s in similar)) - twin)
    return losses

sizes = dict(b=st.integers(1, 6), d=st.integers(1, 8), seed=st.integers(0, 10**6),
             temperature=st.floats(.01, 5))

# ---- the loss ----------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(**sizes)
def test_nt_xent_is_the_double_loop(b, d, seed, temperature):
    z1, z2 = pair(b, d, seed)
    expected = sum(each_anchor(z1, z2, temperature))/(2*b)
    loss = nt_xent(z1, z2, temperature)
    assert loss.shape == () and loss.dtype == torch.float64
    assert math.isclose(loss.item(), expected, rel_tol=1e-9, abs_tol=1e-9)
    single = nt_xent(z1.float(), z2.float(), temperature)
    assert math.isclose(single.item(), expected, rel_tol=1e-4, abs_tol=1e-4)

def test_counts_all_anchors_not_half_of_them():
    z1, z2 = pair(5, 4)
    losses = each_anchor(z1, z2, .1)
    first, second = sum(losses[:5])/5, sum(losses[5:])/5
    assert abs(first-second) > .1
    assert math.isclose(nt_xent(z1, z2).item(), (first+second)/2, rel_tol=1e-12)

@settings(deadline=None, max_examples=30)
@given(**sizes)
def test_nt_xent_lies_within_its_bounds(b, d, seed, temperature):
    "The twin at +1 and the others at -1, or the reverse."
    low, high = (math.log1p((2*b-2)*math.exp(s)) for s in (-2/temperature, 2/temperature))
    assert low-1e-9 <= nt_xent(*pair(b, d, seed), temperature).item() <= high+1e-9

@pytest.mark.parametrize('t', [.1, .5, 1.])
def test_known_values(t):
    def loss(*z): return nt_xent(*(torch.tensor(v, dtype=torch.float64) for v in z), t).item()
    axes = torch.eye(8).tolist()
    known = [([[1], [-1]], [[1], [-1]], math.log1p(2*math.exp(-2/t))),         # others opposite
             ([[1], [1]], [[-1], [-1]], 2/t + math.log1p(2*math.exp(-2/t))),   # twins opposite
             (axes, axes, math.log1p(14*math.exp(-1/t))),                      # others orthogonal
             ([[1]]*6, [[1]]*6, math.log(11))]                                 # collapse: all the same
    for z1, z2, expected in known: assert math.isclose(loss(z1, z2), expected, rel_tol=1e-12, abs_tol=1e-13)

def test_random_vectors_cost_the_log_of_the_number_of_others():
    assert abs(nt_xent(*pair(256, 4096, dtype=torch.float32), .5).item()-math.log(511)) < .01

def test_one_image_is_always_right():
    z1, z2 = pair(1, 8)
    assert nt_xent(z1, z2).item() == 0

@settings(deadline=None, max_examples=20)
@given(**sizes)
def test_symmetries(b, d, seed, temperature):
    z1, z2 = pair(b, d, seed)
    loss = nt_xent(z1, z2, temperature)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(pair(d, d, seed+1)[0])[0]
    for same in ((z2, z1), (z1[order], z2[order]), (z1@turn, z2@turn)):
        torch.testing.assert_close(nt_xent(*same, temperature), loss, rtol=1e-8, atol=1e-8)

def test_gradient():
    z1, z2 = (z.requires_grad_() for z in pair(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, .3), (z1, z2))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('temperature', [1e-4, .01, .07])
def test_finite_at_low_temperature(dtype, temperature):
    z1, z2 = (z.to(dtype).requires_grad_() for z in pair(32, 16))
    loss = nt_xent(z1, z2, temperature)
    loss.backward()
    assert loss.isfinite() and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z1.grad.isfinite().all() and z1.grad.dtype == dtype and z1.grad.abs().sum() > 0

def test_autocast_does_not_blur_it():
    z1, z2 = pair(64, 32, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): inside = nt_xent(z1, z2, .05)
    assert torch.equal(inside, nt_xent(z1, z2, .05))
    assert not torch.equal(inside, nt_xent(z1.bfloat16(), z2.bfloat16(), .05))   # there the rounding counts

@pytest.mark.parametrize('temperature', [0, -.1, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match='temperature must be above 0'): nt_xent(*pair(3, 2), temperature)

@pytest.mark.parametrize('shapes', [((3, 4), (5, 4)), ((3, 4), (3, 5))])
def test_views_must_match(shapes):
    with pytest.raises(RuntimeError): nt_xent(*(torch.rand(s) for s in shapes))

# ---- batches and devices -----------------------------------------------------------------------------------

def test_take(tmp_path):
    images = torch.randint(256, (9, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path/'x.npy', images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path/'x.npy', mmap_mode='c'))
    for index in (torch.tensor([3, 0, 3]), torch.arange(9), torch.tensor([], dtype=torch.int64)):
        for source in (images, mapped): assert torch.equal(take(source, index), images[index])

def test_take_goes_where_it_is_needed():
    images, index = torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 2])
    there = torch.device('meta')
    for source, where, target in ((images, index, there), (images.to(there), index, there),
                                  (images.to(there), index.to(there), None)):
        assert take(source, where, target).device == there
    assert take(images, index).device == index.device

class Recorder:
    device = torch.device('cpu')
    def __init__(self): self.calls = []
    def pin_memory(self): self.calls.append('pin'); return self
    def to(self, *a, **kw): self.calls.append((str(a[0]), kw)); return self

def test_the_way_to_cuda_is_pinned_and_does_not_wait():
    assert send(Recorder(), torch.device('cuda:1')).calls == ['pin', ('cuda:1', {'non_blocking': True})]
    assert send(Recorder(), 'cuda').calls == ['pin', ('cuda', {'non_blocking': True})]
    assert send(Recorder(), torch.device('cpu')).calls == [('cpu', {})]
    away = Recorder()
    away.device = torch.device('cuda')                                        # the way back must wait
    assert send(away, torch.device('cpu')).calls == [('cpu', {})]
    away.calls.clear()
    assert send(away, torch.device('cuda:1')).calls == [('cuda:1', {})]   # what is there is not pinned

AUGMENT = SimCLRAugment(8, scale=(.6, 1.4), flip_p=0, rotation=15, erase=3)

def make(seed=0, widths=(4, 8)):
    with seeded(seed): return ContrastiveModel(small_resnet(1, widths), dim=16)

@pytest.mark.parametrize('images_there', [True, False])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_step_reads_nothing_back(monkeypatch, images_there, channels):
    "On the meta device a tensor has no values: whatever would wait for one raises."
    there = torch.device('meta')
    monkeypatch.setattr(torch, 'autocast', lambda *a, **kw: nullcontext())    # it doesn't know this device
    with there: model = ContrastiveModel(small_resnet(channels, (4, 8)))
    images = torch.zeros(20, channels, 8, 8, dtype=torch.uint8, device=there if images_there else 'cpu')
    step = simclr_step(model, images, AUGMENT, .5, make_generator(0))
    optimizer = torch.optim.SGD(model.parameters(), .1, .9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = step(torch.arange(16))['loss']
        loss.backward()
        optimizer.step()
    assert loss.device == there and loss.shape == ()

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('images_there', [True, False])
def test_on_cuda(images_there):
    images = digits().images[:256].to('cuda' if images_there else 'cpu')
    history = train_simclr(make().cuda(), images, AUGMENT, epochs=3, batch_size=128, lr=.05, temperature=.5)
    assert history[-1]['loss'] < history[0]['loss']

def test_channels_last_changes_the_order_only():
    model = make(widths=(8, 16))
    x, weight = torch.rand(5, 1, 8, 8), model.backbone.layer1[0].conv1.weight
    before, values = model.eval()(x), weight.clone()
    with pytest.raises(KeyError), channels_last(model):
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        assert torch.equal(weight, values)
        torch.testing.assert_close(model(x), before)
        raise KeyError
    assert weight.is_contiguous() and torch.equal(weight, values) and torch.equal(model(x), before)

def test_a_narrow_network_keeps_its_order_on_the_cpu():
    "oneDNN writes beyond the weights' gradient of a first convolution with fewer than 8 channels (AVX2)."
    model = make(widths=(4, 8))
    with channels_last(model): assert all(p.is_contiguous() for p in model.parameters())

# ---- training ----------------------------------------------------------------------------------------------

IMAGES = digits().images[:96]
RECIPE = dict(epochs=3, batch_size=32, lr=.1, temperature=.5)

def fit(seed=0, start=0, **changes):
    model = make(start)
    return model, train_simclr(model, IMAGES, AUGMENT, seed=seed, **{**RECIPE, **changes})

def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

class Same(nn.Module):
    "A view is the image itself, a little darker the second time."
    def __init__(self):
        super().__init__()
        self.calls = []
    def forward(self, x, generator=None):
        self.calls.append(x)
        return x.float()/255*(1 - .1*(len(self.calls) % 2))

def test_training_is_the_loop_written_out():
    images, recipe = IMAGES, dict(lr=.2, momentum=.8, weight_decay=1e-3, warmup=.25)
    model, other = make(), make()
    train_simclr(model, images, Same(), epochs=4, batch_size=40, seed=3, temperature=.5, **recipe)
    optimizer = torch.optim.SGD(other.train().parameters(), .2, momentum=.8, weight_decay=1e-3)
    generator, augment, t = make_generator(3), Same(), 0
    for _ in range(4):
        for rows in torch.randperm(96, generator=generator)[:80].split(40):
            factor = (t+1)/2 if t < 2 else .5*(1+math.cos(math.pi*(t-2)/6))
            for group in optimizer.param_groups: group['lr'] = .2*factor
            z1, z2 = other(torch.cat([augment(images[rows]), augment(images[rows])])).split(40)
            z, eye = torch.cat([z1, z2]), torch.eye(80, dtype=torch.bool)
            logits = (z @ z.T/.5)[~eye].view(80, 79)
            twin = torch.cat([torch.arange(40)+39, torch.arange(40)])
            optimizer.zero_grad()
            F.cross_entropy(logits, twin).backward()
            optimizer.step()
            t += 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=2e-3, atol=2e-4, msg=name)

def test_two_views_of_the_same_images_in_one_forward():
    model, augment, seen = make(), Same(), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    train_simclr(model, IMAGES, augment, epochs=1, batch_size=32)
    assert len(augment.calls) == 6
    assert all(torch.equal(a, b) for a, b in zip(augment.calls[::2], augment.calls[1::2]))
    assert [x.shape for x in seen] == [(64, 1, 8, 8)]*3
    every = torch.cat(augment.calls[::2]).flatten(1)
    assert torch.equal(every.unique(dim=0), IMAGES.flatten(1).unique(dim=0))

def test_history_and_schedule():
    _, history = fit(epochs=5, warmup=.2)
    assert [row['epoch'] for row in history] == [1, 2, 3, 4, 5]
    expected = [.1*cosine_factor(t, 15, 3) for t in range(0, 15, 3)]
    assert [row['lr'] for row in history] == pytest.approx(expected)
    assert all(0 < row['loss'] < math.log(63)+.5 for row in history)

def train_with(model, kind, schedule=None, **changes):
    "Training with an optimizer and a schedule from outside."
    optimizer = kind(model.parameters(), .1)
    given = dict(optimizer=optimizer, schedule=schedule and schedule(optimizer))
    return train_simclr(model, IMAGES, AUGMENT, **given, **{**RECIPE, **changes})

def test_an_optimizer_from_outside_goes_before_the_settings():
    def sgd(parameters, lr): return torch.optim.SGD(parameters, lr, .9, weight_decay=1e-4)
    usual, history = fit()
    same, other = make(), make()
    assert train_with(same, sgd, lr=77., momentum=0.) == history and equal(same, usual)
    train_with(other, torch.optim.Adam)
    assert not equal(other, usual)

def test_a_schedule_from_outside_goes_before_the_warmup():
    model = make()
    history = train_with(model, torch.optim.SGD, lambda o: StepSchedule(o, [3, 6], .5), warmup=1.)
    assert [row['lr'] for row in history] == pytest.approx([.1, .05, .025])

def test_a_killed_run_with_another_optimizer_continues_to_the_bit(tmp_path):
    whole, parts, saved = make(), make(), Checkpoint(tmp_path/'c.pt')
    constant = lambda o: CosineSchedule(o, 9, final=1.)
    history = train_with(whole, torch.optim.Adam, constant)
    def train_on(model, **options):
        return train_with(model, torch.optim.Adam, constant, checkpoint=saved, **options)
    def kill(epoch):
        if epoch == 2: raise RuntimeError('killed')
    with pytest.raises(RuntimeError): train_on(parts, monitor=kill)
    resumed = make(5)
    assert train_on(resumed) == history and equal(resumed, whole)

def test_same_seed_same_weights():
    first, again, other = fit(seed=1), fit(seed=1), fit(seed=2)
    assert equal(first[0], again[0]) and first[1] == again[1]
    assert not equal(first[0], other[0])

def test_leaves_the_global_generators_and_the_images_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    images = IMAGES.clone()
    fit()
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2] and torch.equal(IMAGES, images)

def test_memory_mapped_images_give_the_same_weights(tmp_path):
    np.save(tmp_path/'x.npy', IMAGES.numpy())
    mapped, model = torch.from_numpy(np.load(tmp_path/'x.npy', mmap_mode='c')), make()
    train_simclr(model, mapped, AUGMENT, **RECIPE)
    assert equal(model, fit()[0])

class Killed(Exception): pass

@pytest.mark.parametrize('killed_in', [2, 4])
def test_a_killed_run_continues_to_the_bit(tmp_path, killed_in):
    def kill(epoch):
        if epoch == killed_in: raise Killed
    file = Checkpoint(tmp_path/'simclr.pt')
    with pytest.raises(Killed): fit(epochs=4, monitor=kill, checkpoint=file)
    resumed, history = fit(epochs=4, start=9, checkpoint=file)
    whole, expected = fit(epochs=4)
    assert equal(resumed, whole) and history == expected

def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    file = Checkpoint(tmp_path/'simclr.pt')
    fit(checkpoint=file)
    for change in (dict(epochs=5), dict(batch_size=16), dict(warmup=.9)):
        with pytest.raises(UserError, match='belongs to another run'): fit(checkpoint=file, **change)

def test_monitor_sees_eval_mode_and_training_goes_on():
    model, modes, trained = make().eval(), [], []
    model.register_forward_pre_hook(lambda m, args: trained.append(m.training))
    def monitor(epoch):
        modes.append(model.training)
        return {'e2': epoch**2}
    history = train_simclr(model, IMAGES, AUGMENT, **RECIPE, monitor=monitor)
    assert modes == [False]*3 and all(trained) and [row['e2'] for row in history] == [1, 4, 9]

def test_no_label_can_reach_it():
    names = {*inspect.signature(train_simclr).parameters, *inspect.signature(simclr_step).parameters}
    assert not any('label' in n or n in ('y', 'target', 'targets') for n in names)

def test_it_learns():
    model, images = make(widths=(8, 16)), digits().images[:512]
    history = train_simclr(model, images, AUGMENT, epochs=10, batch_size=128, lr=.1, temperature=.5)
    g = make_generator(5)
    with torch.no_grad(): z = [model.eval()(AUGMENT(images, g)) for _ in range(2)]
    start = make(widths=(8, 16)).eval()
    with torch.no_grad(): z0 = [start(AUGMENT(images, g)) for _ in range(2)]
    found, before = ((a @ b.T).argmax(1) == torch.arange(512) for a, b in (z, z0))
    assert history[-1]['loss'] < history[0]['loss']-.2 and found.float().mean() > 2*before.float().mean()

# ---- wrong input -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, changes', [(1, {}), (5, dict(batch_size=1))])
def test_one_image_has_nobody_to_be_told_from(n, changes):
    with pytest.raises(UserError, match='a batch needs two or more'):
        train_simclr(make(), IMAGES[:n], AUGMENT, **{**RECIPE, **changes})

@pytest.mark.parametrize('n, changes', [
    (0, {}), (5, dict(batch_size=0)), (5, dict(epochs=0)), (5, dict(warmup=2)), (5, dict(temperature=0)),
    (5, dict(seed=-1)), (5, dict(seed=.5))])
def test_impossible_settings(n, changes):
    with pytest.raises(UserError) as e: train_simclr(make(), IMAGES[:n], AUGMENT, **{**RECIPE, **changes})
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('n, batch_size', [(2, 512), (3, 2), (31, 30)])
def test_small_sets(n, batch_size):
    history = train_simclr(make(), IMAGES[:n], AUGMENT, **{**RECIPE, 'batch_size': batch_size})
    assert len(history) == 3 and all(math.isfinite(row['loss']) for row in history)

def test_every_image_counts_when_there_are_fewer_than_a_batch():
    assert len(batches(31, 512, make_generator(0))[0]) == 31

def test_a_diverged_run_stops():
    model = make()
    with torch.no_grad(): model.backbone.conv1.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        train_simclr(model, IMAGES, AUGMENT, **RECIPE)

def test_digits_from_a_file(tmp_path):
    "The weights that the course keeps are of such a network; no other file fits."
    learned = digits_model(epochs=1, seed=3)
    torch.save(learned.state_dict(), tmp_path/'one.pth.tar')
    again = digits_model(weights=str(tmp_path/'one.pth.tar'))
    assert not again.training
    for (name, v), (_, w) in zip(learned.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(v, w), name
    kept = digits_model(weights=str(ROOT/'nbs/digits.pth.tar'))
    assert kept.backbone.bn1.num_batches_tracked == 32*(len(digits())//128)
    torch.save(ContrastiveModel(small_resnet(1, (8, 8))).state_dict(), tmp_path/'other.pth.tar')
    for file, said in (('none', 'There is no file'), ('other', 'conv1')):
        with pytest.raises(UserError, match=said): digits_model(weights=str(tmp_path/f'{file}.pth.tar'))
