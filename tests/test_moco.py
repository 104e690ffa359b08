"InfoNCE against a double loop; queue, twin, shuffling over two processes; the public network."
import inspect
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.models import ContrastiveModel, resnet50, small_resnet
from scan_nb.moco import (MoCo, follow, info_nce, load_moco_v2, moco_step, moco_v2_names,
                          shuffled_keys, train_moco)
from scan_nb.training import Checkpoint, CosineSchedule, make_generator, seeded
from scan_nb.distributed import gather, place
from torch import nn
from torch.nn import functional as F
from shell import serve

pytestmark = pytest.mark.usefixtures('one_thread')

def units(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=dtype), dim=-1)

def looped(q, k, queue, temperature, mine=None):
    "The loss in Python floats."
    total = 0.
    for i, query in enumerate(q.tolist()):
        cos = [sum(a*b for a, b in zip(query, key)) for key in (k[i].tolist(), *queue.tolist())]
        kept = [c/temperature for j, c in enumerate(cos) if j == 0 or mine is None or not mine[i, j - 1]]
        top = max(kept)
        total += top + math.log(sum(math.exp(c - top) for c in kept)) - kept[0]
    return total/len(q)

# ---- the loss ----------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(b=st.integers(1, 5), n=st.integers(1, 6), d=st.integers(1, 8), seed=st.integers(0, 10**6),
       temperature=st.floats(.01, 5), masked=st.booleans())
def test_info_nce_is_the_double_loop(b, n, d, seed, temperature, masked):
    q, k, queue = (units(m, d, seed=seed + i) for i, m in enumerate((b, b, n)))
    mine = torch.rand(b, n, generator=make_generator(seed)) < .5 if masked else None
    expected = looped(q, k, queue, temperature, mine)
    loss = info_nce(q, k, queue, temperature, mine)
    assert loss.shape == () and loss.dtype == torch.float64
    assert math.isclose(loss.item(), expected, rel_tol=1e-9, abs_tol=1e-9)
    single = info_nce(q.float(), k.float(), queue.float(), temperature, mine)
    assert single.dtype == torch.float32 and math.isclose(single.item(), expected, rel_tol=1e-4, abs_tol=1e-4)

def test_the_order_of_the_queue_does_not_matter_but_that_of_the_keys_does():
    q, k, queue = units(6, 4), units(6, 4, seed=1), units(9, 4, seed=2)
    assert torch.allclose(info_nce(q, k, queue), info_nce(q, k, queue.flip(0)))
    assert not torch.allclose(info_nce(q, k, queue), info_nce(q, k.flip(0), queue))

def test_an_image_whose_keys_are_all_left_out_is_always_right():
    q, k, queue = units(3, 4), units(3, 4, seed=1), units(5, 4, seed=2)
    assert info_nce(q, k, queue, mine=torch.ones(3, 5, dtype=torch.bool)) == 0

def test_gradient():
    q, k, queue = (z.requires_grad_() for z in (units(4, 3), units(4, 3, seed=1), units(5, 3, seed=2)))
    assert torch.autograd.gradcheck(lambda *v: info_nce(*v, .3), (q, k, queue))

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('temperature', [1e-4, .01, .2])
def test_finite_at_low_temperature(dtype, temperature):
    q, k, queue = (units(8, 16, seed=i).to(dtype) for i in range(3))
    loss = info_nce(q.requires_grad_(), k, queue, temperature)
    loss.backward()
    assert loss.isfinite() and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert q.grad.isfinite().all() and q.grad.dtype == dtype and q.grad.abs().sum() > 0

def test_autocast_does_not_blur_it():
    q, k, queue = (units(64, 32, seed=i, dtype=torch.float32) for i in range(3))
    with torch.autocast('cpu', torch.bfloat16): inside = info_nce(q, k, queue, .05)
    assert torch.equal(inside, info_nce(q, k, queue, .05))

@pytest.mark.parametrize('temperature', [0, -.1, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match='temperature must be above 0'):
        info_nce(units(3, 2), units(3, 2), units(4, 2), temperature)

# ---- twin and queue ----------------------------------------------------------------------------------------

def make(seed=0, widths=(4, 8)):
    with seeded(seed): return ContrastiveModel(small_resnet(1, widths), dim=16)

IMAGES = digits().images[:96]

@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_the_queue_holds_the_latest(size, batches):
    moco, latest, n = MoCo(nn.Linear(3, 2), torch.zeros(3), size), [], 0
    for b in batches:
        owners = torch.arange(n, n + b)
        moco.push(torch.stack([owners.float(), -owners.float()], 1), owners)
        latest, n = [*latest, *owners.tolist()][-size:], n + b
    held = moco.owners[moco.owners >= 0].tolist()
    assert sorted(held) == latest and len(moco.queue) == size
    for key, owner in zip(moco.queue.tolist(), moco.owners.tolist()):
        assert key == ([owner, -owner] if owner >= 0 else [0, 0])
    if len(latest) == size: assert moco.owners[moco.oldest] == latest[0]

@settings(deadline=None, max_examples=20)
@given(m=st.floats(0, 1), steps=st.integers(1, 5))
def test_the_twin_is_a_weighted_mean_of_the_past(m, steps):
    model, twin = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    past = [twin.weight.item()]
    for t in range(steps):
        nn.init.constant_(model.weight, t)
        follow(twin, model, m)
        past.append(float(t))
    expected = m**steps*past[0] + sum((1 - m)*m**(steps - 1 - t)*v for t, v in enumerate(past[1:]))
    assert math.isclose(twin.weight.item(), expected, rel_tol=1e-9, abs_tol=1e-12)

def test_the_twin_starts_equal_and_has_no_gradient():
    moco = MoCo(make(), IMAGES[:1], 8)
    assert moco.queue.shape == (8, 16) and equal(moco.model, moco.twin)
    assert not any(p.requires_grad for p in moco.twin.parameters())
    assert all(p.requires_grad for p in moco.model.parameters())
    step = moco_step(moco, IMAGES, AUGMENT, .2, make_generator(0))
    step(torch.arange(16))['loss'].backward()
    assert all(p.grad is None for p in moco.twin.parameters())
    assert sum(p.grad.abs().sum() for p in moco.model.parameters()) > 0

@pytest.mark.parametrize('size, m', [(0, .9), (-3, .9), (4, -.1), (4, 1.1), (4, math.nan)])
def test_impossible_sizes(size, m):
    with pytest.raises(UserError, match='queue_size ≥ 1'): MoCo(nn.Linear(2, 2), torch.zeros(2), size, m)

def test_a_key_of_the_same_image_is_no_stranger():
    "With one image's keys alone in the queue, a query of this image has only its own key to choose."
    moco = MoCo(make(), IMAGES[:1], 4)
    moco.push(units(4, 16, dtype=torch.float32), torch.tensor([3, 3, 7, 7]))
    step = moco_step(moco, IMAGES, AUGMENT, .2, make_generator(0))
    moco.owners[:] = torch.tensor([3, 7, 3, 7])
    before = moco.queue.clone()
    loss = step(torch.tensor([3, 7]))['loss']
    assert loss > 0 and not torch.equal(before, moco.queue)
    moco.owners[:] = 3
    q = moco.owners.new_tensor([3, 3])
    assert step(q)['loss'].item() == 0

# ---- shuffling ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 3, 5, 8, 33])
@pytest.mark.parametrize('parts', [1, 4])
def test_keys_come_back_in_order(n, parts):
    model = make().eval()
    keys = shuffled_keys(model, IMAGES[:n], torch.randperm(n, generator=make_generator(0)), parts)
    torch.testing.assert_close(keys, model(IMAGES[:n]).detach(), atol=1e-5, rtol=0)

class Companions(nn.Module):
    "A vector that tells how many images came together, and which."
    def __init__(self):
        super().__init__()
        self.seen = []
    def forward(self, x):
        self.seen.append(x.flatten().tolist())
        return x

def test_companies_are_random_and_hold_two_or_more():
    twin, x = Companions(), torch.arange(10.).view(10, 1)
    assert torch.equal(shuffled_keys(twin, x, torch.randperm(10, generator=make_generator(0))), x)
    assert sorted(sum(twin.seen, [])) == list(range(10)) and [len(s) for s in twin.seen] == [3, 3, 2, 2]
    assert sum(twin.seen, []) != list(range(10))
    twin.seen.clear()
    shuffled_keys(twin, x[:3], torch.randperm(3))
    assert [len(s) for s in twin.seen] == [3]

def process(rank, file, results):
    "Two steps in one of two processes, which see different images."
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    twin, x = Companions(), torch.arange(6.).view(6, 1) + 10*rank
    order = torch.randperm(12, generator=make_generator(rank))
    keys = shuffled_keys(twin, x, order)
    moco = MoCo(make(), IMAGES[:1], 20)
    step = moco_step(moco, IMAGES, AUGMENT, .2, make_generator(rank))
    losses = [step(torch.arange(6) + 6*(rank + 2*i))['loss'].item() for i in range(2)]
    eval_keys = shuffled_keys(moco.twin.eval(), IMAGES[6*rank:][:6], order)
    seen = dict(keys=keys, seen=twin.seen, losses=losses, place=place(), gathered=gather(x))
    state = dict(eval_keys=eval_keys, queue=moco.queue, owners=moco.owners, oldest=moco.oldest)
    torch.save({**seen, **state}, f'{results}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_share_a_queue_and_every_key_comes_home(tmp_path):
    serve()
    torch.multiprocessing.start_processes(process, (str(tmp_path/'meet'), str(tmp_path)), nprocs=2,
                                          start_method='forkserver')
    a, b = (torch.load(tmp_path/f'{rank}.pt') for rank in (0, 1))
    both = torch.tensor([*range(6), *range(10, 16)]).float().view(12, 1)
    for one, rank in ((a, 0), (b, 1)):
        assert one['place'] == (rank, 2) and all(torch.equal(one[k], both) for k in ('gathered', 'keys'))
        assert [len(s) for s in one['seen']] == [6] and all(math.isfinite(v) for v in one['losses'])
    dealt = a['seen'][0], b['seen'][0]
    assert sorted(sum(dealt, [])) == both.flatten().tolist()
    assert all(min(share) < 6 and max(share) >= 10 for share in dealt)         # companions of both processes
    for name in ('queue', 'owners', 'oldest', 'eval_keys'): assert torch.equal(a[name], b[name]), name
    assert a['losses'] == b['losses']
    assert sorted(a['owners'].tolist()) == [*range(4, 24)] and a['oldest'] == 4
    assert a['eval_keys'].shape == (12, 16) and a['queue'].norm(dim=1).sub(1).abs().max() < 1e-5

# ---- training ----------------------------------------------------------------------------------------------

AUGMENT = SimCLRAugment(8, scale=(.6, 1.4), flip_p=0, rotation=15, erase=3)
RECIPE = dict(epochs=3, batch_size=32, lr=.1, queue_size=48)

def fit(seed=0, start=0, **changes):
    model = make(start)
    return model, train_moco(model, IMAGES, AUGMENT, seed=seed, **{**RECIPE, **changes})

def equal(a, b):
    states = (m.state_dict().values() for m in (a, b))
    return all(torch.equal(x, y) for x, y in zip(*states, strict=True))

class Plain(nn.Module):
    "A model without batch norm, for a loop written out."
    def __init__(self):
        super().__init__()
        with seeded(0): self.linear = nn.Linear(64, 6)
    def forward(self, x): return F.normalize(self.linear(x.flatten(1).float()), dim=1)

class Darker(nn.Module):
    "A view is the image itself, a little darker the second time."
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, x, generator=None):
        self.calls += 1
        return x.float()/255*(1 - .1*(self.calls % 2))

def test_training_is_the_loop_written_out():
    model, other = Plain(), Plain()
    train_moco(model, IMAGES, Darker(), epochs=2, batch_size=40, lr=.2, momentum=.8, weight_decay=1e-3,
               temperature=.3, queue_size=100, key_momentum=.7, warmup=.5, seed=3)
    optimizer = torch.optim.SGD(other.parameters(), .2, momentum=.8, weight_decay=1e-3)
    w, b = (p.detach().clone() for p in other.parameters())
    generator, view, kept, t = make_generator(3), Darker(), [], 0
    for _ in range(2):
        for rows in torch.randperm(96, generator=generator)[:80].split(40):
            factor = (t+1)/2 if t < 2 else .5*(1 + math.cos(math.pi*(t-2)/2))
            for group in optimizer.param_groups: group['lr'] = .2*factor
            w, b = (.7*slow + .3*fast.detach() for slow, fast in zip((w, b), other.parameters()))
            q = other(view(IMAGES[rows]))
            k = F.normalize(F.linear(view(IMAGES[rows]).flatten(1), w, b), dim=1)
            torch.randperm(40, generator=generator)                            # the companies
            keys = torch.cat([torch.zeros(100 - len(kept), 6), *[key[None] for key, _ in kept]])
            mine = torch.tensor([[False]*(100 - len(kept)) + [i == owner for _, owner in kept] for i in rows])
            loss = looped_tensor(q, k, keys, .3, mine)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept, t = (kept + list(zip(k, rows.tolist())))[-100:], t + 1
    for mine, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)

def looped_tensor(q, k, queue, temperature, mine):
    "One row after the other, the own key last."
    losses = []
    for i in range(len(q)):
        others = queue[~mine[i]] @ q[i]
        losses.append(torch.cat([others, (q[i] @ k[i])[None]]).div(temperature).log_softmax(0)[-1])
    return -torch.stack(losses).mean()

def test_same_seed_same_weights():
    first, again, other = fit(seed=1), fit(seed=1), fit(seed=2)
    assert equal(first[0], again[0]) and first[1] == again[1] and not equal(first[0], other[0])

def test_leaves_the_global_generators_and_the_images_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    images = IMAGES.clone()
    fit()
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2] and torch.equal(IMAGES, images)

def test_memory_mapped_images_give_the_same_weights(tmp_path):
    np.save(tmp_path/'x.npy', IMAGES.numpy())
    mapped, model = torch.from_numpy(np.load(tmp_path/'x.npy', mmap_mode='c')), make()
    train_moco(model, mapped, AUGMENT, **RECIPE)
    assert equal(model, fit()[0])

class Killed(Exception): pass

@pytest.mark.parametrize('killed_in', [2, 4])
def test_a_killed_run_continues_to_the_bit(tmp_path, killed_in):
    def kill(epoch):
        if epoch == killed_in: raise Killed
    file = Checkpoint(tmp_path/'moco.pt')
    with pytest.raises(Killed): fit(epochs=4, monitor=kill, checkpoint=file)
    resumed, history = fit(epochs=4, start=9, checkpoint=file)
    whole, expected = fit(epochs=4)
    assert equal(resumed, whole) and history == expected

def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    file = Checkpoint(tmp_path/'moco.pt')
    fit(checkpoint=file)
    for change in (dict(epochs=5), dict(batch_size=16), dict(warmup=.9), dict(queue_size=50)):
        with pytest.raises(UserError, match='belongs to another run'): fit(checkpoint=file, **change)

def test_another_optimizer_and_schedule():
    model = make()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    flat = CosineSchedule(adam, 9, final=1.)
    history = train_moco(model, IMAGES, AUGMENT, **RECIPE, optimizer=adam, schedule=flat)
    assert [row['lr'] for row in history] == [1e-3]*3 and flat.t == 9 and not equal(model, make())
    assert len(adam.state) == len(list(model.parameters()))

def test_monitor_sees_eval_mode_and_training_goes_on():
    model, modes, trained = make().eval(), [], []
    def monitor(epoch):
        modes.append(model.training)
        return {'e2': epoch**2}
    def look(m, args, out):
        if len(args[0]) > 1: trained.append(m.training)                        # not the example
    model.backbone.register_forward_hook(look)
    history = train_moco(model, IMAGES, AUGMENT, **RECIPE, monitor=monitor)
    assert modes == [False]*3 and all(trained) and [row['e2'] for row in history] == [1, 4, 9]

def test_no_label_can_reach_it():
    names = {*inspect.signature(train_moco).parameters, *inspect.signature(moco_step).parameters}
    assert not any('label' in n or n in ('y', 'target', 'targets') for n in names)

def test_it_learns():
    model, start, images = make(widths=(8, 16)), make(widths=(8, 16)).eval(), digits().images[:512]
    train_moco(model, images, AUGMENT, epochs=12, batch_size=64, lr=.1, queue_size=256)
    g = make_generator(5)
    views = [AUGMENT(images, g) for _ in range(2)]
    with torch.no_grad(): z, z0 = ([m(v) for v in views] for m in (model.eval(), start))
    found, before = ((a @ b.T).argmax(1) == torch.arange(512) for a, b in (z, z0))
    assert found.float().mean() > 1.5*before.float().mean()

@pytest.mark.parametrize('n, changes', [(1, {}), (5, dict(batch_size=1))])
def test_one_image_has_nobody_to_be_told_from(n, changes):
    with pytest.raises(UserError, match='a batch needs two or more'):
        train_moco(make(), IMAGES[:n], AUGMENT, **{**RECIPE, **changes})

@pytest.mark.parametrize('n, changes', [
    (0, {}), (5, dict(batch_size=0)), (5, dict(epochs=0)), (5, dict(warmup=2)), (5, dict(temperature=0)),
    (5, dict(seed=-1)), (5, dict(queue_size=0)), (5, dict(key_momentum=2))])
def test_impossible_settings(n, changes):
    with pytest.raises(UserError) as e: train_moco(make(), IMAGES[:n], AUGMENT, **{**RECIPE, **changes})
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('n, size', [(2, 1), (3, 1000), (31, 7)])
def test_small_sets_and_any_queue(n, size):
    history = train_moco(make(), IMAGES[:n], AUGMENT, **{**RECIPE, 'queue_size': size})
    assert len(history) == 3 and all(math.isfinite(row['loss']) for row in history)

# ---- the public network ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tv():
    import torchvision
    with seeded(3): net = torchvision.models.resnet50()
    for m in net.modules():                                                    # statistics that matter
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .1, generator=make_generator(1))
            m.running_var.uniform_(.5, 1.5, generator=make_generator(2))
    return net.eval()

def moco_state(tv, prefix='module.'):
    "The names and extras of the public file."
    with seeded(4): head = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    net = {k: v for k, v in tv.state_dict().items() if not k.startswith('fc.')}
    net |= {f'fc.{k}': v for k, v in head.state_dict().items()}
    state = {f'{prefix}encoder_q.{k}': v for k, v in net.items()}
    state |= {f'{prefix}encoder_k.{k}': torch.zeros_like(v) for k, v in net.items() if '1.0.' in k}
    return state | {f'{prefix}queue': torch.zeros(128, 8), f'{prefix}queue_ptr': torch.zeros(1)}, head

def check_features(model, tv):
    x = torch.rand(2, 3, 64, 64, generator=make_generator(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    body = nn.Sequential(*list(tv.children())[:-1], nn.Flatten())
    with torch.no_grad():
        expected = body((x - mean)/std)
        torch.testing.assert_close(model.embed(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.embed((x*255).byte()), expected, rtol=.1, atol=.1)
    return x, expected

@pytest.mark.parametrize('prefix', ['module.', ''])
def test_the_public_checkpoint(tmp_path, tv, prefix):
    state, head = moco_state(tv, prefix)
    file = tmp_path/'moco_v2_800ep_pretrain.pth.tar'
    torch.save({'epoch': 800, 'arch': 'resnet50', 'state_dict': state}, file)
    model = load_moco_v2(file)
    x, h = check_features(model, tv)
    with torch.no_grad(): z, expected = model(x), F.normalize(head(h), dim=1)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)
    assert not model.training

def test_torchvision_weights(tmp_path, tv):
    before = torch.get_rng_state()
    torch.save(tv.state_dict(), tmp_path/'resnet50.pth')
    check_features(load_moco_v2(tmp_path/'resnet50.pth'), tv)
    assert torch.equal(before, torch.get_rng_state())

def test_files_that_do_not_fit(tmp_path, tv):
    file, state = tmp_path/'x.pth', moco_state(tv)[0]
    q = 'module.encoder_q.'
    first = {**state, f'{q}fc.weight': torch.zeros(128, 2048)}                 # the first MoCo: a linear head
    for k in [k for k in first if '_q.fc.0' in k or '_q.fc.2' in k]: del first[k]
    gone, extra = dict(state), {**state, f'{q}layer9.weight': torch.zeros(2)}
    del gone[f'{q}layer2.0.conv1.weight']
    wrong = {**state, f'{q}conv1.weight': torch.zeros(64, 1, 7, 7)}
    for bad, named in ((first, 'contrastive_head.weight'), (gone, 'backbone.layer2.0.conv1.weight'),
                       (extra, 'backbone.layer9.weight'), (wrong, 'backbone.conv1.weight')):
        torch.save({'state_dict': bad}, file)
        with pytest.raises(UserError, match=named) as e: load_moco_v2(file)
        assert '\n' not in str(e.value) and 'x.pth' in str(e.value)
    headless = {k: v for k, v in state.items() if '_q.fc' not in k}
    torch.save({'state_dict': headless}, file)
    with pytest.raises(UserError, match='contrastive_head.0.weight'): load_moco_v2(file)

class Evil:
    def __reduce__(self): return (print, ('run',))

@pytest.mark.parametrize('content', [Evil(), {'state_dict': 5}, [1, 2], {}])
def test_files_that_hold_no_weights(tmp_path, content, capsys):
    torch.save(content, tmp_path/'x.pth')
    with pytest.raises(UserError, match='x.pth'): load_moco_v2(tmp_path/'x.pth')
    assert capsys.readouterr().out == ''

def test_no_file_and_a_damaged_one(tmp_path):
    (tmp_path/'bad.pth').write_bytes(b'PK\3\4 nothing')
    for name in ('none.pth', 'bad.pth'):
        with pytest.raises(UserError, match=name): load_moco_v2(tmp_path/name)

def test_every_name_of_torchvision_has_its_place(tv):
    ours = {f'backbone.{k}' for k in resnet50().state_dict()}
    assert moco_v2_names(tv.state_dict()).keys() == ours
    assert moco_v2_names(moco_state(tv)[0]).keys() - ours == {f'contrastive_head.{i}.{k}' for i in (0, 2)
                                                              for k in ('weight', 'bias')}
