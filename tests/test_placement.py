"""Every stage on tensors that pretend to be on a GPU: one made elsewhere, or a value read back, fails.

`FakeTensorMode` computes shapes, types and devices without values, so no GPU is needed. Here only what
touches such a tensor is fake; the rest, such as random numbers drawn on the CPU, is real."""
import copy
from contextlib import contextmanager
import pytest, torch
from scan_nb import neighbors as mining
from scan_nb.augment import Normalize
from scan_nb.views import SimCLRAugment, StrongAugment, WeakAugment
from scan_nb.models import (ClusteringModel, ContrastiveModel, resnet18_cifar, resnet18_stl, resnet50,
                            small_resnet)
from scan_nb.moco import MoCo, moco_step, shuffled_keys
from scan_nb.neighbors import embed, embed_views, mutual_neighbors, unit_rows
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import (_heads_step, _picker, head_agreement, logits_of, mean_entropy, scan_loss,
                          validate_scan)
from scan_nb.selflabel import EMA, _step, confident_cross_entropy
from scan_nb.ahead import take
from scan_nb.simclr import nt_xent, simclr_step
from scan_nb.training import make_generator, tune
from scan_nb.whole_network import Pairs, _scan_step
from torch import nn
from torch._subclasses.fake_tensor import (DataDependentOutputException, FakeTensor, FakeTensorMode,
                                           unset_fake_temporarily)
from torch.utils._pytree import tree_leaves

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')]   # deepcopy does

class FakeGPU(FakeTensorMode):
    "Fake is what was put on the GPU, and what is computed from it; zeros come back from there."
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        there = any(isinstance(v, torch.device) and v.type == 'cuda' for v in leaves)
        if there or any(isinstance(v, FakeTensor) for v in leaves):
            found = super().__torch_dispatch__(func, types, args, kwargs)
            if type(found) is torch.Tensor: found.zero_()   # brought to the CPU: memory nobody has filled
            return found
        with unset_fake_temporarily(): return func(*args, **(kwargs or {}))

@pytest.fixture
def gpu(monkeypatch):
    "A mode that is on. Pinned memory would need a driver, and autocast asks for one."
    if torch.cuda.is_available(): pytest.skip('a GPU that is there: see test_gpu')
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *args: (2**30, 2**31))
    with FakeGPU() as mode: yield mode

@contextmanager
def decided(monkeypatch, answer=True):
    "Checks of values, such as `if not x.isfinite().all()`, come out as given."
    with monkeypatch.context() as m:
        m.setattr(FakeTensor, '__bool__', lambda self: answer)
        yield

def images(n=12, channels=3, side=32):
    return torch.zeros(n, channels, side, side, dtype=torch.uint8, device='cuda')

def there(x, *shape, dtype=torch.float32):
    assert (x.device.type, tuple(x.shape), x.dtype) == ('cuda', shape, dtype)

def contrastive(backbone=None, channels=3):
    colors = Normalize([.5]*channels, [.2]*channels)
    return ContrastiveModel(backbone or small_resnet(channels, (8, 16)), normalize=colors).cuda()

def clustering(n_heads=1):
    return ClusteringModel(small_resnet(3, (8, 16)), 5, n_heads, Normalize([.5]*3, [.2]*3)).cuda()

VIEWS = dict(simclr=SimCLRAugment(32, rotation=10, blur_p=.5, erase=5), gray_cam=SimCLRAugment(32, disc=True),
             weak=WeakAugment(24), strong=StrongAugment(32), strong_disc=StrongAugment(24, disc=True))

@pytest.mark.parametrize('kind', VIEWS)
@pytest.mark.parametrize('channels', [1, 3])
def test_views(gpu, kind, channels):
    x = images(12, channels)
    there(VIEWS[kind](x, make_generator(0)), 12, channels, VIEWS[kind].size, VIEWS[kind].size)

@pytest.mark.parametrize('make, side', [(small_resnet, 32), (resnet18_cifar, 32), (resnet18_stl, 96),
                                        (resnet50, 64)])
def test_models(gpu, make, side):
    model = contrastive(make(3))
    there(model(images(4, side=side)), 4, 128)
    there(model.embed(images(4, side=side)), 4, model.backbone.dim)

def run(step):
    "The losses of a step on rows that were drawn on the CPU. (A backward pass would need a GPU.)"
    losses = step(torch.arange(8))
    for value in losses.values(): there(value)
    assert losses['loss'].requires_grad
    return losses

def test_simclr(gpu):
    model = contrastive()
    assert [*run(simclr_step(model, images(), VIEWS['simclr'], .5, make_generator(0)))] == ['loss']
    z = torch.zeros(4, 8, device='cuda')
    there(nt_xent(z, z))

def test_images_on_the_cpu_are_sent(gpu):
    model, x = contrastive(), torch.zeros(12, 3, 32, 32, dtype=torch.uint8)
    run(simclr_step(model, x, VIEWS['simclr'], .5, make_generator(0)))
    there(take(x, torch.arange(3), torch.device('cuda')), 3, 3, 32, 32, dtype=torch.uint8)

def test_moco(gpu):
    state = MoCo(contrastive(), images(1), 24)
    for _ in range(2): run(moco_step(state, images(), VIEWS['weak'], .2, make_generator(0)))
    there(state.queue, 24, 128)
    there(state.owners, 24, dtype=torch.int64)
    there(shuffled_keys(state.twin, images(), torch.randperm(12)), 12, 128)

@pytest.mark.parametrize('head_only', [False, True])
def test_scan(gpu, head_only):
    model, pairs = clustering(3), Pairs(torch.arange(24).view(12, 2) % 12)
    loss = dict(entropy_weight=5., prior=torch.ones(5, device='cuda'))
    step = _scan_step(model, images(), pairs, VIEWS['strong'], loss, head_only, make_generator(0))
    assert {*run(step)} == {'loss', 'consistency', 'entropy'}

@pytest.mark.parametrize('ema', [False, True])
@pytest.mark.parametrize('settings', [dict(balance=True, soft=False), dict(balance=False, soft=True)])
def test_selflabel(gpu, ema, settings):
    model = clustering().train()
    slow = EMA(model, .9) if ema else None
    step = _step(model, slow, images(), VIEWS['strong'], VIEWS['weak'], make_generator(0), 5., None,
                 threshold=.9, **settings)
    assert {*run(step)} == {'loss', 'cross_entropy', 'entropy', 'skipped'}

def test_heads(gpu):
    z = torch.zeros(12, 16, device='cuda')
    near = torch.arange(24).view(12, 2) % 12
    heads, g = clustering(4).cluster_head, make_generator(0)
    for views in (None, torch.zeros(3, 12, 16), torch.zeros(3, 12, 16, device='cuda')):
        for n in (1, 2):
            pick = _picker(z, views, z.mean(0), z.std(0), g, n)
            run(_heads_step(heads, pick, near, 5., None, g, 'scan'))

def test_losses(gpu, monkeypatch):
    logits, near = torch.zeros(3, 40, 5, device='cuda'), torch.zeros(40, 4, dtype=torch.int64, device='cuda')
    for found in scan_loss(logits, logits): there(found, 3)
    for answer in (False, True):
        with decided(monkeypatch, answer):
            for found in validate_scan(logits, near): there(found, 3)
    there(mean_entropy(logits.log_softmax(-1), torch.ones(5)), 3)
    there(confident_cross_entropy(logits[0], logits[1], soft=True))
    assert head_agreement(logits.argmax(-1), 5).device.type == 'cuda'

def test_features_come_to_the_cpu(gpu):
    for found in (embed(contrastive(), images(), 5), logits_of(clustering(), images(), 5),
                  embed_views(contrastive(), images(), VIEWS['weak'], 2, 5, make_generator(0))):
        assert found.device.type == 'cpu' and found.dtype == torch.float32

def test_mining(gpu, monkeypatch):
    z = torch.zeros(40, 16, device='cuda')
    with decided(monkeypatch):
        there(unit_rows(z), 40, 16)
        there(mine_neighbors(z, 3), 40, 3, dtype=torch.int64)
        monkeypatch.setattr(mining, 'BLOCK', 100)   # many blocks
        there(mine_neighbors(z, 3), 40, 3, dtype=torch.int64)
    near = torch.zeros(40, 3, dtype=torch.int64, device='cuda')
    with decided(monkeypatch, False): there(mutual_neighbors(near), 40, 3, dtype=torch.int64)

# ---- precision and compile ---------------------------------------------------------------------------------

def seen_type(model):
    "The type in which the backbone computes."
    types = []
    model.backbone.conv1.register_forward_hook(lambda m, args, out: types.append(out.dtype))
    return types

@pytest.mark.parametrize('precision, kind', [('bf16', torch.bfloat16), ('float32', torch.float32)])
def test_precision_reaches_every_step(gpu, monkeypatch, precision, kind):
    model = tune(contrastive(), precision)
    types = seen_type(model)
    run(simclr_step(model, images(), VIEWS['weak'], .5, make_generator(0)))
    state = MoCo(model, images(1), 24)
    twins = seen_type(state.twin)
    types.clear(), twins.clear()
    run(moco_step(state, images(), VIEWS['weak'], .2, make_generator(0)))
    classes = tune(clustering(), precision)
    types += (more := seen_type(classes))
    pairs, loss = Pairs(torch.zeros(12, 1, dtype=torch.int64)), dict(entropy_weight=5., prior=None)
    slow = EMA(classes, .9)
    run(_scan_step(classes, images(), pairs, VIEWS['weak'], loss, False, make_generator(0)))
    step = _step(classes, slow, images(), VIEWS['weak'], lambda x, g: x, make_generator(0), 5., None,
                 threshold=.9)
    run(step)
    assert {*types, *twins, *more} == {kind} and len(types) > 1 and len(twins) and len(more) > 2
    embed(model, images())
    with decided(monkeypatch): logits_of(classes, images())
    assert types[-1] == more[-1] == torch.float32   # so that a saved model gives the same clusters

def test_compile_is_for_cuda(gpu):
    model = tune(contrastive(), compile=True)
    assert model.backbone._compiled_call_impl is not None
    assert contrastive().backbone._compiled_call_impl is None
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()

# ---- the test itself ---------------------------------------------------------------------------------------

class Wrong(nn.Module):
    def forward(self, x): return x*torch.arange(x.shape[1])

def test_a_tensor_on_the_wrong_device_is_found(gpu):
    with pytest.raises(RuntimeError, match='device'): Wrong()(torch.zeros(2, 3, device='cuda'))

def test_a_value_that_is_read_back_is_found(gpu):
    x = torch.zeros(3, device='cuda')
    for read in (x.sum().item, x.tolist, x.nonzero, lambda: bool(x.any())):
        with pytest.raises((DataDependentOutputException, RuntimeError)) as error: read()
        assert 'Data' in type(error.value).__name__ or 'Dynamic' in type(error.value).__name__
