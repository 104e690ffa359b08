"Backbones and heads against torchvision, loops of nn.Linear, hand-written formulas and every wrong input."
import copy
import pytest, torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from scan_nb.augment import Normalize
from scan_nb.data import UserError
from scan_nb.models import (BasicBlock, Bottleneck, ClusterHeads, ClusteringModel, ContrastiveModel,
                            SideBySide, evaluating, feature_dim, resnet18_cifar, resnet18_stl, resnet50,
                            select_head, small_resnet)

BACKBONES = [(small_resnet, 8, 256), (small_resnet, 28, 256), (resnet18_cifar, 32, 512),
             (resnet18_stl, 96, 512), (resnet50, 224, 2048)]

@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)

pytestmark = pytest.mark.usefixtures('one_thread')

def randomize(module):
    "Batch-norm statistics and affine parameters away from 0 and 1, so that a swapped layer shows."
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var): t.uniform_(.5, 1.5)
            for t in (m.bias.data, m.running_mean): t.normal_(0, .1)
    return module

def without_fc(model):
    model.fc = nn.Identity()
    return model

def tiny(channels=1): return small_resnet(channels, widths=(4, 8))

# -- backbones --

@pytest.mark.parametrize('make,size,dim', BACKBONES)
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_shapes_without_memory(make, size, dim, channels):
    with torch.device('meta'):
        model = make(in_channels=channels)
        out = model(torch.empty(5, channels, size, size))
    assert out.shape == (5, dim) and model.dim == dim and out.device.type == 'meta'

@pytest.mark.parametrize('make,size,dim', BACKBONES)
def test_fake_tensors(make, size, dim):
    with FakeTensorMode():
        model = ClusteringModel(make(in_channels=1), 7, 3)
        assert model(torch.empty(2, 1, size, size)).shape == (3, 2, 7)
        model = ContrastiveModel(make(in_channels=1))
        assert model(torch.empty(2, 1, size, size, dtype=torch.uint8)).shape == (2, 128)

@pytest.mark.parametrize('size', [1, 2, 7, 8, 9, 16, 31, 33])
def test_small_resnet_takes_any_size(size):
    for stride in (1, 2):
        model = small_resnet(widths=(2, 3, 4), stem_stride=stride).eval()
        assert model(torch.rand(2, 1, size, size + 3)).shape == (2, 4)

def stage_sizes(model, size):
    sizes = []
    def keep(module, args, out): sizes.append(tuple(out.shape[1:]))
    hooks = [getattr(model, f'layer{i+1}').register_forward_hook(keep) for i in range(model.n_stages)]
    with torch.no_grad(): model.eval()(torch.rand(1, model.conv1.in_channels, size, size))
    for h in hooks: h.remove()
    return sizes

def test_stage_resolutions():
    assert stage_sizes(small_resnet(), 8) == [(32, 8, 8), (64, 4, 4), (128, 2, 2), (256, 1, 1)]
    half = small_resnet(stem_stride=2)
    assert stage_sizes(half, 28) == [(32, 14, 14), (64, 7, 7), (128, 4, 4), (256, 2, 2)]
    assert stage_sizes(resnet18_cifar(), 32) == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert stage_sizes(resnet18_stl(), 96) == [(64, 49, 49), (128, 25, 25), (256, 13, 13), (512, 7, 7)]
    assert stage_sizes(resnet50(), 64) == [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]

def test_stl_global_pooling_is_the_7x7_pooling_at_96_pixels():
    model = randomize(resnet18_stl()).eval()
    maps = []
    model.layer4.register_forward_hook(lambda m, i, o: maps.append(o))
    with torch.no_grad(): out = model(torch.rand(2, 3, 96, 96))
    torch.testing.assert_close(out, F.avg_pool2d(maps[0], 7).flatten(1))

@pytest.mark.parametrize('channels', [1, 3])
def test_resnet50_is_torchvisions(channels):
    ref = randomize(without_fc(torchvision.models.resnet50(weights=None)))
    if channels == 1: ref.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model = resnet50(channels)
    assert list(model.state_dict()) == list(ref.state_dict())
    model.load_state_dict(ref.state_dict(), strict=True)
    x = torch.randn(2, channels, 70, 64)
    with torch.no_grad(): torch.testing.assert_close(model.eval()(x), ref.eval()(x), rtol=0, atol=0)

def test_resnet18_stl_is_torchvisions_with_another_stem_and_names():
    ref = randomize(without_fc(torchvision.models.resnet18(weights=None)))
    ref.conv1, ref.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.MaxPool2d(2, 2, 1)
    model = resnet18_stl()
    model.load_state_dict({k.replace('downsample', 'shortcut'): v for k, v in ref.state_dict().items()})
    x = torch.randn(2, 3, 48, 48)
    model.train(), ref.train()
    a, b = model(x), ref(x)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    a.square().sum().backward(), b.square().sum().backward()
    for p, q in zip(model.parameters(), ref.parameters()): torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(model.buffers(), ref.buffers()): torch.testing.assert_close(p, q)

def test_resnet18_cifar_is_torchvisions_with_another_stem_and_names():
    ref = randomize(without_fc(torchvision.models.resnet18(weights=None)))
    ref.conv1, ref.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model = resnet18_cifar()
    model.load_state_dict({k.replace('downsample', 'shortcut'): v for k, v in ref.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(model.eval()(x), ref.eval()(x), rtol=0, atol=0)

@pytest.mark.parametrize('make', [resnet18_cifar, resnet18_stl])
def test_resnet18_parameter_names(make):
    names = set(make().state_dict())
    norm = 'weight bias running_mean running_var num_batches_tracked'.split()
    expected = {'conv1.weight'} | {f'bn1.{n}' for n in norm}
    for i in range(1, 5):
        for j in range(2):
            for k in (1, 2):
                expected |= {f'layer{i}.{j}.conv{k}.weight'} | {f'layer{i}.{j}.bn{k}.{n}' for n in norm}
        if i > 1: expected |= {f'layer{i}.0.shortcut.0.weight'} | {f'layer{i}.0.shortcut.1.{n}' for n in norm}
    assert names == expected
    assert isinstance(make().avgpool, nn.AdaptiveAvgPool2d)

@pytest.mark.parametrize('c_in,width,stride', [(8, 8, 1), (8, 16, 2), (8, 8, 2), (8, 16, 1)])
@pytest.mark.parametrize('skip', ['shortcut', 'downsample'])
def test_blocks_against_torchvision(c_in, width, stride, skip):
    from torchvision.models import resnet
    for block, ref_block in [(BasicBlock, resnet.BasicBlock), (Bottleneck, resnet.Bottleneck)]:
        c_out, down = width * block.expansion, None
        if stride > 1 or c_in != c_out:
            down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        ref = randomize(ref_block(c_in, width, stride, down))
        ours = block(c_in, width, stride, skip)
        ours.load_state_dict({k.replace('downsample', skip): v for k, v in ref.state_dict().items()})
        x = torch.randn(3, c_in, 9, 7)
        torch.testing.assert_close(ours.train()(x), ref.train()(x), rtol=0, atol=0)
        torch.testing.assert_close(ours.eval()(x), ref.eval()(x), rtol=0, atol=0)

def test_initial_weights_have_the_variance_of_he():
    for m in resnet18_cifar().modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 10_000:
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            assert abs(m.weight.std() / (2 / fan_out)**.5 - 1) < .05
            assert m.bias is None

def test_same_seed_same_model():
    def make():
        torch.manual_seed(3)
        return ClusteringModel(tiny(), 5, 2).state_dict()
    a, b = make(), make()
    assert all(torch.equal(a[k], b[k]) for k in a)

# -- eval mode for a while --

def test_evaluating_restores_every_mode():
    model = ClusteringModel(tiny(), 3)
    model.train()
    model.backbone.bn1.eval()
    before = [m.training for m in model.modules()]
    with evaluating(model, nn.ReLU()): assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(KeyError):
        with evaluating(model): raise KeyError
    assert [m.training for m in model.modules()] == before
    with evaluating(): pass

# -- feature_dim --

def test_feature_dim():
    assert feature_dim(tiny(), torch.rand(1, 8, 8)) == 8
    assert feature_dim(nn.Sequential(nn.Flatten(), nn.Linear(48, 11)), torch.rand(2, 3, 4, 4)) == 11
    vision = without_fc(torchvision.models.resnet18(weights=None))
    assert feature_dim(vision, torch.rand(3, 32, 32)) == 512

def test_feature_dim_changes_nothing():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    feature_dim(model, torch.rand(1, 8, 8))     # one image: batch norm would raise in train mode at 1×1
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

class Two(nn.Module):
    def forward(self, x): return x, x

class First(nn.Module):
    def forward(self, x): return x.flatten(1)[:1]

@pytest.mark.parametrize('bad', [nn.Conv2d(1, 4, 3), nn.Flatten(0), Two(), First()])
def test_feature_dim_refuses(bad):
    with pytest.raises(UserError, match='B×D'): feature_dim(bad, torch.rand(2, 1, 8, 8))

def test_heads_need_a_dim():
    backbone = nn.Flatten()
    for make in (lambda: ContrastiveModel(backbone), lambda: ClusteringModel(backbone, 3)):
        with pytest.raises(UserError, match='Flatten has no feature size `dim`.*feature_dim'): make()
    backbone.dim = feature_dim(backbone, torch.rand(1, 4, 4))
    assert ClusteringModel(backbone, 3)(torch.rand(2, 1, 4, 4)).shape == (1, 2, 3)

def test_dim_in_the_wrong_form():
    backbone = nn.Flatten()
    for bad in ('16', 0, -1, 2.5, None):
        backbone.dim = bad
        with pytest.raises(UserError): ContrastiveModel(backbone)

# -- contrastive model --

def test_projection_head_names_and_numbers():
    model = ContrastiveModel(tiny(), dim=5)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items() if 'head' in k} == {
        'contrastive_head.0.weight': (8, 8), 'contrastive_head.0.bias': (8,),
        'contrastive_head.2.weight': (5, 8), 'contrastive_head.2.bias': (5,)}
    assert set(k.split('.')[0] for k in model.state_dict()) == {'backbone', 'contrastive_head'}
    x, sd = torch.rand(6, 1, 8, 8), model.state_dict()
    h = model.eval().embed(x)
    z = F.linear(F.linear(h, sd['contrastive_head.0.weight'], sd['contrastive_head.0.bias']).relu(),
                 sd['contrastive_head.2.weight'], sd['contrastive_head.2.bias'])
    torch.testing.assert_close(model(x), z / z.norm(dim=1, keepdim=True))
    assert model(x).dtype == torch.float32

def test_linear_projection():
    model = ContrastiveModel(tiny(), projection='linear', dim=5).eval()
    assert isinstance(model.contrastive_head, nn.Linear) and model(torch.rand(2, 1, 8, 8)).shape == (2, 5)

def test_unknown_projection():
    with pytest.raises(UserError, match="'mlp' or 'linear', not 'MLP'"): ContrastiveModel(tiny(), 'MLP')

def test_unit_vectors_even_in_bfloat16():
    model = ContrastiveModel(tiny()).eval()
    with torch.autocast('cpu', torch.bfloat16): z = model(torch.rand(4, 1, 8, 8))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)

# -- normalization inside --

@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('make', [lambda b, n: ContrastiveModel(b, normalize=n),
                                  lambda b, n: ClusteringModel(b, 3, normalize=n)])
def test_uint8_and_float_images_agree(make, channels):
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    mean, std = [.4]*channels, [.2]*channels
    for normalize in (None, Normalize(mean, std)):
        model = make(tiny(channels), normalize).eval()
        torch.testing.assert_close(model(images), model(images.float()/255))
        x = images.float()/255 if normalize is None else (images.float()/255 - .4)/.2
        torch.testing.assert_close(model.embed(images), model.backbone(x), rtol=1e-4, atol=1e-5)

def test_a_saved_model_carries_its_normalization():
    model = ClusteringModel(tiny(), 3, normalize=Normalize([.4], [.2])).eval()
    other = ClusteringModel(tiny(), 3, normalize=Normalize([0.], [1.])).eval()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)

# -- cluster heads --

def as_linears(heads):
    out = []
    for w, b in zip(heads.weight.data, heads.bias.data):
        lin = nn.Linear(*w.shape)
        lin.weight.data, lin.bias.data = w.T.contiguous(), b[0].clone()
        out.append(lin)
    return out

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.integers(1, 8), st.integers(0, 6))
def test_heads_equal_a_loop_of_linears(n_heads, dim, n_clusters, n):
    heads = ClusterHeads(dim, n_clusters, n_heads).double()
    z = torch.randn(n, dim, dtype=torch.float64)
    out = heads(z)
    assert out.shape == (n_heads, n, n_clusters)
    torch.testing.assert_close(out, torch.stack([lin(z) for lin in as_linears(heads)]))

def test_gradients_equal_those_of_the_loop():
    heads, z = ClusterHeads(7, 4, 3).double(), torch.randn(5, 7, dtype=torch.float64)
    target = torch.randint(0, 4, (5,))
    linears = as_linears(heads)
    sum(F.cross_entropy(logits, target) for logits in heads(z)).backward()
    sum(F.cross_entropy(lin(z), target) for lin in linears).backward()
    for i, lin in enumerate(linears):
        torch.testing.assert_close(heads.weight.grad[i], lin.weight.grad.T)
        torch.testing.assert_close(heads.bias.grad[i, 0], lin.bias.grad)

def test_head_shapes_and_range_of_the_start():
    heads = ClusterHeads(64, 10, 5)
    assert heads.weight.shape == (5, 64, 10) and heads.bias.shape == (5, 1, 10)
    for p in heads.parameters(): assert p.abs().max() <= 1/8
    assert abs(heads.weight.std() * 8 * 3**.5 - 1) < .05             # uniform on ±1/√64
    assert not torch.equal(heads.weight[0], heads.weight[1])

@pytest.mark.parametrize('args', [(8, 0), (0, 3), (8, 3, 0), (8, -1, 2)])
def test_heads_refuse_empty_shapes(args):
    with pytest.raises(UserError, match='must be ≥ 1'): ClusterHeads(*args)

def test_clustering_model():
    model = ClusteringModel(tiny(), 6, n_heads=4).eval()
    x = torch.rand(3, 1, 8, 8)
    assert model(x).shape == (4, 3, 6) and model.embed(x).shape == (3, 8)
    torch.testing.assert_close(model(x), model.cluster_head(model.embed(x)))
    p = model.predict_proba(x)
    assert p.shape == (3, 6) and not p.requires_grad
    torch.testing.assert_close(p, torch.softmax(model(x)[0], 1))
    torch.testing.assert_close(p.sum(1), torch.ones(3))

@pytest.mark.parametrize('head', [0, 2, 3])
def test_select(head):
    model = ClusteringModel(tiny(), 6, n_heads=4).eval()
    x = torch.rand(3, 1, 8, 8)
    before, many = model(x), model.cluster_head
    assert model.select(head) is model
    assert model.cluster_head.weight.shape == (1, 8, 6) and model.cluster_head.bias.shape == (1, 1, 6)
    torch.testing.assert_close(model(x), before[head:head+1])
    assert model.cluster_head.weight.requires_grad
    model.cluster_head.weight.data.zero_()                           # a copy: the others are untouched
    assert many.weight[head].abs().sum() > 0

@pytest.mark.parametrize('head', [-1, 4])
def test_select_refuses(head):
    model = ClusteringModel(tiny(), 6, n_heads=4)
    with pytest.raises(UserError, match='heads are 0 to 3'): model.select(head)
    assert model.cluster_head.weight.shape[0] == 4

def test_select_keeps_dtype():
    heads = ClusterHeads(4, 3, 2).double()
    assert select_head(heads, 1).weight.dtype == torch.float64

def test_side_by_side_is_each_alone():
    parts = [randomize(tiny()), randomize(small_resnet(1, (8, 16, 24)))]
    pair, x = SideBySide(*parts).eval(), torch.rand(5, 1, 8, 8)
    z = pair(x)
    assert z.shape == (5, pair.dim) == (5, 8 + 24)
    for part, own in zip(parts, z.split([8, 24], 1)):
        alone = part.eval()(x)
        torch.testing.assert_close(own, alone/alone.square().sum(1, keepdim=True).sqrt())
    with pytest.raises(UserError, match='no feature size `dim`'): SideBySide(tiny(), nn.Flatten())

def test_models_copy_and_round_trip(tmp_path):
    model = ClusteringModel(tiny(), 6, n_heads=2, normalize=Normalize([.5], [.5])).eval()
    x = torch.rand(3, 1, 8, 8)
    torch.save(model.state_dict(), tmp_path/'m.pt')
    other = copy.deepcopy(model)
    for p in other.parameters(): p.data.zero_()
    other.load_state_dict(torch.load(tmp_path/'m.pt', weights_only=True))
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)

@pytest.mark.parametrize('make', [lambda: ContrastiveModel(tiny()), lambda: ClusteringModel(tiny(), 3, 2)])
def test_every_parameter_learns(make):
    model = make()
    out = model(torch.rand(8, 1, 8, 8))
    (out * torch.randn(out.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
