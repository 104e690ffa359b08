"Files in the layout of SCAN's authors, written from names and shapes listed here; and files that are wrong."
import copy
import json
import random
import struct
import sys

import numpy as np
import pytest, torch
import torchvision
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from scan_nb.augment import Normalize
from scan_nb.checkpoints import (join_heads, load_weights, make_backbone, official_state, read_weights,
                                 split_heads)
from scan_nb.data import UserError
from scan_nb.models import (ClusteringModel, ContrastiveModel, resnet18_cifar, resnet18_stl, resnet50,
                            small_resnet)

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)

# -- the layout, listed apart from the code --

def norm(name, width):
    yield from ((f'{name}.{part}', (width,)) for part in ('weight', 'bias', 'running_mean', 'running_var'))
    yield f'{name}.num_batches_tracked', ()

def basic_resnet(widths, blocks, channels, stem=64):
    "Names and shapes of a ResNet of basic blocks with a 3×3 stem and shortcuts called `shortcut`."
    yield 'conv1.weight', (stem, channels, 3, 3)
    yield from norm('bn1', stem)
    before = stem
    for i, width in enumerate(widths):
        for j in range(blocks):
            at = f'layer{i+1}.{j}'
            yield f'{at}.conv1.weight', (width, before, 3, 3)
            yield from norm(f'{at}.bn1', width)
            yield f'{at}.conv2.weight', (width, width, 3, 3)
            yield from norm(f'{at}.bn2', width)
            if before != width:
                yield f'{at}.shortcut.0.weight', (width, before, 1, 1)
                yield from norm(f'{at}.shortcut.1', width)
            before = width

def torchvision_resnet50():
    with torch.device('meta'): net = torchvision.models.resnet50(weights=None)
    return [(name, tuple(v.shape)) for name, v in net.state_dict().items() if not name.startswith('fc.')]

RESNET18 = list(basic_resnet((64, 128, 256, 512), 2, 3))
SMALL = list(basic_resnet((8, 16), 1, 3, stem=8))
FAMILY = {'resnet18_cifar': (resnet18_cifar, 512, RESNET18), 'resnet18_stl': (resnet18_stl, 512, RESNET18),
          'resnet50': (resnet50, 2048, torchvision_resnet50()),
          'small_resnet': (lambda: small_resnet(3, (8, 16)), 16, SMALL)}
family = pytest.mark.parametrize('make,dim,names', FAMILY.values(), ids=FAMILY)

def fill(names):
    "A state dict of these shapes with numbers that batch norm can bear."
    def number(name, shape):
        if name.endswith('num_batches_tracked'): return torch.tensor(7)
        value = torch.randn(shape)*(.5/max(1, shape[0]))**.5
        return value.abs() + .5 if name.endswith('running_var') else value
    return {name: number(name, shape) for name, shape in names}

def pretext_file(names, dim, head='mlp', d=128):
    layers = {'contrastive_head.0': (dim, dim), 'contrastive_head.2': (d, dim)} if head == 'mlp' else \
             {'contrastive_head': (d, dim)}
    heads = [(f'{k}.{part}', shape[:n])
             for k, shape in layers.items() for part, n in (('weight', 2), ('bias', 1))]
    return fill([(f'backbone.{k}', shape) for k, shape in names] + heads)

def cluster_file(names, dim, n_clusters=10, n_heads=1):
    heads = [(f'cluster_head.{i}.{part}', (n_clusters, dim)[:n])
             for i in range(n_heads) for part, n in (('weight', 2), ('bias', 1))]
    return fill([(f'backbone.{k}', shape) for k, shape in names] + heads)

def linear(state, name, x): return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])

def within(state): return {k[len('backbone.'):]: v for k, v in state.items() if k.startswith('backbone.')}

def save(content, path, **options):
    torch.save(content, path, **options)
    return path

def tiny(n_clusters=5, n_heads=1, normalize=None):
    return ClusteringModel(small_resnet(3, (8, 16)), n_clusters, n_heads, normalize).eval()

def tiny_file(n_heads=1, n_clusters=5): return cluster_file(SMALL, 16, n_clusters, n_heads)

def holds(model, state):
    "Each tensor of the file arrived, and there is nothing else but the normalization."
    mine = split_heads(model.state_dict())
    assert {k for k in mine if not k.startswith('normalize.')} == state.keys()
    for k, v in state.items(): torch.testing.assert_close(mine[k], v, rtol=0, atol=0, msg=k)

# -- every backbone --

@family
@pytest.mark.parametrize('head', ['mlp', 'linear'])
@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s}], ids=['raw', 'wrapped'])
def test_pretext_files_load(make, dim, names, head, wrap, tmp_path):
    state = pretext_file(names, dim, head)
    holds(load_weights(ContrastiveModel(make(), head), save(wrap(state), tmp_path/'model.pth.tar')), state)

@family
def test_scan_files_load(make, dim, names, tmp_path):
    state = cluster_file(names, dim, n_heads=3)
    file = save({'model': state, 'head': np.int64(1)}, tmp_path/'model.pth.tar')
    holds(load_weights(ClusteringModel(make(), 10, 3), file), state)
    one, z = load_weights(ClusteringModel(make(), 10), file).cluster_head, torch.randn(4, dim)
    torch.testing.assert_close(one(z)[0], linear(state, 'cluster_head.1', z), rtol=1e-4, atol=1e-4)

@family
def test_selflabel_files_load(make, dim, names):
    state = cluster_file(names, dim, n_clusters=20)
    holds(load_weights(ClusteringModel(make(), 20), state), state)

@family
def test_ours_is_written_in_their_layout(make, dim, names):
    expected = {f'backbone.{k}': shape for k, shape in names}
    with torch.device('meta'): models = ContrastiveModel(make()), ClusteringModel(make(), 10, 2)
    for model in models: model.to_empty(device='cpu')
    pretext, scan = map(official_state, models)
    heads = {f'contrastive_head.{i}.{part}': shape for i, out in ((0, dim), (2, 128))
             for part, shape in (('weight', (out, dim)), ('bias', (out,)))}
    assert {k: tuple(v.shape) for k, v in pretext.items()} == expected | heads
    heads = {f'cluster_head.{i}.{part}': shape for i in (0, 1)
             for part, shape in (('weight', (10, dim)), ('bias', (10,)))}
    assert {k: tuple(v.shape) for k, v in scan['model'].items()} == expected | heads and scan['head'] == 0

# -- numbers --

def basic_forward(state, x, pool=None):
    "ResNet-18 in eval mode from the names of a state dict alone."
    def conv(name, x, stride=1):
        w = state[f'{name}.weight']
        return F.conv2d(x, w, stride=stride, padding=w.shape[-1]//2)
    def bn(name, x):
        mean, var, weight, bias = (state[f'{name}.{part}'][:, None, None]
                                   for part in ('running_mean', 'running_var', 'weight', 'bias'))
        return (x - mean)/(var + 1e-5).sqrt()*weight + bias
    h = bn('bn1', conv('conv1', x)).relu()
    if pool: h = pool(h)
    for i in range(4):
        for j in range(2):
            at, stride = f'layer{i+1}.{j}', 2 if i and not j else 1
            out = bn(f'{at}.bn1', conv(f'{at}.conv1', h, stride)).relu()
            out = bn(f'{at}.bn2', conv(f'{at}.conv2', out))
            if f'{at}.shortcut.0.weight' in state:
                h = bn(f'{at}.shortcut.1', conv(f'{at}.shortcut.0', h, stride))
            h = (out + h).relu()
    return h

def test_cifar_numbers():
    state, x = cluster_file(RESNET18, 512), torch.rand(2, 3, 32, 32)
    model = ClusteringModel(resnet18_cifar(), 10, normalize=Normalize([.5]*3, [.2]*3))
    load_weights(model, state).eval()
    h = basic_forward(within(state), (x - .5)/.2).mean((2, 3))
    assert h.std() > .01
    with torch.no_grad():
        torch.testing.assert_close(model.embed(x), h, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x)[0], linear(state, 'cluster_head.0', h), rtol=1e-4, atol=1e-4)

def test_stl_numbers():
    state, x = pretext_file(RESNET18, 512), torch.rand(2, 3, 96, 96)
    model = load_weights(ContrastiveModel(resnet18_stl()), state).eval()
    inner = within(state)
    h = F.avg_pool2d(basic_forward(inner, x, lambda h: F.max_pool2d(h, 2, 2, 1)), 7, 1).flatten(1)
    assert h.std() > .01
    with torch.no_grad(): torch.testing.assert_close(model.embed(x), h, rtol=1e-4, atol=1e-5)
    ref = torchvision.models.resnet18(weights=None)
    ref.conv1, ref.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.MaxPool2d(2, 2, 1)
    ref.fc = nn.Identity()
    ref.load_state_dict({k.replace('shortcut', 'downsample'): v for k, v in inner.items()})
    with torch.no_grad(): torch.testing.assert_close(model.embed(x), ref.eval()(x), rtol=1e-4, atol=1e-5)

def test_resnet50_numbers():
    state, x = pretext_file(FAMILY['resnet50'][2], 2048), torch.rand(2, 3, 64, 64)
    model = load_weights(ContrastiveModel(resnet50()), state).eval()
    ref = torchvision.models.resnet50(weights=None)
    ref.fc = nn.Identity()
    ref.load_state_dict(within(state))
    with torch.no_grad():
        h = ref.eval()(x)
        z = linear(state, 'contrastive_head.2', linear(state, 'contrastive_head.0', h).relu())
        assert h.std() > .01
        torch.testing.assert_close(model.embed(x), h, rtol=0, atol=0)
        torch.testing.assert_close(model(x), z/z.norm(dim=1, keepdim=True))

# -- round trips --

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 7))
def test_heads_split_and_join_exactly(n_heads, dim, n_clusters):
    state = {'backbone.w': torch.randn(2), 'cluster_head.weight': torch.randn(n_heads, dim, n_clusters),
             'cluster_head.bias': torch.randn(n_heads, 1, n_clusters)}
    split = split_heads(state)
    shapes = {f'cluster_head.{i}.weight': (n_clusters, dim) for i in range(n_heads)}
    shapes |= {f'cluster_head.{i}.bias': (n_clusters,) for i in range(n_heads)} | {'backbone.w': (2,)}
    assert {k: tuple(v.shape) for k, v in split.items()} == shapes
    back = join_heads(split)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)

@pytest.mark.parametrize('n_heads', [1, 3, 11])
@pytest.mark.parametrize('normalize', [None, Normalize([.4]*3, [.3]*3)])
def test_clustering_round_trip(n_heads, normalize, tmp_path):
    model, other = tiny(5, n_heads, normalize), tiny(5, n_heads, copy.deepcopy(normalize))
    best = n_heads - 1
    file = save(official_state(model, best), tmp_path/'m.pth.tar')
    assert load_weights(other, file) is other
    for k, v in model.state_dict().items(): assert torch.equal(other.state_dict()[k], v), k
    again = official_state(other, best)
    assert again['head'] == best and type(again['head']) is int
    assert all(torch.equal(again['model'][k], v) for k, v in read_weights(file)['model'].items())
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(load_weights(tiny(5, 1, normalize), file)(x)[0], model(x)[best])

@pytest.mark.parametrize('projection', ['mlp', 'linear'])
def test_contrastive_round_trip(projection, tmp_path):
    model, other = (ContrastiveModel(small_resnet(3, (8, 16)), projection, 32) for _ in range(2))
    load_weights(other, save(official_state(model), tmp_path/'m.pth.tar'))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())

def test_written_tensors_are_copies():
    model = tiny()
    state = official_state(model)['model']
    before = {k: v.clone() for k, v in state.items()}
    for p in model.parameters(): p.data.zero_()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert all(v.is_contiguous() and not v.requires_grad for v in state.values())

def test_without_a_head_it_is_a_plain_state_dict():
    state = official_state(tiny(), head=None)
    assert all(isinstance(v, torch.Tensor) for v in state.values()) and 'cluster_head.0.bias' in state

@pytest.mark.parametrize('head', [-1, 2, '1x'])
def test_no_such_head_to_write(head):
    with pytest.raises(UserError, match=f'no head {head}: the heads are 0 to 1'):
        official_state(tiny(5, 2), head)

@pytest.mark.parametrize('many', [1, 4])
def test_our_own_files_load(many, tmp_path):
    model, other = (tiny(5, many, Normalize([m]*3, [.3]*3)) for m in (.4, .6))
    save_file(model.state_dict(), tmp_path/'model.safetensors')
    load_weights(other, tmp_path/'model.safetensors')
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    load_weights(tiny(5, many, Normalize([0]*3, [1]*3)), save(model.state_dict(), tmp_path/'model.pt'))

# -- what may stand around the weights --

def test_a_checkpoint_of_several_gpus_loads(tmp_path):
    state = tiny_file(3)
    content = {'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-4}]}, 'epoch': 12,
               'best_loss': np.float64(-9.5), 'best_loss_head': np.int64(2),
               'model': {f'module.{k}': v for k, v in state.items()}}
    file = save(content, tmp_path/'checkpoint.pth.tar')
    holds(load_weights(tiny(5, 3), file), state)
    assert torch.equal(load_weights(tiny(), file).cluster_head.bias[0, 0], state['cluster_head.2.bias'])

def test_numpy_numbers_are_read(tmp_path):
    for n, number in enumerate([np.int64(3), np.int32(3), np.float64(.5), np.float32(.5)]):
        assert read_weights(save({'head': number}, tmp_path/f'{n}.pth.tar'))['head'] == number

@pytest.mark.parametrize('new', [True, False], ids=['zip', 'before PyTorch 1.6'])
def test_files_of_old_numpy_and_old_pytorch_load(new, tmp_path):
    state, file = tiny_file(3), tmp_path/'old.pth.tar'
    save({'model': state, 'head': np.int64(2)}, file, _use_new_zipfile_serialization=new)
    if not new:
        content, names = file.read_bytes(), (b'numpy._core.multiarray', b'numpy.core.multiarray')
        file.write_bytes(content.replace(*names))
        assert names[1] in file.read_bytes()
    assert torch.equal(load_weights(tiny(), file).cluster_head.bias[0, 0], state['cluster_head.2.bias'])

@pytest.mark.parametrize('head', [2, np.int64(2), np.int32(2), torch.tensor(2)])
def test_any_integer_names_the_head(head):
    state = tiny_file(3)
    model = load_weights(tiny(), {'model': state, 'head': head})
    assert torch.equal(model.cluster_head.weight[0], state['cluster_head.2.weight'].T)

def test_a_file_with_only_the_best_of_ten_heads():
    state = {k.replace('cluster_head.0', 'cluster_head.7'): v for k, v in tiny_file().items()}
    model = load_weights(tiny(), {'model': state, 'head': 7})
    assert torch.equal(model.cluster_head.weight[0], state['cluster_head.7.weight'].T)

def test_half_precision_weights_load():
    state = {k: v.half() if v.is_floating_point() else v for k, v in tiny_file().items()}
    model = load_weights(tiny(), state)
    assert model.cluster_head.weight.dtype == torch.float32

# -- backbone alone --

def test_scan_starts_from_the_pretext_backbone():
    state, model = pretext_file(SMALL, 16), tiny(5, 4, Normalize([.4]*3, [.3]*3))
    before = copy.deepcopy(model.state_dict())
    assert load_weights(model, {'model': state, 'epoch': 500}, backbone_only=True) is model
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k] if k.startswith('backbone.') else before[k]), k

def test_backbone_only_is_strict_about_the_backbone():
    state = pretext_file(SMALL, 16)
    del state['backbone.layer2.0.conv1.weight']
    with pytest.raises(UserError, match="it has no 'backbone.layer2.0.conv1.weight';"):
        load_weights(tiny(), state, backbone_only=True)
    with pytest.raises(UserError, match="it has no 'backbone.conv1.weight'"):
        load_weights(tiny(), {'encoder.weight': torch.zeros(2)}, backbone_only=True)

# -- refused, and the model left as it was --

def refuse(model, weights, match, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=match) as e: load_weights(model, weights, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str(e.value).endswith('.') and '\n' not in str(e.value)
    return str(e.value)

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_one_fault_is_named(data):
    state = tiny_file(2)
    name = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(['missing', 'renamed', 'shape']))
    value = state.pop(name)
    if kind == 'renamed': state[f'{name}_x'] = value
    if kind == 'shape': state[name] = value.new_zeros((*value.shape, 2))
    message = refuse(tiny(5, 2), state, 'does not fit the model')
    assert (f"'{name}'" in message) and (f"'{name}_x'" in message) == (kind == 'renamed')
    shapes = f'{(*value.shape, 2)} there and {tuple(value.shape)} in the model'
    assert (shapes in message) == (kind == 'shape')

def test_first_fault_of_each_kind_is_named():
    state = cluster_file(torchvision_resnet50(), 2048)
    message = refuse(ClusteringModel(resnet18_cifar(), 10), state, 'does not fit')
    assert "it has no 'backbone.layer1.0." not in message
    assert "it has no 'backbone.layer2.0.shortcut.0.weight', " in message
    assert "the model has no 'backbone.layer1.0.conv3.weight', " in message
    assert "'backbone.conv1.weight' is (64, 3, 7, 7) there and (64, 3, 3, 3) in the model" in message

def test_other_channels_are_refused():
    refuse(ClusteringModel(small_resnet(1, (8, 16)), 5), tiny_file(),
           r"'backbone.conv1.weight' is \(8, 3, 3, 3\) there and \(8, 1, 3, 3\) in the model; make the model")

def test_other_clusters_are_refused():
    refuse(tiny(7), tiny_file(), r"'cluster_head.0.weight' is \(5, 16\) there and \(7, 16\) in the model")

def test_pretext_in_a_clustering_model_is_refused_with_the_remedy():
    refuse(tiny(), pretext_file(SMALL, 16), "it has no 'cluster_head.0.weight', the model has no "
           "'contrastive_head.0.weight'.*backbone_only=True")

def test_linear_and_mlp_heads_are_told_apart():
    refuse(ContrastiveModel(small_resnet(3, (8, 16))), pretext_file(SMALL, 16, 'linear'),
           "no 'contrastive_head.0.weight', the model has no 'contrastive_head.weight'")

def test_a_classifier_that_no_backbone_has_is_refused():
    state = tiny_file() | {'backbone.fc.weight': torch.zeros(9, 16)}
    refuse(tiny(), state, "the model has no 'backbone.fc.weight'")

def test_normalization_that_the_model_lacks_is_refused():
    state = tiny(normalize=Normalize([.4]*3, [.3]*3)).state_dict()
    refuse(tiny(), state, "the model has no 'normalize.mean'")

@pytest.mark.parametrize('head', [None, 3, -1, 'best'])
def test_a_best_head_that_is_not_there(head):
    refuse(tiny(), {'model': tiny_file(3), 'head': head},
           f"has 3 cluster heads, and its 'head' is {head}: .* make the model with n_heads=3")

def test_too_few_heads_are_named():
    refuse(tiny(5, 4), {'model': tiny_file(3), 'head': 1}, "it has no 'cluster_head.3.weight'")

@pytest.mark.parametrize('weights', [{}, {'model': {}}, {'model': 3}, {'epoch': 3}, {'backbone.w': [1., 2.]},
                                     {0: torch.zeros(2)}, {'model': None}])
def test_dicts_without_weights(weights): refuse(tiny(), weights, 'The dict of weights holds no weights')

def test_odd_shapes_of_heads_are_refused():
    for shape in ((), (5,), (16, 5), (1, 1, 16, 5)):
        refuse(tiny(), tiny().state_dict() | {'cluster_head.weight': torch.zeros(shape)}, "'cluster_head.")

# -- files that are none --

def bad(file, match='is damaged, or holds more'):
    with pytest.raises(UserError, match=match) as e: read_weights(file)
    assert str(file) in str(e.value)
    with pytest.raises(UserError, match=match): load_weights(tiny(), str(file))

def test_missing_file_and_folder(tmp_path):
    bad(tmp_path/'none.pth.tar', 'There is no file')
    bad(tmp_path, 'There is no file')

@pytest.mark.parametrize('new', [True, False], ids=['zip', 'before PyTorch 1.6'])
def test_truncated_anywhere(new, tmp_path):
    file = save({'model': tiny_file(3), 'head': np.int64(2)}, tmp_path/'m.pth.tar',
                _use_new_zipfile_serialization=new)
    content, draw = file.read_bytes(), random.Random(0)
    for length in (0, 1, 100, len(content)-1, *(draw.randrange(len(content)) for _ in range(12))):
        file.write_bytes(content[:length])
        bad(file)

def test_a_flipped_bit_in_the_numbers_is_found(tmp_path):
    state = tiny_file()
    file = save({'model': state}, tmp_path/'m.pth.tar')
    content, numbers = bytearray(file.read_bytes()), state['backbone.layer2.0.conv2.weight'].numpy().tobytes()
    content[content.index(numbers) + 100] ^= 1
    file.write_bytes(content)
    bad(file)

class Program:
    "Unpickled, it would call a function."
    def __reduce__(self): return sys.exit, (1,)

@pytest.mark.parametrize('new', [True, False])
def test_no_code_runs(new, tmp_path):
    content = {'model': tiny_file(), 'args': Program()}
    bad(save(content, tmp_path/'m.pth.tar', _use_new_zipfile_serialization=new))

def test_objects_of_numpy_stay_out(tmp_path):
    before = torch.serialization.get_safe_globals()
    bad(save({'model': np.zeros(3)}, tmp_path/'m.pth.tar'))
    assert set(torch.serialization.get_safe_globals()) == set(before)

@pytest.mark.parametrize('content', [b'', b'weights', b'\x80\x02.', b'PK\x03\x04' + bytes(50), b'<html>404'])
@pytest.mark.parametrize('name', ['m.pth.tar', 'm.pt', 'm.safetensors'])
def test_other_files(content, name, tmp_path):
    (tmp_path/name).write_bytes(content)
    bad(tmp_path/name)

def test_a_lying_safetensors_header(tmp_path):
    header = json.dumps({'w': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}).encode()
    (tmp_path/'m.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + bytes(8))
    bad(tmp_path/'m.safetensors')

@pytest.mark.parametrize('content', [[torch.zeros(2)], torch.zeros(2), 3])
def test_a_file_that_holds_no_dict(content, tmp_path): bad(save(content, tmp_path/'m.pt'))

def test_a_file_without_weights_is_named(tmp_path):
    file = save({'epoch': 1}, tmp_path/'m.pt')
    with pytest.raises(UserError, match="'.*m.pt' holds no weights"): load_weights(tiny(), file)

# -- backbones by name --

@pytest.mark.parametrize('name,side,channels,pool,dim', [
    ('resnet18', 32, 3, False, 512), ('resnet18', 63, 1, False, 512), ('resnet18', 64, 3, True, 512),
    ('resnet18', 96, 3, True, 512), ('resnet18_cifar', 96, 3, False, 512), ('resnet18_stl', 32, 1, True, 512),
    ('resnet50', 224, 3, True, 2048), ('small_resnet', 8, 1, False, 256)])
def test_named_backbones(name, side, channels, pool, dim):
    with torch.device('meta'):
        net = make_backbone(name, channels, side)
        assert net(torch.empty(2, channels, side, side)).shape == (2, dim) and net.dim == dim
    assert isinstance(net.maxpool, nn.MaxPool2d) == pool

def test_small_resnet_takes_its_options():
    net = make_backbone('small_resnet', 1, widths=[4, 8], stem_stride=2)
    assert net.dim == 8 and net.conv1.stride == (2, 2) and net.conv1.out_channels == 4

@pytest.mark.parametrize('name,closest', [
    ('resnet81', 'resnet18'), ('ResNet50', 'resnet50'), ('resnet18_cifer', 'resnet18_cifar'),
    ('smallresnet', 'small_resnet'), ('resnet-18-stl', 'resnet18_stl'),
    ('', ''), (None, ''), (18, 'resnet18')])
def test_unknown_names_get_the_closest(name, closest):
    with pytest.raises(UserError) as e: make_backbone(name)
    assert repr(name) in str(e.value) and f"is '{closest}" in str(e.value)

def test_unknown_options_are_named():
    with pytest.raises(UserError, match="'small_resnet' has no option 'width': it has widths, stem_stride"):
        make_backbone('small_resnet', width=3)
    with pytest.raises(UserError, match="'resnet50' has no option 'pretrained': it has none"):
        make_backbone('resnet50', pretrained=True)

def test_timm_when_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match="'timm:vit' needs timm: install it with `pip install timm`"):
        make_backbone('timm:vit')

@pytest.mark.parametrize('name,options', [('resnet10t', {}), ('mobilenetv3_small_050', {}),
                                          ('vit_tiny_patch16_224', dict(img_size=32))])
def test_timm_networks(name, options):
    timm = pytest.importorskip('timm')
    net = make_backbone(f'timm:{name}', 1, 32, **options).eval()
    ref = timm.create_model(name, num_classes=0, in_chans=1, **options).eval()
    ref.load_state_dict(net.state_dict())
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert ClusteringModel(net, 4)(x).shape == (1, 2, 4) and net(x).shape == (2, net.dim)
        torch.testing.assert_close(net(x), ref(x))

@pytest.mark.parametrize('name,options,match', [
    ('resnet10', {}, "no model 'resnet10': the closest are .*resnet"),
    ('vit_tiny_patch16_224', {}, "made no 'vit_tiny_patch16_224' for images of 32 pixels with .*224"),
    ('resnet10t', {'depth': 3}, "made no 'resnet10t' .*'depth': 3")])
def test_timm_faults(name, options, match):
    pytest.importorskip('timm')
    with pytest.raises(UserError, match=match): make_backbone(f'timm:{name}', side=32, **options)
