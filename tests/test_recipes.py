"Presets against tables typed once more; each setting checked, with one sentence in Python, YAML and shell."
import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from run_notebooks import ROOT
from scan_nb.views import SimCLRAugment, StrongAugment, WeakAugment
from scan_nb.cli import main
from scan_nb.data import ImageSet, UserError
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import PAPER, PRESETS, find_recipe, known_keys, load_stages, to_yaml
from scan_nb.recipes import (EPOCHS, FOLDER, LIMITS, PARTS, SHARED, PretextRecipe, Recipe,
                             ScanRecipe, SelfLabelRecipe, auto_epochs, change, choices, complete,
                             list_differences, make_views)
from scan_nb.training import make_optimizer, make_schedule

CONFIGS = ROOT/'scan_nb'/'configs'
BOTH = pytest.mark.parametrize('device', ['cpu', 'cuda'])
each_preset = pytest.mark.parametrize('name', PRESETS)

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
    'pretext/moco_imagenet': ('imagenet', *MOCO),   # no file of the authors: as its subsets
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

JITTER = dict(scale=(.2, 1), jitter_p=.8, brightness=.4, contrast=.4, saturation=.4, hue=.1, gray_p=.2)

def expected_fields(name):
    "All fields of the recipe, from the table alone; our own options are off."
    stage, data, optimizer, lr, momentum, decay, epochs, batch, schedule = name.split('/')[0], *FILES[name]
    classes, net, crop, (mean, std), length = DATA[data]
    large = data.startswith('imagenet')
    strong = stage == 'selflabel' or stage == 'scan' and not large
    options = dict(n_ops=4, cutout=length) if strong else {} if stage == 'pretext' and large else JITTER
    out = dict(data=data, test_data=data, n_clusters=classes, channels=None, size=crop, mean=tuple(mean),
               std=tuple(std), backbone=net, backbone_options={}, n_networks=1, white=None, fit='crop',
               kind='photographs', views='ours' if strong else 'simclr', views_options=options,
               optimizer=optimizer, lr=lr, momentum=momentum or .9, weight_decay=decay,
               nesterov=False, scheduler=schedule,
               lr_decay_rate=.1, lr_decay_epochs=(), epochs=epochs, batch_size=batch, seed=0,
               precision='bf16', compile=False)
    own = dict(
        pretext=dict(setup='moco' if large else 'simclr', head='mlp', features_dim=128,
                     temperature=.07 if large else .1, warmup=0, queue_size=65536, key_momentum=.999,
                     pretrained='moco_v2_800ep_pretrain.pth.tar' if large else None, more_views=(),
                     n_neighbors=50 if large else 20, n_neighbors_val=5, index='exact', time_window=0,
                     mutual=False, whiten=0, n_views=0),
        scan=dict(entropy_weight=5, n_neighbors=50 if large else 20, n_heads=10 if large else 1,
                  head_only=large, heads_epochs=0, tried_heads=64, head_choice='loss', exchanges=0,
                  heads_decay=0, one_network=False,
                  objective='scan', prior=None, remine_every=0),
        selflabel=dict(threshold=.99, balance=not large, ema_decay=.999 if large else None, entropy_weight=0,
                       prior=None, soft_targets=False))
    return out | own[stage]

@each_file
def test_a_preset_is_the_table(name):
    preset = getattr(PRESETS[FILES[name][0]], name.partition('/')[0])
    assert dataclasses.asdict(preset) == expected_fields(name)

def test_the_table_leaves_nothing_out():
    assert [*PAPER] == [*DATA] and PAPER['imagenet'].selflabel is None
    assert all(PRESETS[name] is recipe and not recipe.cpu for name, recipe in PAPER.items())
    typed = sum(len(recipe.stages) for recipe in PAPER.values())
    assert typed == len(FILES)

def test_features_of_all_of_imagenet_are_those_of_its_subsets():
    fifty, every = PAPER['imagenet_50'].pretext, PAPER['imagenet'].pretext
    assert dataclasses.replace(fifty, data='imagenet', test_data='imagenet', n_clusters=1000) == every

# ---- presets of our own ------------------------------------------------------------------------------------

def everywhere(**shared): return {f'{stage}.{name}': v for stage in PARTS for name, v in shared.items()}

OURS = everywhere(backbone='small_resnet', epochs=None, kind='auto') | {   # where a folder differs
    'pretext.lr': .1, 'pretext.lr_decay_rate': 0, 'pretext.batch_size': 256, 'pretext.temperature': .5,
    'pretext.warmup': .05, 'pretext.queue_size': 1024, 'pretext.key_momentum': .995,
    'pretext.n_neighbors': None, 'scan.scheduler': 'cosine', 'scan.lr_decay_rate': 0, 'scan.heads_epochs': 80,
    'selflabel.batch_size': 256, 'selflabel.ema_decay': .99, 'selflabel.entropy_weight': 5}
DIGITS = dict(scale=(.6, 1.4), ratio=(.8, 1.25), flip_p=0, rotation=15, jitter_p=1, erase=3)
CLOTHES = dict(scale=(.5, 1.1), ratio=(.95, 1.05), rotation=9, brightness=.6, contrast=.6, jitter_p=1,
               erase=7)
PARTLY = CLOTHES | dict(scale=(.65, 1.15), ratio=(.9, 1.1), erase=11, tint_p=.8, strip_p=.5)
SKY = dict(scale=(.4, 1), ratio=(.9, 1.1), jitter_p=.8, brightness=.4, contrast=.4, saturation=0, hue=0,
           gray_p=0, rotation=180, disc=True)
FASHION = OURS | everywhere(data='fashion-mnist', test_data='fashion-mnist', kind='silhouettes') | {
    'pretext.temperature': .2, 'pretext.batch_size': 512, 'pretext.lr': .2,
    'scan.batch_size': 512, 'scan.heads_epochs': 15}
OWN = {   # preset: where it differs from the defaults
    'folder': OURS, 'fashion-mnist': FASHION,
    'digits': OURS | everywhere(data='digits', backbone_options=dict(widths=(32, 64, 128)),
                                kind='handwriting', views='simclr', views_options=DIGITS, epochs=5) | {
        'pretext.epochs': 60, 'pretext.n_neighbors': 5},
    'fashion-mnist best': FASHION | everywhere(n_networks=4,
                                               backbone_options=dict(widths=(16, 32, 64, 128))) | {
        'pretext.views_options': PARTLY, 'pretext.epochs': 8, 'pretext.n_neighbors': 20,
        'pretext.more_views': (PARTLY | dict(strip_p=.75), PARTLY, PARTLY | dict(strip_p=.75)),
        'scan.entropy_weight': 10, 'scan.tried_heads': 128, 'scan.exchanges': 8, 'scan.epochs': 0},
    'aurora': OURS | everywhere(data='aurora', test_data='aurora', n_clusters=4, channels=1, size=96,
                                kind='photographs', backbone='resnet18', views='simclr',
                                views_options=SKY, epochs=20) | {
        'pretext.epochs': 200, 'pretext.batch_size': 128, 'pretext.lr_decay_rate': .1,
        'pretext.queue_size': 65536, 'pretext.key_momentum': .999, 'pretext.n_neighbors': 20,
        'pretext.time_window': 600, 'scan.n_neighbors': 20}}

@pytest.mark.parametrize('name', OWN)
def test_a_preset_of_our_own_is_its_table(name):
    preset, wanted = PRESETS[name], Recipe().flat() | OWN[name]
    if name == 'fashion-mnist best':
        assert preset.selflabel is None   # its second stage is the heads alone
        wanted = {k: v for k, v in wanted.items() if not k.startswith('selflabel.')}
    assert list_differences(wanted, preset.flat()) == []
    assert bool(preset.cpu) == (name == 'aurora') and {*OWN} == {*PRESETS} - {*PAPER}

@each_preset
@BOTH
def test_stages_of_a_preset_fit_together(name, device):
    stages = PRESETS[name].on(device).stages
    names = SHARED - {'prior'}
    assert len({repr([getattr(r, shared) for shared in names]) for r in stages.values()}) == 1
    mined, used = stages['pretext'].n_neighbors, stages['scan'].n_neighbors
    assert mined is None or used is None or used <= mined
    for r in stages.values(): make_views(r.views, r.size or 32, r.views_options)

# ---- the shipped files -------------------------------------------------------------------------------------

QUEUE = dict(setup='moco', temperature=.1, lr=.05, queue_size=512, key_momentum=.99)

@BOTH
def test_aurora_by_moco_differs_in_its_queue(device):
    stages = PRESETS['aurora'].on(device).stages
    moco = QUEUE | (dict(epochs=48) if device == 'cpu' else {})
    assert load_stages('moco_aurora.yml', device)['pretext'] == dataclasses.replace(stages['pretext'], **moco)

def test_every_shipped_file_is_some_preset():
    named = {p.relative_to(CONFIGS).with_suffix('').as_posix() for p in CONFIGS.glob('*/*.yml')}
    sky = 'pretext/simclr', 'pretext/moco', 'scan/scan', 'selflabel/selflabel'
    assert named == {*FILES, *(f'{name}_aurora' for name in sky)}

@BOTH
def test_aurora_keeps_what_matters_of_the_sky(device):
    stages = PRESETS['aurora'].on(device).stages
    for r in (*stages.values(), load_stages('moco_aurora.yml', device)['pretext']):
        assert (r.data, r.n_clusters, r.channels, r.mean, r.views) == ('aurora', 4, 1, None, 'simclr')
        views = make_views(r.views, r.size, r.views_options)
        assert views.disc and views.rotation == 180 and views.hue == views.saturation == views.gray_p == 0
        x = views(torch.full((4, 1, r.size, r.size), 255, dtype=torch.uint8),
                  torch.Generator().manual_seed(0))
        assert x.shape == (4, 1, r.size, r.size) and x[:, :, 0, 0].max() == 0   # a corner of the mask

def test_aurora_is_smaller_on_a_cpu():
    there, here = (PRESETS['aurora'].on(device) for device in ('cuda', 'cpu'))
    assert (there.backbone, here.backbone) == ('resnet18', 'small_resnet') and here.size < there.size
    assert all(here.stages[s].epochs < there.stages[s].epochs for s in PARTS) and not here.cpu

# ---- there and back, and changed ---------------------------------------------------------------------------

unit, positive = st.floats(0, 1), st.floats(1e-5, 1e5)
names = st.sampled_from(['null', '1e3', 'yes', '~/a b', "'", ': x', '{', '#']) | st.text(
    st.characters(exclude_categories=('C', 'Z'), include_characters=' '), min_size=1, max_size=8)
low_high = st.tuples(st.floats(.01, 1), st.floats(1, 3))
options = {
    'simclr': dict(scale=low_high, ratio=low_high, flip_p=unit, rotation=st.floats(0, 180), brightness=unit,
                   contrast=unit, saturation=unit, hue=st.floats(0, .5), jitter_p=unit, gray_p=unit,
                   blur_p=unit, tint_p=unit, strip_p=unit, erase=st.integers(0, 9), disc=st.booleans()),
    'standard': dict(scale=low_high, ratio=low_high, flip_p=unit),
    'ours': dict(n_ops=st.integers(0, 6), cutout=st.none() | st.integers(0, 9), flip_p=unit, fill=unit,
                 ops=st.just(('identity', 'rotate')), disc=st.booleans())}
own = {
    'pretext': dict(
        setup=st.sampled_from(['simclr', 'moco']), head=st.sampled_from(['mlp', 'linear']),
        features_dim=st.integers(1, 999), temperature=positive, warmup=unit, queue_size=st.integers(1, 10**6),
        key_momentum=unit, pretrained=st.none() | names, n_neighbors=st.none() | st.integers(1, 99),
        n_neighbors_val=st.integers(1, 9), index=st.sampled_from(['exact', 'ivf', 'hnsw']),
        time_window=positive, mutual=st.booleans(), whiten=unit, n_views=st.integers(0, 9)),
    'scan': dict(
        entropy_weight=positive, n_neighbors=st.none() | st.integers(1, 99), n_heads=st.integers(1, 99),
        head_only=st.booleans(), heads_epochs=st.integers(1, 99), tried_heads=st.integers(1, 99),
        head_choice=st.sampled_from(['loss', 'agreement', 'both']),
        objective=st.sampled_from(['scan', 'temi']), exchanges=st.integers(0, 99),
        heads_decay=positive, one_network=st.booleans(),
        remine_every=st.integers(0, 9)),
    'selflabel': dict(
        threshold=st.floats(0, .999), balance=st.booleans(), ema_decay=st.none() | st.floats(0, .999),
        entropy_weight=positive, soft_targets=st.booleans())}
learning = dict(
    optimizer=st.sampled_from(['sgd', 'adam']), lr=positive, momentum=st.floats(.1, 1), weight_decay=positive,
    nesterov=st.booleans(), scheduler=st.sampled_from(['constant', 'cosine', 'step']), lr_decay_rate=unit,
    epochs=st.none() | st.integers(1, 999), batch_size=st.integers(2, 9999),
    lr_decay_epochs=st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple))
networks = dict(widths=st.just((8, 16)), stem_stride=st.integers(1, 2))
shared = dict(
    data=st.none() | names, test_data=st.none() | names, n_clusters=st.integers(2, 5),
    size=st.none() | st.integers(8, 300), backbone=names,
    backbone_options=st.fixed_dictionaries({}, optional=networks),
    n_networks=st.just(1), seed=st.integers(0, 2**32 - 1), precision=st.sampled_from(['bf16', 'float32']),
    compile=st.booleans())

@st.composite
def recipes(draw):
    "Any whole recipe, its third stage perhaps left out; and now and then changes on a CPU."
    common, colors = draw(st.fixed_dictionaries(shared)), draw(st.sampled_from([None, 1, 3]))
    common['channels'] = colors or draw(st.sampled_from([None, 1, 3]))
    if colors: common |= dict(mean=[draw(unit)]*colors, std=[draw(positive)]*colors)
    prior = draw(st.sampled_from([None, 'estimate', 'shares']))
    if prior == 'shares': prior = draw(st.tuples(*[positive]*common['n_clusters']))
    stages = {}
    for stage, kind in zip(PARTS, (PretextRecipe, ScanRecipe, SelfLabelRecipe)):
        views = draw(st.sampled_from([*options]))
        given = draw(st.fixed_dictionaries(learning | own[stage])) | dict(
            views=views, views_options=draw(st.fixed_dictionaries({}, optional=options[views])))
        if given.get('n_heads', 1) > 1: given['heads_epochs'] = 0   # a start by heads ends with one
        if prior: given.pop('objective', None)   # TEMI has none
        stages[stage] = kind(**common, **given, **({} if stage == 'pretext' else dict(prior=prior)))
    cpu = draw(st.fixed_dictionaries({}, optional={
        'size': st.integers(8, 64), 'pretext.epochs': st.integers(1, 9), 'scan.lr': positive,
        'backbone_options.widths': st.just((4, 8)), 'pretext.views_options.flip_p': unit}))
    if draw(st.booleans()): stages['selflabel'] = None
    return Recipe(**stages, cpu=cpu)

@pytest.fixture(scope='module')
def write(tmp_path_factory):
    "function(recipe) -> a file that holds it."
    file = tmp_path_factory.mktemp('yaml')/'recipe.yml'
    def to_file(recipe):
        file.write_text(to_yaml(recipe), encoding='utf-8')
        return file
    return to_file

@settings(deadline=None, max_examples=40)
@given(recipe=recipes())
def test_yaml_there_and_back(recipe, write):
    file = write(recipe)
    for device in ('cpu', 'cuda'): assert find_recipe(file, device) == recipe.on(device)
    assert find_recipe(write(recipe.on('cpu')), 'cuda') == recipe.on('cpu')

@settings(deadline=None, max_examples=40)
@given(recipe=recipes(), stage=st.sampled_from(PARTS[:2]), size=st.integers(8, 300), data=names)
def test_yaml_of_a_stage_there_and_back(recipe, stage, size, data, write):
    "As a file of one stage, as the authors'; and as one that may hold several."
    r = dataclasses.replace(recipe.stages[stage], size=size, data=data)
    assert load_stages(write(r)) == load_stages(write({stage: r}), 'cuda') == {stage: r}
    assert to_yaml(load_stages(write(r))[stage]) == to_yaml(r)

FEW = st.sets(st.sampled_from(['lr', 'epochs', 'seed', 'optimizer', 'batch_size', 'precision', 'size']))

@settings(deadline=None, max_examples=25)
@given(old=recipes(), new=recipes(), some=FEW)
def test_change_and_yaml_agree(old, new, some, write):
    "Each setting by its name makes one recipe of another; and a file says the same before and after."
    old, new = old.on('cuda'), new.on('cuda')
    every = {name: v for name, v in new.flat().items() if name.split('.')[0] in old.stages}
    found = old.change(every)
    assert all(found.stages[s] == new.stages[s] for s in old.stages.keys() & new.stages.keys())
    few = {name: v for name, v in every.items() if name.split('.')[1] in some}
    assert find_recipe(write(old)).change(few) == find_recipe(write(old.change(few)))
    before, after = old.flat(), old.change(few).flat()
    assert list_differences(before, after) == list_differences(before, before | few)

@each_preset
@BOTH
def test_every_preset_survives_yaml(name, device, write):
    recipe = PRESETS[name]
    assert find_recipe(write(recipe), device) == recipe.on(device) == find_recipe(name, device)
    assert find_recipe(write(recipe.on(device)), 'cuda') == recipe.on(device)

def test_numbers_of_numpy_and_torch_and_texts_are_numbers():
    "Equal settings in other words are equal."
    usual = ScanRecipe(lr=.5, seed=3, backbone_options=dict(widths=(8, 16)), lr_decay_epochs=(2, 4),
                       prior=(.5, .5), n_clusters=2, views_options=dict(flip_p=.5), epochs=7)
    other = ScanRecipe(lr=torch.tensor(.5), seed=np.int32(3), lr_decay_epochs=[np.int64(2), 4.],
                       backbone_options=dict(widths=[np.int64(8), 16]), prior=[np.float32(.5), '5e-1'],
                       n_clusters=2., views_options=dict(flip_p=np.float64(.5)), epochs='7')
    assert other == usual and to_yaml(other) == to_yaml(usual)
    assert type(other.lr) is float and type(other.seed) is type(other.epochs) is type(other.n_clusters) is int

# ---- one setting, one sentence -----------------------------------------------------------------------------

SENTENCES = [   # setting, value, sentence; a setting with a stage belongs to that stage alone
    ('scan.lr', -1, 'scan.lr is -1: give a number of at least 0.'),
    ('pretext.lr', 'fast', "pretext.lr is 'fast': give a number of at least 0."),
    ('scan.epochs', 'many', "scan.epochs is 'many': give a whole number of at least 0 or null."),
    ('scan.epochs', 1.5, 'scan.epochs is 1.5: give a whole number of at least 0 or null.'),
    ('selflabel.epochs', True, 'selflabel.epochs is True: give a whole number of at least 0 or null.'),
    ('pretext.epochs', 0, 'pretext.epochs is 0: give a whole number of at least 1 or null.'),
    ('pretext.batch_size', 1, 'pretext.batch_size is 1: give a whole number of at least 2.'),
    ('selflabel.batch_size', 1, 'selflabel.batch_size is 1: give a whole number of at least 2.'),
    ('scan.batch_size', 0, 'scan.batch_size is 0: give a whole number of at least 1.'),
    ('n_clusters', 1, 'n_clusters is 1: give a whole number of at least 2.'),
    ('n_clusters', None, 'n_clusters is None: give a whole number of at least 2.'),
    ('seed', -1, 'seed is -1: give a whole number from 0 to 4294967295.'),
    ('seed', 2**32, 'seed is 4294967296: give a whole number from 0 to 4294967295.'),
    ('size', 0, 'size is 0: give a whole number from 1 to 4096 or null.'),
    ('channels', 17, 'channels is 17: give a whole number from 1 to 16 or null.'),
    ('mean', 5, 'mean is 5: give a list of numbers from 0 to 1 or null.'),
    ('data', 5, 'data is 5: give a text or null.'),
    ('n_networks', 9, 'n_networks is 9: give a whole number from 1 to 8.'),
    ('precision', 'fp16', "precision is 'fp16': give bf16 or float32."),
    ('compile', 'yes', "compile is 'yes': give true or false."),
    ('scan.optimizer', 'lion', "scan.optimizer is 'lion': give sgd or adam."),
    ('scan.momentum', 1.5, 'scan.momentum is 1.5: give a number from 0 to 1.'),
    ('selflabel.weight_decay', math.inf, 'selflabel.weight_decay is inf: give a number from 0 to 1000000.'),
    ('selflabel.lr', math.nan, 'selflabel.lr is nan: give a number of at least 0.'),
    ('pretext.temperature', 0, 'pretext.temperature is 0: give a number from 1e-06 to 1000000.'),
    ('pretext.whiten', 1.5, 'pretext.whiten is 1.5: give a number from 0 to 1.'),
    ('pretext.index', 'flat', "pretext.index is 'flat': give exact or ivf or hnsw."),
    ('pretext.n_neighbors', 0, 'pretext.n_neighbors is 0: give a whole number of at least 1 or null.'),
    ('pretext.n_views', -1, 'pretext.n_views is -1: give a whole number from 0 to 1000.'),
    ('pretext.time_window', -1., 'pretext.time_window is -1.0: give a number of at least 0.'),
    ('pretext.pretrained', 3, 'pretext.pretrained is 3: give a text or null.'),
    ('pretext.more_views', 3, 'pretext.more_views is 3: give a list of mappings.'),
    ('scan.head_choice', 'luck', "scan.head_choice is 'luck': give loss or agreement or both."),
    ('scan.objective', 'dino', "scan.objective is 'dino': give scan or temi."),
    ('scan.head_only', 1, 'scan.head_only is 1: give true or false.'),
    ('scan.views', 'theirs', "scan.views is 'theirs': give standard or simclr or ours."),
    ('prior', 'guess', "prior is 'guess': give a list of numbers from 1e-06 to 1000000 or estimate or null."),
    ('selflabel.threshold', 1., 'selflabel.threshold is 1.0: give a number from 0 to 0.999999.'),
    ('selflabel.ema_decay', 1., 'selflabel.ema_decay is 1.0: give a number from 0 to 0.999999 or null.'),
    ('scan.lr_decay_epochs', 5, 'scan.lr_decay_epochs is 5: give a list of numbers of at least 0.'),
    ('mean', [.5], 'mean is (0.5,) and std is None: give one of each per channel, or neither.'),
    ('prior', [.5, .5], 'prior is (0.5, 0.5): give one share for each of 10 clusters.'),
    ('scan.scheduler', 'step', "The scheduler 'step' needs lr_decay_epochs."),
    ('n_networks', 2, 'n_networks is 2, and more_views has 0 settings of views: give one less than there are '
                      'networks.'),
    ('pretext.views_options.flip_p', 2, 'flip_p is 2: give a chance in [0, 1]'),
    ('selflabel.views_options.n_ops', -1, 'n_ops is -1: give a count, 0 or more'),
    ('pretext.views_options.flip_p', 'x', None)]   # None: the same in all, whatever it is

def sentence_of(work):
    with pytest.raises(UserError) as e: work()
    assert '\n' not in str(e.value)
    return str(e.value)

def key_of(setup, setting):
    "The key of a file for a setting."
    return {v: k for k, v in known_keys(setup).items() if v}[setting]

BASE_FILE = yaml.safe_load(to_yaml(FOLDER))

def with_key(stage, setting, value):
    "The content of a file of all stages in which one key is another, and that key."
    content = copy.deepcopy(BASE_FILE)
    key = key_of({'pretext': 'simclr'}.get(stage, stage), setting)
    *above, last = key.split('.')
    inner = content[stage]
    for name in above: inner = inner.setdefault(name, {})
    inner[last] = value
    return content, key

@pytest.mark.parametrize('name, value, said', SENTENCES, ids=lambda v: str(v)[:24])
def test_a_wrong_setting_gets_the_same_sentence_everywhere(name, value, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, _, setting = name.partition('.')
    if stage not in PARTS: stage, setting = 'scan' if name == 'prior' else 'pretext', name
    # Python
    found = sentence_of(lambda: FOLDER.change({name: value}))
    assert said in (None, found)
    params = {'recipe__' + name.replace('.', '__'): value}
    assert sentence_of(lambda: SCAN().set_params(**params)) == found
    if '.' not in setting:
        assert sentence_of(lambda: dataclasses.replace(FOLDER.stages[stage], **{setting: value})) == found
    # YAML
    content, key = with_key(stage, setting, value)
    (tmp_path/'my.yml').write_text(yaml.safe_dump(content))
    text = sentence_of(lambda: find_recipe('my.yml'))
    assert text == f"'my.yml, {stage}': " + f'{key}: '*(not found.startswith('The ')) + found
    assert sentence_of(lambda: SCAN(recipe='my.yml').fit(torch.zeros(9, 8, 8))) == text
    # the shell
    written = value if isinstance(value, str) else json.dumps(value)
    command = {'pretext': 'simclr'}.get(stage, stage)
    for words, wanted in (
            (['run', 'digits', '--recipe', 'folder', '--out', 'run', '--set', f'{name}={written}'], found),
            ([command, '--config_exp', 'folder', '--set', f'{setting}={written}'], found),
            (['run', 'digits', '--recipe', 'my.yml', '--out', 'run'], text)):
        assert main([*words, '--device', 'cpu']) == 2
        assert capsys.readouterr() == ('', f'scan-nb: {wanted}\n')
    assert [p.name for p in tmp_path.iterdir()] == ['my.yml']   # nothing was begun

NONSENSE = -7, 'nonsense', 1e99, [[]], math.nan, True, None
SETTINGS = [f'{stage}.{f.name}' for stage, r in Recipe().stages.items() for f in dataclasses.fields(r)
            if f.name not in ('setup', 'views_options', 'backbone_options')]   # setup: the stage of a file

@pytest.mark.parametrize('name', SETTINGS)
def test_nonsense_is_refused_by_all_or_by_none(name, tmp_path):
    stage, _, setting = name.partition('.')
    for value in NONSENSE:
        try: found = FOLDER.change({name: value}) and None
        except UserError as e: found = str(e)
        (tmp_path/'my.yml').write_text(yaml.safe_dump({stage: with_key(stage, setting, value)[0][stage]}))
        if found is None: load_stages(tmp_path/'my.yml')
        else: assert sentence_of(lambda: load_stages(tmp_path/'my.yml')).endswith(f': {found}')

@pytest.mark.parametrize('wrong', [
    dict(epochs=-1), dict(views_options=dict(nops=3)), dict(lr='x'), dict(mean=(.5,)), dict(views=3),
    dict(views_options=3), dict(backbone_options=3), dict(backbone_options=dict(width=3))])
def test_python_is_checked(wrong):
    with pytest.raises(UserError): dataclasses.replace(PAPER['cifar-10'].scan, **wrong)

def test_recipes_cannot_be_changed_in_place():
    for recipe, name in ((FOLDER, 'scan'), (FOLDER.scan, 'epochs')):
        with pytest.raises(dataclasses.FrozenInstanceError): setattr(recipe, name, 3)

@pytest.mark.parametrize('wrong, said', [
    (dict(scheduler='step'), "'step' needs lr_decay_epochs"),
    (dict(nesterov=True, momentum=0), 'nesterov needs a momentum above 0'),
    (dict(channels=1, mean=[.5]*3, std=[.2]*3), 'mean and std have 3 values: give one per channel'),
    (dict(mean=[.5]*17, std=[.2]*17), 'mean and std have 17 values'),
    (dict(mean=[.5], std=[.2]*3), r'mean is \(0.5,\) and std is'),
    (dict(std=[.2]), 'mean is None and std is'),
    (dict(std=[0.], mean=[0.]), 'std is'),
    (dict(prior=[1, 2]), r'prior is \(1.0, 2.0\): give one share for each of 10 clusters'),
    (dict(prior=[0]*10), 'prior is'), (dict(epochs=0), 'scan.epochs and scan.heads_epochs are 0'),
    (dict(prior='estimate', objective='temi'), "scan.objective is 'temi', which has no prior"),
    (dict(n_heads=2, heads_epochs=1), 'scan.n_heads is above 1, but scan.heads_epochs ends with one head'),
    (dict(backbone_options=dict(stride=2)), "no backbone option 'stride': give widths or stem_stride"),
    (dict(views_options=dict(rotation=5)), "views 'ours' have no setting 'rotation'"),
    (dict(views='simclr', views_options=dict(flip=0)), "no setting 'flip': did you mean 'flip_p'"),
    (dict(views_options=dict(flip_p='x')), "views 'ours' cannot be made of .*'flip_p': 'x'.*give numbers")])
def test_settings_that_contradict_each_other(wrong, said):
    with pytest.raises(UserError, match=said): ScanRecipe(**wrong)

def test_heads_alone_or_the_network_alone_are_enough():
    assert ScanRecipe(epochs=0, heads_epochs=1).epochs == 0 and ScanRecipe(epochs=1).heads_epochs == 0

def test_two_networks_have_views_each():
    two = PretextRecipe(n_networks=2, more_views=[dict(flip_p=0)])
    assert two.more_views == (dict(flip_p=0),)
    for n, views, said in (
            (2, [], 'more_views has 0 settings'), (2, [{}, {}], 'more_views has 2'), (2, 3, 'views is 3'),
            (2, [dict(tint=1)], "no setting 'tint'"), (2, [3], 'more_views is'),
            (1, [{}], 'n_networks is 1, and more_views has 1')):
        with pytest.raises(UserError, match=said): PretextRecipe(n_networks=n, more_views=views)

def test_models_of_timm_have_options_of_their_own():
    large = ScanRecipe(backbone='timm:vit_tiny', backbone_options=dict(pretrained=True))
    assert large.backbone_options == dict(pretrained=True)
    with pytest.raises(UserError, match="no backbone option 'pretrained'"):
        dataclasses.replace(large, backbone='resnet50')

def test_every_limit_is_of_a_setting():
    known = {f.name for r in Recipe().stages.values() for f in dataclasses.fields(r)}
    known |= {'widths', 'stem_stride'}
    assert all(name.split('.')[-1] in known and name.split('.')[0] in known | {*PARTS} for name in LIMITS)

# ---- names -------------------------------------------------------------------------------------------------

def test_what_all_stages_share_is_set_once():
    recipe = FOLDER.change(dict(n_clusters=7, seed=3, size=20, backbone='resnet18', precision='float32'))
    for r in recipe.stages.values():
        assert (r.n_clusters, r.seed, r.size, r.backbone, r.precision) == (7, 3, 20, 'resnet18', 'float32')
    assert (recipe.n_clusters, recipe.seed, recipe.backbone) == (7, 3, 'resnet18')
    assert [r.prior for r in FOLDER.change(dict(prior='estimate')).stages.values() if r.stage != 'pretext'] \
        == ['estimate']*2
    assert FOLDER == PRESETS['folder'] and FOLDER.n_clusters == 10   # nothing happened to the old one

def test_one_stages_own_setting_needs_no_stage_when_only_one_has_it():
    recipe = FOLDER.change(dict(temperature=.3, heads_epochs=9, threshold=.8))
    assert (recipe.pretext.temperature, recipe.scan.heads_epochs, recipe.selflabel.threshold) == (.3, 9, .8)
    assert FOLDER.change({'pretext.temperature': .3}).pretext == recipe.pretext

def test_a_part_of_a_setting():
    recipe = FOLDER.change({'pretext.views_options.rotation': 15, 'pretext.views_options.flip_p': 0,
                            'backbone_options.widths': [8], 'scan.views_options': dict(n_ops=2),
                            'scan.views_options.flip_p': 0})
    assert recipe.pretext.views_options == dict(rotation=15, flip_p=0)
    assert recipe.scan.views_options == dict(n_ops=2, flip_p=0) and recipe.selflabel.views_options == {}
    assert all(r.backbone_options == dict(widths=(8,)) for r in recipe.stages.values())
    assert recipe.change({'pretext.views_options': {}}).pretext.views_options == {}
    assert FOLDER.pretext.views_options == {}

@pytest.mark.parametrize('name, said', [
    ('lr', "'lr' is a setting of several stages: say pretext.lr or scan.lr or selflabel.lr."),
    ('epochs', "say pretext.epochs or scan.epochs or selflabel.epochs."),
    ('views_options.flip_p', 'say pretext.views_options.flip_p or scan.views_options.flip_p'),
    ('n_cluster', "There is no setting 'n_cluster': did you mean 'n_clusters'?"),
    ('scan.lrr', "There is no setting 'scan.lrr': did you mean 'scan.lr'?"),
    ('scan.temperature', "There is no setting 'scan.temperature': did you mean 'pretext.temperature'?"),
    ('pretext_epochs', "did you mean 'pretext.epochs'?"), ('scann.lr', "did you mean 'scan.lr'?"),
    ('scan', "There is no setting 'scan'"), ('', "There is no setting ''"), ('.', "There is no setting '.'"),
    ('scan.lr.high', "There is no 'scan.lr.high': lr has no parts."),
    ('scan.views_options.rotaton', "have no setting 'rotaton'"),
    ('backbone_options.widht', "no backbone option 'widht'")])
def test_a_wrong_name_is_answered_with_what_was_meant(name, said):
    for recipe in (FOLDER, PAPER['cifar-10']):
        with pytest.raises(UserError) as e: recipe.change({name: 1})
        assert said in str(e.value) and '\n' not in str(e.value)

def test_a_stage_alone_needs_no_stage_in_its_names():
    alone = dict(scan=FOLDER.scan)
    for name in ('lr', 'scan.lr'): assert change(alone, {name: .5})['scan'].lr == .5
    for name, meant in (('lrr', 'lr'), ('pretext.lr', 'lr'), ('n_cluster', 'n_clusters')):
        with pytest.raises(UserError, match=f"no setting '{name}': did you mean '{meant}'"):
            change(alone, {name: 1})

def test_a_stage_that_is_left_out_has_no_settings():
    with pytest.raises(UserError, match="There is no setting 'selflabel.lr'"):
        PRESETS['fashion-mnist best'].change({'selflabel.lr': 1})

@settings(deadline=None, max_examples=20)
@given(st.permutations(['n_clusters', 'prior', 'scan.scheduler', 'scan.lr_decay_epochs', 'mean', 'std']))
def test_the_order_of_changes_does_not_matter(order):
    "Settings that need each other are checked together, when all are there."
    given = dict(n_clusters=3, prior=(1, 2, 3), mean=(.5,), std=(.2,)) | {
        'scan.scheduler': 'step', 'scan.lr_decay_epochs': (2,)}
    assert FOLDER.change({name: given[name] for name in order}) == FOLDER.change(given)

# ---- a recipe and its cpu ----------------------------------------------------------------------------------

CPU = Recipe(cpu={'size': 16, 'pretext': {'epochs': 3, 'views_options': {'flip_p': 0.}}, 'scan.lr': .5})

def test_cpu_is_for_a_cpu_alone():
    here, there = CPU.on('cpu'), CPU.on('cuda')
    assert there == CPU.on(torch.device('mps')) == CPU.on('cuda:1') == Recipe() and here != there
    assert (here.size, here.pretext.epochs, here.scan.lr) == (16, 3, .5)
    assert here.pretext.views_options == dict(flip_p=0)
    assert here.on('cpu') == here and not here.cpu and CPU.on('cpu') == Recipe().change(CPU.cpu)

def test_what_is_asked_for_goes_before_cpu():
    recipe = CPU.change({'pretext.epochs': 9, 'seed': 3})
    assert recipe.on('cpu').pretext.epochs == 9 and recipe.on('cuda').pretext.epochs == 9
    assert recipe.on('cpu').size == 16 and recipe.on('cuda').size is None and recipe.on('cpu').seed == 3

@pytest.mark.parametrize('asked', [
    {'backbone_options': dict(widths=(8,))}, {'scan.size': 20}, {'backbone_options.widths': (8,)},
    {'size': 20}, {'pretext.backbone_options.widths': (8,)}], ids=str)
def test_what_is_asked_for_goes_before_cpu_under_every_name(asked):
    "A whole mapping, a part of it, or one stage's share of what all have."
    recipe, wanted = PRESETS['aurora'].change(asked).on('cpu'), PRESETS['aurora'].on('cpu').change(asked)
    assert recipe == wanted

@pytest.mark.parametrize('cpu, said', [
    ({'scan.lr': -1}, 'scan.lr is -1'), ({'epoch': 3}, "no setting 'epoch'"),
    (dict(scan=dict(lrr=3)), "no setting 'scan.lrr'")])
def test_a_fault_under_cpu_is_found_on_every_device(cpu, said):
    with pytest.raises(UserError, match=said): Recipe(cpu=cpu)

def test_a_recipe_is_a_value():
    for recipe in (PRESETS['aurora'], PRESETS['fashion-mnist best']):
        for other in (copy.copy(recipe), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
            assert other == recipe and other.flat() == recipe.flat()
    assert Recipe() != Recipe(selflabel=None) and [*Recipe(selflabel=None).stages] == ['pretext', 'scan']
    with pytest.raises(AttributeError): Recipe().n_cluster   # noqa: B018
    assert not hasattr(Recipe(), 'lr')   # of several stages

def test_a_recipe_shows_what_is_special_about_it():
    text = repr(FOLDER.change({'pretext.views_options.rotation': 15, 'scan.epochs': 7}))
    for part in ('rotation', '15', 'scan.epochs', '7'): assert part in text
    assert 'tried_heads' not in text and '\n' not in text and len(text) < 100

# ---- what the images decide --------------------------------------------------------------------------------

def pictures(n=40, c=1, h=8, w=None): return ImageSet(torch.zeros(n, c, h, w or h, dtype=torch.uint8))

def is_open(recipe):
    r = recipe.pretext
    small = {'widths', 'stem_stride'} - r.backbone_options.keys() if r.backbone == 'small_resnet' else set()
    return [name for name in ('size', 'channels') if getattr(r, name) is None] + [
        *small, *['kind']*(r.kind == 'auto')] + [
        name for name, v in recipe.flat().items() if v is None and name.endswith('.epochs')] + [
        'n_neighbors']*(r.n_neighbors is None)

@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*PRESETS]), n=st.integers(2, 3000), c=st.sampled_from([1, 3]),
       h=st.integers(1, 40), w=st.integers(1, 40), device=st.sampled_from(['cpu', 'cuda', 'mps']))
def test_nothing_is_left_open(name, n, c, h, w, device):
    recipe = PRESETS[name]
    images, asked = pictures(n, 3 if recipe.mean else c, h, w), recipe.on(device)
    found, chosen = Recipe.for_images(images, device, recipe), choices(asked.stages, images, device)
    assert is_open(found) == [] and choices(found.stages, images, device) == {} and not found.cpu
    assert found == asked.change({setting: value for setting, (value, why) in chosen.items()})
    for setting, (_, why) in chosen.items():
        assert isinstance(why, str) and 3 < len(why) < 80 and '\n' not in why, setting
        assert setting.startswith('backbone_options.') or getattr(asked, setting, None) in (None, 'auto')
    before, after = asked.flat(), found.flat()
    assert all(after[k] == v or k.endswith('backbone_options') for k, v in before.items()
               if v not in (None, 'auto'))

@pytest.mark.parametrize('images, device, wanted', [
    (pictures(1797, 1, 8), 'cpu', {
        'kind': 'photographs', 'channels': 1, 'size': 8,
        'backbone_options.widths': (32, 64, 128), 'backbone_options.stem_stride': 1,
        'pretext.epochs': 71, 'scan.epochs': 14, 'selflabel.epochs': 20, 'pretext.n_neighbors': 20}),
    (pictures(12, 3, 96, 64), 'cpu', {
        'kind': 'photographs', 'channels': 3, 'size': 64, 'backbone_options.widths': (32, 64, 128, 256),
        'backbone_options.stem_stride': 2, 'pretext.epochs': 100, 'scan.epochs': 20,
        'selflabel.epochs': 20, 'pretext.n_neighbors': 11}),
    (pictures(60_000, 1, 16), 'cuda', {
        'kind': 'photographs', 'channels': 1, 'size': 16, 'backbone_options.widths': (32, 64, 128, 256),
        'backbone_options.stem_stride': 1, 'pretext.epochs': 128, 'scan.epochs': 21,
        'selflabel.epochs': 21, 'pretext.n_neighbors': 20})])
def test_what_is_chosen_for_a_folder(images, device, wanted):
    assert {k: v for k, (v, why) in choices(FOLDER.stages, images, device).items()} == wanted
    assert Recipe.for_images(images, device) == FOLDER.change(wanted)

def test_what_is_told_is_not_chosen():
    told = {'pretext.epochs': 7, 'scan.epochs': 0, 'selflabel.epochs': 3, 'pretext.n_neighbors': 2, 'size': 5,
            'channels': 3, 'kind': 'all-sky', 'backbone_options': dict(widths=(5,), stem_stride=2)}
    assert choices(FOLDER.change(told).stages, pictures(h=28)) == {}
    assert Recipe.for_images(pictures(h=28), 'cpu', FOLDER.change(told)) == FOLDER.change(told)
    assert choices(FOLDER.change({'size': 5}).stages, pictures(h=28))['backbone_options.stem_stride'][0] == 1

def test_a_stage_alone_is_completed_like_all_three():
    whole, images = Recipe.for_images(pictures(h=28)), pictures(h=28)
    for stage, r in FOLDER.stages.items(): assert complete({stage: r}, images) == {stage: whole.stages[stage]}

def test_for_images_works_on_the_recipe_of_the_device():
    images = pictures(c=1, h=96)
    for device in ('cpu', 'cuda'):
        assert Recipe.for_images(images, device, PRESETS['aurora']).size == PRESETS['aurora'].on(device).size

def test_images_that_do_not_fit_the_colors_of_a_recipe():
    with pytest.raises(UserError, match='mean and std have 3 values: give one per channel'):
        Recipe.for_images(pictures(c=1, h=32), 'cpu', PAPER['cifar-10'])

@given(st.sampled_from(['pretext', 'scan', 'selflabel']), st.integers(2, 10**7), st.integers(2, 10**7),
       st.integers(1, 4096), st.sampled_from(['cpu', 'cuda', 'mps']))
def test_auto_epochs(stage, a, b, batch, device):
    few, many = sorted((a, b))
    low, high = EPOCHS['cpu' if device == 'cpu' else 'gpu'][stage]
    more, less = (auto_epochs(stage, n, batch, device) for n in (few, many))
    assert low <= less <= high and low <= more <= high
    if few >= batch: assert less <= more

# ---- differences -------------------------------------------------------------------------------------------

plain = st.recursive(st.none() | st.integers() | st.text(max_size=3),
                     lambda v: st.dictionaries(st.text(max_size=3), v, max_size=3))

@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=3), plain, max_size=3),
       st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_differences_are_found(a, b):
    assert list_differences(a, a) == []
    if all(isinstance(v, int) for v in (*a.values(), *b.values())):
        assert bool(list_differences(a, b)) == (a != b)

def test_differences_are_said_by_name():
    a = dict(seed=0, views=dict(flip_p=.5, turn=1), old=1)
    b = dict(seed=1, views=dict(flip_p=0., turn=1), new=[2])
    assert list_differences(a, b) == [
        'seed: 0 → 1', 'views.flip_p: 0.5 → 0.0', 'old: 1 → None', 'new: None → [2]']

# ---- objects -----------------------------------------------------------------------------------------------

def views_of(r): return make_views(r.views, r.size, r.views_options)

def test_views_have_the_settings_of_the_recipe():
    simclr, strong = views_of(PAPER['stl-10'].pretext), views_of(PAPER['stl-10'].scan)
    assert isinstance(simclr, SimCLRAugment)
    assert (simclr.size, simclr.scale, simclr.hue, simclr.blur_p) == (96, (.2, 1), .1, 0)
    assert isinstance(strong, StrongAugment) and (strong.size, strong.n_ops, strong.cutout) == (96, 4, 32)
    weak = make_views('standard', 12, dict(scale=(.5, 1.)))
    assert isinstance(weak, WeakAugment) and (weak.size, weak.scale) == (12, (.5, 1.))

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
    none = dataclasses.replace(PAPER['cifar-10'].scan, epochs=0, heads_epochs=1, lr=2.)
    assert next(rates(none, 45, 1)) == 2.
