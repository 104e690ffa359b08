"Presets and shipped files against the paper's table typed once more; YAML there and back; every fault named."
import copy
import dataclasses
import math
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from run_notebooks import ROOT
from scan_nb.augment_fast import SimCLRAugment, StrongAugment, WeakAugment
from scan_nb.data import UserError
from scan_nb.recipes import (PAPER, PretextRecipe, ScanRecipe, SelfLabelRecipe, find_config, known_keys,
                             load_env, load_recipe, make_optimizer, make_schedule, make_views, to_yaml)

CONFIGS = ROOT/'scan_nb'/'configs'
SHIPPED = sorted(CONFIGS.glob('*/*.yml'))

# ---- the paper's table, as a reader would copy it ----------------------------------------------------------

C10 = [.4914, .4822, .4465], [.2023, .1994, .2010]
C20 = [.5071, .4867, .4408], [.2675, .2565, .2761]
INET = [.485, .456, .406], [.229, .224, .225]
DATA = {   # data: (classes, network, crop, colors, longest side of the cutout)
    'cifar-10': (10, 'resnet18', 32, C10, 16), 'cifar-20': (20, 'resnet18', 32, C20, 16),
    'stl-10': (10, 'resnet18', 96, INET, 32), 'imagenet_50': (50, 'resnet50', 224, INET, 75),
    'imagenet_100': (100, 'resnet50', 224, INET, 75), 'imagenet_200': (200, 'resnet50', 224, INET, 75),
    'imagenet': (1000, 'resnet50', 224, INET, None)}
SIMCLR = ('sgd', .4, .9, 1e-4, 500, 512, 'cosine')
MOCO = ('sgd', .03, .9, 1e-4, 800, 256, 'cosine')   # rate, momentum and decay of MoCo v2 itself
def adam(epochs, batch): return 'adam', 1e-4, None, 1e-4, epochs, batch, 'constant'
def sgd(lr, epochs, batch): return 'sgd', lr, .9, 0, epochs, batch, 'constant'
FILES = {   # file: (data, optimizer, lr, momentum, decay, epochs, batch, schedule)
    'pretext/simclr_cifar10': ('cifar-10', *SIMCLR), 'pretext/simclr_cifar20': ('cifar-20', *SIMCLR),
    'pretext/simclr_stl10': ('stl-10', *SIMCLR), 'pretext/moco_imagenet50': ('imagenet_50', *MOCO),
    'pretext/moco_imagenet100': ('imagenet_100', *MOCO), 'pretext/moco_imagenet200': ('imagenet_200', *MOCO),
    'scan/scan_cifar10': ('cifar-10', *adam(50, 128)), 'scan/scan_cifar20': ('cifar-20', *adam(100, 512)),
    'scan/scan_stl10': ('stl-10', *adam(100, 128)),
    'scan/scan_imagenet_50': ('imagenet_50', *sgd(5, 100, 512)),
    'scan/scan_imagenet_100': ('imagenet_100', *sgd(5, 100, 1024)),
    'scan/scan_imagenet_200': ('imagenet_200', *sgd(5, 100, 1024)),
    'scan/imagenet_eval': ('imagenet', *sgd(5, 100, 4096)),   # epochs: as the subsets
    'selflabel/selflabel_cifar10': ('cifar-10', *adam(200, 1000)),
    'selflabel/selflabel_cifar20': ('cifar-20', *adam(200, 1000)),
    'selflabel/selflabel_stl10': ('stl-10', *adam(100, 1000)),
    'selflabel/selflabel_imagenet_50': ('imagenet_50', *sgd(.03, 25, 512)),
    'selflabel/selflabel_imagenet_100': ('imagenet_100', *sgd(.03, 25, 512)),
    'selflabel/selflabel_imagenet_200': ('imagenet_200', *sgd(.03, 25, 512))}
each_file = pytest.mark.parametrize('name', FILES)

JITTER = dict(random_resized_crop=dict(scale=[.2, 1]), color_jitter_random_apply=dict(p=.8),
              color_jitter=dict(brightness=.4, contrast=.4, saturation=.4, hue=.1),
              random_grayscale=dict(p=.2))
JITTER_HERE = dict(scale=(.2, 1), jitter_p=.8, brightness=.4, contrast=.4, saturation=.4, hue=.1, gray_p=.2)

def raw(name):
    "A shipped file without what means nothing here."
    content = yaml.safe_load((CONFIGS/f'{name}.yml').read_text())
    for key in ('num_workers', 'criterion'): content.pop(key, None)
    inner, size = content.get('augmentation_kwargs', {}), content['transformation_kwargs']['crop_size']
    if inner: assert inner.pop('normalize') == content['transformation_kwargs']['normalize']
    assert inner.pop('crop_size', size) == inner.get('random_resized_crop', {}).pop('size', size) == size
    if 'cutout_kwargs' in inner:
        assert [inner['cutout_kwargs'].pop(key) for key in ('n_holes', 'random')] == [1, True]
    return content

def expected_yaml(name):
    "All that a file should say, from the table alone."
    stage, data, optimizer, lr, momentum, decay, epochs, batch, schedule = name.split('/')[0], *FILES[name]
    classes, net, crop, (mean, std), length = DATA[data]
    setup = {'pretext': name[8:].partition('_')[0]}.get(stage, stage)
    moco, large = setup == 'moco', data.startswith('imagenet')
    out = dict(setup=setup, backbone=net, train_db_name=data, val_db_name=data, num_classes=classes,
               optimizer=optimizer,
               optimizer_kwargs=dict(lr=lr, weight_decay=decay), epochs=epochs, batch_size=batch,
               scheduler=schedule,
               transformation_kwargs=dict(crop_size=crop, normalize=dict(mean=mean, std=std)))
    if momentum: out['optimizer_kwargs'] |= dict(momentum=momentum, nesterov=False)
    if schedule == 'cosine': out['scheduler_kwargs'] = dict(lr_decay_rate=.1)
    if stage == 'selflabel' or stage == 'scan' and not large:
        out |= dict(augmentation_strategy='ours',
                    augmentation_kwargs=dict(num_strong_augs=4, cutout_kwargs=dict(length=length)))
    else: out |= dict(augmentation_strategy='simclr') | ({} if moco else dict(augmentation_kwargs=JITTER))
    if stage == 'pretext':
        out |= dict(model_kwargs=dict(head='mlp', features_dim=128), num_neighbors=50 if moco else 20,
                    num_neighbors_val=5)
        out |= dict(temperature=.07, pretrained='moco_v2_800ep_pretrain.pth.tar', queue_size=65536,
                    key_momentum=.999) if moco else dict(criterion_kwargs=dict(temperature=.1))
    if stage == 'scan':
        out |= dict(criterion_kwargs=dict(entropy_weight=5), num_neighbors=50 if large else 20,
                    num_heads=10 if large else 1, update_cluster_head_only=large)
    if stage == 'selflabel':
        out |= dict(confidence_threshold=.99, criterion_kwargs=dict(apply_class_balancing=not large),
                    num_heads=1,
                    use_ema=large) | (dict(ema_alpha=.999) if large else {})
    return out

def expected_fields(name):
    "All fields of the recipe, from the table alone; our own options are off."
    stage, data, optimizer, lr, momentum, decay, epochs, batch, schedule = name.split('/')[0], *FILES[name]
    classes, net, crop, (mean, std), length = DATA[data]
    large = data.startswith('imagenet')
    strong = stage == 'selflabel' or stage == 'scan' and not large
    options = dict(n_ops=4, cutout=length) if strong else {} if stage == 'pretext' and large else JITTER_HERE
    out = dict(data=data, test_data=data, n_clusters=classes, channels=None, size=crop, mean=tuple(mean),
               std=tuple(std), backbone=net, backbone_options={}, views='ours' if strong else 'simclr',
               views_options=options, optimizer=optimizer, lr=lr, momentum=momentum or .9, weight_decay=decay,
               nesterov=False, scheduler=schedule, lr_decay_rate=.1, lr_decay_epochs=(), epochs=epochs,
               batch_size=batch, seed=0, precision='bf16', compile=False)
    own = dict(
        pretext=dict(setup='moco' if large else 'simclr', head='mlp', features_dim=128,
                     temperature=.07 if large else .1,
                     warmup=0, queue_size=65536, key_momentum=.999, n_neighbors=50 if large else 20,
                     n_neighbors_val=5,
                     pretrained='moco_v2_800ep_pretrain.pth.tar' if large else None, time_window=0,
                     mutual=False,
                     n_views=0),
        scan=dict(entropy_weight=5, n_neighbors=50 if large else 20, n_heads=10 if large else 1,
                  head_only=large,
                  heads_epochs=0, prior=None, remine_every=0),
        selflabel=dict(threshold=.99, balance=not large, ema_decay=.999 if large else None, entropy_weight=0,
                       soft_targets=False))
    return out | own[stage]

@each_file
def test_a_shipped_file_says_what_the_table_says(name): assert raw(name) == expected_yaml(name)

@each_file
def test_a_preset_is_the_table(name):
    preset = getattr(PAPER[FILES[name][0]], name.partition('/')[0])
    assert dataclasses.asdict(preset) == expected_fields(name)

@each_file
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_a_file_is_its_preset(name, device):
    preset = getattr(PAPER[FILES[name][0]], name.partition('/')[0])
    assert load_recipe(f'configs/{name}.yml', device) == preset

def test_the_table_leaves_nothing_out():
    named = {str(p.relative_to(CONFIGS).with_suffix('')) for p in SHIPPED}
    aurora = {'pretext/simclr_aurora', 'pretext/moco_aurora', 'scan/scan_aurora',
              'selflabel/selflabel_aurora'}
    assert named == {*FILES, *aurora}
    assert [*PAPER] == [*DATA] and PAPER['imagenet'].selflabel is None
    typed = sum(getattr(r, s) is not None for r in PAPER.values() for s in ('pretext', 'scan', 'selflabel'))
    assert typed == len(FILES) + 1   # the features of ImageNet have no file: no stage of the authors needs it

def test_features_of_all_of_imagenet_are_those_of_its_subsets():
    fifty, every = PAPER['imagenet_50'].pretext, PAPER['imagenet'].pretext
    assert dataclasses.replace(fifty, data='imagenet', test_data='imagenet', n_clusters=1000) == every

# ---- aurora ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', [p.name for p in SHIPPED if 'aurora' in p.name])
def test_aurora_recipes_keep_what_matters_of_the_sky(name):
    there, here = load_recipe(name, 'cuda'), load_recipe(name, 'cpu')
    for r in (there, here):
        assert (r.data, r.n_clusters, r.channels, r.mean) == ('aurora', 4, 1, None)
        views = make_views(r)
        assert views.disc
        if r.views == 'simclr':
            assert views.rotation == 180 and views.hue == views.saturation == views.gray_p == 0
        if r.views == 'ours': assert not {'color', 'solarize', 'posterize', 'equalize'} & {*views.ops}
        x = views(torch.full((4, 1, r.size, r.size), 255, dtype=torch.uint8),
                  torch.Generator().manual_seed(0))
        assert x.shape == (4, 1, r.size, r.size) and x[:, :, 0, 0].max() == 0   # a corner of the mask
    assert here.backbone == 'small_resnet' and here.size < there.size and here.epochs < there.epochs
    assert 'cpu' not in to_yaml(here)

def test_aurora_stages_fit_together():
    for device in ('cpu', 'cuda'):
        pretexts = [load_recipe(f'{setup}_aurora.yml', device) for setup in ('simclr', 'moco')]
        later = [load_recipe(f'{stage}_aurora.yml', device) for stage in ('scan', 'selflabel')]
        shapes = {(r.size, r.backbone, str(r.backbone_options), r.n_clusters) for r in pretexts + later}
        assert len(shapes) == 1
        assert all(p.n_neighbors >= later[0].n_neighbors for p in pretexts)

# ---- there and back ----------------------------------------------------------------------------------------

unit, positive = st.floats(0, 1), st.floats(1e-5, 1e5)
names = st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable())
low_high = st.tuples(st.floats(.01, 1), st.floats(1, 3))
options = {
    'simclr': dict(scale=low_high, ratio=low_high, flip_p=unit, rotation=st.floats(0, 180), brightness=unit,
                   contrast=unit, saturation=unit, hue=st.floats(0, .5), jitter_p=unit, gray_p=unit,
                   blur_p=unit, tint_p=unit, strip_p=unit, erase=st.integers(0, 9), disc=st.booleans()),
    'standard': dict(scale=low_high, ratio=low_high, flip_p=unit),
    'ours': dict(n_ops=st.integers(0, 6), cutout=st.none() | st.integers(0, 9), flip_p=unit, fill=unit,
                 ops=st.just(('identity', 'rotate')), disc=st.booleans())}
stages = {
    PretextRecipe: dict(
        setup=st.sampled_from(['simclr', 'moco']), head=st.sampled_from(['mlp', 'linear']),
        features_dim=st.integers(1, 999),
        temperature=positive, warmup=unit, queue_size=st.integers(1, 10**6), key_momentum=unit,
        pretrained=st.none() | names,
        n_neighbors=st.integers(1, 99), n_neighbors_val=st.integers(1, 9), time_window=positive,
        mutual=st.booleans(),
        n_views=st.integers(0, 9)),
    ScanRecipe: dict(
        entropy_weight=positive, n_neighbors=st.integers(1, 99), n_heads=st.integers(1, 99),
        head_only=st.booleans(),
        heads_epochs=st.integers(0, 99), prior=st.sampled_from([None, 'estimate', 'shares']),
        remine_every=st.integers(0, 9)),
    SelfLabelRecipe: dict(
        threshold=st.floats(0, .999), balance=st.booleans(), ema_decay=st.none() | st.floats(0, .999),
        entropy_weight=positive, soft_targets=st.booleans())}

networks = dict(widths=st.just((8, 16)), stem_stride=st.integers(1, 2))

@st.composite
def recipes(draw):
    kind, views = draw(st.sampled_from([*stages])), draw(st.sampled_from([*options]))
    some = draw(st.fixed_dictionaries({}, optional=options[views]))
    colors = draw(st.sampled_from([None, 1, 3]))
    given = dict(
        data=draw(names), test_data=draw(st.none() | names), n_clusters=draw(st.integers(2, 9)),
        size=draw(st.integers(8, 300)),
        channels=draw(st.sampled_from([None, 1, 3])) if colors is None else colors, backbone=draw(names),
        views=views,
        views_options=some, seed=draw(st.integers(0, 2**63 - 1)),
        optimizer=draw(st.sampled_from(['sgd', 'adam'])), lr=draw(positive),
        momentum=draw(st.floats(.1, 1)), weight_decay=draw(positive), nesterov=draw(st.booleans()),
        scheduler=draw(st.sampled_from(['constant', 'cosine', 'step'])), lr_decay_rate=draw(unit),
        epochs=draw(st.integers(0, 999)),
        lr_decay_epochs=draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        batch_size=draw(st.integers(1, 9999)),
        backbone_options=draw(st.fixed_dictionaries({}, optional=networks)))
    if colors: given |= dict(mean=[draw(unit)]*colors, std=[draw(positive)]*colors)
    given |= draw(st.fixed_dictionaries(stages[kind]))
    if given.get('prior') == 'shares': given['prior'] = draw(st.tuples(*[positive]*given['n_clusters']))
    return kind(**given)

@settings(deadline=None, max_examples=80)
@given(recipe=recipes())
def test_yaml_there_and_back(recipe, tmp_path_factory):
    file = tmp_path_factory.getbasetemp()/'recipe.yml'
    file.write_text(to_yaml(recipe), encoding='utf-8')
    assert load_recipe(file) == load_recipe(file, 'cuda') == recipe
    assert to_yaml(load_recipe(file)) == to_yaml(recipe)

def test_to_yaml_speaks_the_authors_schema():
    "What the authors' own file says of CIFAR-10, our writer says in the same words."
    said = yaml.safe_load(to_yaml(PAPER['cifar-10'].scan))
    wanted = raw('scan/scan_cifar10')
    def contains(outer, inner):
        return all(contains(outer[k], v) if isinstance(v, dict) else outer[k] == v for k, v in inner.items())
    assert contains(said, wanted)

# ---- files of the authors' kind ----------------------------------------------------------------------------

GOOD = yaml.safe_load((CONFIGS/'scan/scan_cifar10.yml').read_text())

def load(tmp_path, content, device='cpu'):
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path/'my.yml').write_text(text)
    return load_recipe(tmp_path/'my.yml', device)

def changed(**changes):
    "GOOD with changes; a double underscore goes one level down, `...` deletes."
    content = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *above, last = path.split('__')
        inner = content
        for key in above: inner = inner[key]
        inner[last] = value
        if value is ...: del inner[last]
    return content

MOCO_FILE = '''
setup: moco
backbone: resnet50
model_kwargs: {head: mlp, features_dim: 128}
train_db_name: imagenet_50
val_db_name: imagenet_50
num_classes: 50
temperature: 0.07
batch_size: 256
num_workers: 8
transformation_kwargs:
  crop_size: 224
  normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
'''

def test_the_few_keys_of_a_moco_file_are_enough(tmp_path):
    paper = PAPER['imagenet_50'].pretext
    assert load(tmp_path, MOCO_FILE) == dataclasses.replace(paper, pretrained=None)

def test_the_few_keys_of_an_evaluation_file_are_enough(tmp_path):
    content = yaml.safe_load((CONFIGS/'scan/imagenet_eval.yml').read_text())
    for key in ('optimizer', 'optimizer_kwargs', 'scheduler', 'epochs', 'batch_size',
                'update_cluster_head_only'):
        del content[key]
    recipe = load(tmp_path, content)
    assert (recipe.n_clusters, recipe.n_heads, recipe.entropy_weight) == (1000, 10, 5)

@pytest.mark.parametrize('name', FILES)
def test_the_stage_is_found_without_setup(tmp_path, name):
    content = yaml.safe_load((CONFIGS/f'{name}.yml').read_text())
    del content['setup']
    assert load(tmp_path, content) == load_recipe(f'{name.partition("/")[2]}.yml')

@pytest.mark.parametrize('written,number',
                         [('1e-4', 1e-4), ('5E-2', .05), ("'0.3'", .3), ('1', 1.), ('.5', .5)])
def test_numbers_however_they_are_written(tmp_path, written, number):
    text = (CONFIGS/'scan/scan_cifar10.yml').read_text().replace('lr: 0.0001', f'lr: {written}')
    assert f'lr: {written}' in text and load(tmp_path, text).lr == number
    assert type(load(tmp_path, text).lr) is float

@pytest.mark.parametrize('use,alpha,decay', [
    (True, .9, .9), (True, ..., .999), (False, .9, None), (False, ..., None), (..., ..., None),
    (..., .9, .9)])
def test_ema(tmp_path, use, alpha, decay):
    content = yaml.safe_load((CONFIGS/'selflabel/selflabel_cifar10.yml').read_text())
    content |= dict(use_ema=use, ema_alpha=alpha)
    assert load(tmp_path, {k: v for k, v in content.items() if v is not ...}).ema_decay == decay

def test_an_empty_group_says_nothing(tmp_path):
    content = changed(scheduler_kwargs=None, augmentation_kwargs={})
    assert load(tmp_path, content) == dataclasses.replace(PAPER['cifar-10'].scan, views_options={})

def test_settings_of_other_views_mean_nothing(tmp_path):
    "A user of the authors' code may change the strategy and leave the rest."
    content = yaml.safe_load((CONFIGS/'pretext/simclr_cifar10.yml').read_text())
    recipe = load(tmp_path, content | dict(augmentation_strategy='standard'))
    assert recipe.views_options == dict(scale=(.2, 1.)) and isinstance(make_views(recipe), WeakAugment)

# ---- cpu ---------------------------------------------------------------------------------------------------

def test_cpu_goes_before_the_rest_on_a_cpu_alone(tmp_path):
    content = changed(cpu=dict(epochs=3, optimizer_kwargs=dict(lr='1e-2'), backbone='small_resnet',
                               backbone_options=dict(widths=[8]),
                               augmentation_kwargs=dict(cutout_kwargs=dict(length=4))))
    paper = PAPER['cifar-10'].scan
    assert load(tmp_path, content, 'cuda') == load(tmp_path, content, torch.device('mps')) == paper
    here = load(tmp_path, content, torch.device('cpu'))
    assert here == dataclasses.replace(paper, epochs=3, lr=.01, backbone='small_resnet',
                                       backbone_options=dict(widths=(8,)),
                                       views_options=dict(n_ops=4, cutout=4))
    assert load(tmp_path, to_yaml(here), 'cuda') == here

def test_models_of_timm_have_options_of_their_own(tmp_path):
    "Another network on a CPU does not inherit them."
    content = changed(backbone='timm:vit_tiny', backbone_options=dict(pretrained=True),
                      cpu=dict(backbone='small_resnet', backbone_options=dict(stem_stride=2)))
    large, small = load(tmp_path, content, 'cuda'), load(tmp_path, content)
    assert (large.backbone, large.backbone_options) == ('timm:vit_tiny', dict(pretrained=True))
    assert (small.backbone, small.backbone_options) == ('small_resnet', dict(stem_stride=2))
    assert load(tmp_path, to_yaml(large)) == large
    with pytest.raises(UserError, match="no backbone option 'pretrained'"):
        dataclasses.replace(large, backbone='resnet50')

@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('cpu,said', [
    (dict(epoch=3), "cpu.epoch is no key of setup scan: did you mean 'epochs'"),
    (dict(optimizer_kwargs=dict(lr=-1)), 'cpu.optimizer_kwargs.lr is -1'), (3, 'cpu is 3'),
    ([1], r'cpu is \[1\]')])
def test_a_fault_under_cpu_is_found_on_every_device(tmp_path, cpu, said, device):
    with pytest.raises(UserError, match=f"my.yml': {said}"): load(tmp_path, changed(cpu=cpu), device)

# ---- faults ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change,wrong,meant', [
    (dict(epoch=50), 'epoch', 'epochs'), (dict(batchsize=50), 'batchsize', 'batch_size'),
    (dict(optimizer_kwargs__learning_rate=1), 'optimizer_kwargs.learning_rate', None),
    (dict(optimizer_kwargs__weight_decy=1), 'optimizer_kwargs.weight_decy', 'optimizer_kwargs.weight_decay'),
    (dict(criterion_kwargs__entropy_weigth=1), 'criterion_kwargs.entropy_weigth',
     'criterion_kwargs.entropy_weight'),
    (dict(entropy_weight=1), 'entropy_weight', 'criterion_kwargs.entropy_weight'),
    (dict(n_neighbors=1), 'n_neighbors', 'num_neighbors'), (dict(lr=1), 'lr', 'optimizer_kwargs.lr'),
    (dict(views='ours'), 'views', 'augmentation_strategy'),
    (dict(augmentation_kwargs__cutout_kwargs__lenght=1), 'augmentation_kwargs.cutout_kwargs.lenght',
     'augmentation_kwargs.cutout_kwargs.length'),
    (dict(augmentation_kwargs__rotaton=1), 'augmentation_kwargs.rotaton', 'augmentation_kwargs.rotation'),
    (dict(confidence_threshold=.9), 'confidence_threshold', None),
    (dict(epochs={'n': 3}), 'epochs.n', 'epochs'),
    (dict(backbone_options={'widhts': [8]}), 'backbone_options.widhts', 'backbone_options.widths'),
    ({'1': 2}, '1', None)])
def test_a_wrong_key_is_named_with_the_closest(tmp_path, change, wrong, meant):
    with pytest.raises(UserError) as e: load(tmp_path, changed(**change))
    assert f"{tmp_path/'my.yml'}': {wrong} is no key of setup scan: did you mean '" in str(e.value)
    suggested = str(e.value).partition("mean '")[2][:-2]
    assert suggested in known_keys('scan') and meant in (None, suggested)

@pytest.mark.parametrize('change,said', [
    (dict(epochs='many'), "epochs is 'many': give a whole number of at least 0"),
    (dict(epochs=1.5), 'epochs is 1.5'),
    (dict(epochs=True), 'epochs is True'), (dict(epochs=-1), 'epochs is -1'),
    (dict(epochs=None), 'epochs is None'),
    (dict(batch_size=0), 'batch_size is 0'), (dict(batch_size=math.inf), 'batch_size is inf'),
    (dict(num_classes=1), 'num_classes is 1: give a whole number of at least 2'),
    (dict(optimizer='lion'), "optimizer is 'lion': give sgd or adam"),
    (dict(optimizer_kwargs__lr=[1]), r'optimizer_kwargs.lr is \[1\]'),
    (dict(optimizer_kwargs__lr=math.nan), 'lr is nan'),
    (dict(optimizer_kwargs__momentum=1.5), 'momentum is 1.5: .*from 0 to 1'),
    (dict(update_cluster_head_only='no way'), 'update_cluster_head_only is .*: give true or false'),
    (dict(train_db_name=5), 'train_db_name is 5: give a text'),
    (dict(augmentation_strategy='theirs'), 'give standard or simclr or ours'),
    (dict(augmentation_kwargs__num_strong_augs=-1), 'augmentation_kwargs.num_strong_augs: n_ops is -1'),
    (dict(augmentation_kwargs__num_strong_augs=[1]), r'n_ops is \(1,\)'),
    (dict(augmentation_kwargs__flip_p='x'), "cannot be made of .*'flip_p': 'x'"),
    (dict(augmentation_kwargs__rotation=5), "'ours' have no setting 'rotation'"),
    (dict(augmentation_kwargs__crop_size=64), 'crop_size is 64: it must be the crop_size of'),
    (dict(transformation_kwargs__normalize__mean=[.5]), 'mean is .* and std is'),
    (dict(transformation_kwargs__normalize__mean=5), 'normalize.mean is 5: give a list of numbers or null'),
    (dict(transformation_kwargs__normalize__mean=['a', 'b', 'c']), 'normalize.mean is'),
    (dict(channels=1), 'mean and std have 3 values'),
    (dict(channels=2), 'channels is 2: give 1 or 3 or null'),
    (dict(prior=[1, 2]), 'prior is .*: give one share for each of 10 clusters'),
    (dict(prior=[0]*10), 'prior is'),
    (dict(prior='guess'), "prior is 'guess': give a list of numbers or estimate or null"),
    (dict(scheduler='step'), "'step' needs lr_decay_epochs"), (dict(seed=2**63), 'seed is'),
    (dict(optimizer_kwargs__nesterov=True, optimizer_kwargs__momentum=0), 'nesterov needs a momentum'),
    (dict(setup='rotnet'), "setup is 'rotnet': give simclr, moco, scan, selflabel"),
    (dict(setup=['scan']), 'setup is'),
    (dict(num_classes=...), 'lacks the key num_classes'),
    (dict(transformation_kwargs__crop_size=...), 'lacks the key transformation_kwargs.crop_size')])
def test_a_wrong_value_is_named_with_file_and_key(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as e: load(tmp_path, changed(**change))
    assert f"'{tmp_path/'my.yml'}'" in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('text,said', [
    ('a: [1', 'my.yml.*look for a mistake in line'), ('', 'holds no settings'), ('- 1', 'holds no settings'),
    ('epochs: 5', 'setup is None'), ('a: \x00', 'cannot be read as YAML')])
def test_a_file_that_is_no_recipe(tmp_path, text, said):
    with pytest.raises(UserError, match=said): load(tmp_path, text)

def test_a_file_that_is_no_text(tmp_path):
    (tmp_path/'my.yml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='cannot be read as YAML'): load_recipe(tmp_path/'my.yml')

@pytest.mark.parametrize('change', [dict(epochs=-1), dict(views_options=dict(nops=3)), dict(lr='x'),
                                    dict(mean=(.5,)), dict(views=3)])
def test_python_is_checked_like_yaml(change):
    with pytest.raises(UserError): dataclasses.replace(PAPER['cifar-10'].scan, **change)
    with pytest.raises(dataclasses.FrozenInstanceError): PAPER['cifar-10'].scan.epochs = 3

# ---- where files are ---------------------------------------------------------------------------------------

def test_a_file_here_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('configs/env.yml', 'env.yml', './configs/env.yml'):
        assert find_config(name) == CONFIGS/'env.yml'
    (tmp_path/'configs').mkdir()
    (tmp_path/'configs/env.yml').write_text('root_dir: elsewhere')
    assert load_env('configs/env.yml')['root_dir'] == 'elsewhere'
    assert load_env('env.yml')['root_dir'] == 'results'

@pytest.mark.parametrize('name,meant', [
    ('configs/pretext/simclr_cifar_10.yml', 'configs/pretext/simclr_cifar10.yml'),
    ('scan_cifar20', 'configs/scan/scan_cifar20.yml'),
    ('configs/selflabel/selflabel_stl.yml', 'configs/selflabel/selflabel_stl10.yml'),
    ('configs/evn.yml', 'configs/env.yml'),
    ('moco_aurroa.yml', 'configs/pretext/moco_aurora.yml')])
def test_a_missing_file_is_answered_with_the_closest(name, meant):
    said = f"There is no file '{name}'.*did you mean '{meant}'"
    with pytest.raises(UserError, match=said): find_config(name)

def test_neither_a_folder_nor_another_path_is_a_file(tmp_path):
    for name in (tmp_path, tmp_path/'scan_cifar10.yml', 'scan/scan_cifar10.yml'):
        with pytest.raises(UserError, match='There is no file'): find_config(name)

def test_env(tmp_path):
    file = tmp_path/'env.yml'
    def env(text):
        file.write_text(text)
        return load_env(file)
    assert env('root_dir: out') == dict(root_dir='out', data={})
    assert env('data: {o: {root: o, labels: l.csv}}')['data'] == dict(o=dict(root='o', labels='l.csv'))
    assert env('data:\nroot_dir:') == dict(root_dir='results', data={})
    assert env('data: {cifar-10: ~/c, 7: d}') == dict(root_dir='results', data={'cifar-10': '~/c', '7': 'd'})
    for text, said in [('root: out', "root is no key: did you mean 'root_dir'"),
                       ('root_dir: 3', 'root_dir is 3'),
                       ('data: 3', 'data is'), ('data: {a: 3}', 'data.a is 3'),
                       ('data: {a: {root: [x]}}', r"data.a.root is \['x'\]"), ('data: [1]', 'data is')]:
        with pytest.raises(UserError, match=said): env(text)

def test_the_files_are_in_the_wheel_and_in_the_source_archive(tmp_path):
    build = 'import setuptools.build_meta as b, sys; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)'
    copy_of = tmp_path/'repo'
    copy_of.mkdir()
    for name in ('setup.py', 'settings.ini', 'README.md', 'MANIFEST.in'): shutil.copy(ROOT/name, copy_of)
    shutil.copytree(ROOT/'scan_nb', copy_of/'scan_nb', ignore=shutil.ignore_patterns('__pycache__'))
    done = subprocess.run([sys.executable, '-c', build, str(tmp_path)], cwd=copy_of, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    files = {f'scan_nb/configs/{p.relative_to(CONFIGS).as_posix()}' for p in CONFIGS.rglob('*.yml')}
    assert len(files) == len(SHIPPED) + 1
    assert files <= set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        assert files <= {name.partition('/')[2] for name in archive.getnames()}

# ---- objects -----------------------------------------------------------------------------------------------

def test_views_have_the_settings_of_the_recipe():
    simclr, strong = make_views(PAPER['stl-10'].pretext), make_views(PAPER['stl-10'].scan)
    assert isinstance(simclr, SimCLRAugment)
    assert (simclr.size, simclr.scale, simclr.hue, simclr.blur_p) == (96, (.2, 1), .1, 0)
    assert isinstance(strong, StrongAugment) and (strong.size, strong.n_ops, strong.cutout) == (96, 4, 32)

def weight(): return torch.nn.Parameter(torch.zeros(1))

@pytest.mark.parametrize('recipe', [PAPER['cifar-10'].scan, PAPER['imagenet_50'].scan,
                                    PAPER['cifar-10'].pretext,
                                    dataclasses.replace(PAPER['stl-10'].pretext, nesterov=True, momentum=.5)])
def test_optimizers(recipe):
    optimizer = make_optimizer(recipe, iter([weight()]))
    kind = dict(sgd=torch.optim.SGD, adam=torch.optim.Adam)[recipe.optimizer]
    group = optimizer.param_groups[0]
    names = ['lr', 'weight_decay'] + ['momentum', 'nesterov']*(recipe.optimizer == 'sgd')
    assert type(optimizer) is kind and all(group[name] == getattr(recipe, name) for name in names)

def rates(recipe, n_images, updates):
    optimizer = make_optimizer(recipe, [weight()])
    schedule = make_schedule(recipe, optimizer, n_images)
    for _ in range(updates):
        yield optimizer.param_groups[0]['lr']
        schedule.step()

BASE = dataclasses.replace(PAPER['cifar-10'].pretext, lr=2., batch_size=10, epochs=6)

def test_cosine_falls_to_the_cube_of_the_rate():
    found = list(rates(BASE, 45, 25))   # 4 updates an epoch, 24 in all
    lowest = 2*.1**3
    wanted = [lowest + (2 - lowest)*(1 + math.cos(math.pi*t/24))/2 for t in range(25)]
    assert found == pytest.approx(wanted) and found[-1] == pytest.approx(lowest)

def test_constant_and_step():
    assert set(rates(dataclasses.replace(BASE, scheduler='constant'), 45, 30)) == {2.}
    step = dataclasses.replace(BASE, scheduler='step', lr_decay_epochs=[2, 5], lr_decay_rate=.5)
    assert list(rates(step, 45, 24)) == [2.]*8 + [1.]*12 + [.5]*4

@pytest.mark.parametrize('scheduler', ['constant', 'cosine', 'step'])
def test_warmup_rises_in_a_line(scheduler):
    recipe = dataclasses.replace(BASE, scheduler=scheduler, lr_decay_epochs=[3], warmup=1/4)
    assert list(rates(recipe, 45, 6)) == pytest.approx([2*(t + 1)/6 for t in range(6)])

def test_no_epochs_no_fault():
    assert next(rates(dataclasses.replace(BASE, epochs=0), 45, 1)) == 2.
