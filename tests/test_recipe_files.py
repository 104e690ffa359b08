"The authors' YAML and ours: what the shipped files say, what a file may say, every fault with file and key."
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
from run_notebooks import ROOT
from scan_nb.views import WeakAugment
from scan_nb.data import UserError
from scan_nb.recipe_files import (PAPER, PRESETS, find_config, find_recipe, known_keys, load_env, load_stages,
                                  to_yaml)
from scan_nb.recipes import FOLDER, Recipe, make_views
from test_recipes import BOTH, CONFIGS, DATA, FILES, each_file

SHIPPED = sorted(CONFIGS.glob('*/*.yml'))

def load_recipe(file, device='cpu'):
    "The recipe in a file of one stage."
    (recipe,) = load_stages(file, device).values()
    return recipe

# ---- what the shipped files say ----------------------------------------------------------------------------

JITTER = dict(random_resized_crop=dict(scale=[.2, 1]), color_jitter_random_apply=dict(p=.8),
              color_jitter=dict(brightness=.4, contrast=.4, saturation=.4, hue=.1),
              random_grayscale=dict(p=.2))

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

@each_file
def test_a_shipped_file_says_what_the_table_says(name): assert raw(name) == expected_yaml(name)

def test_to_yaml_speaks_the_authors_schema():
    "What the authors' own file says of CIFAR-10, our writer says in the same words."
    said = yaml.safe_load(to_yaml(PAPER['cifar-10'].scan))
    wanted = raw('scan/scan_cifar10')
    def contains(outer, inner):
        return all(contains(outer[k], v) if isinstance(v, dict) else outer[k] == v for k, v in inner.items())
    assert contains(said, wanted)

# ---- files of one stage ------------------------------------------------------------------------------------

GOOD = yaml.safe_load((CONFIGS/'scan/scan_cifar10.yml').read_text())

@pytest.fixture
def load(tmp_path):
    "function(content, device) -> the recipe in a file of one stage that holds it."
    def read(content, device='cpu'):
        (tmp_path/'my.yml').write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_recipe(tmp_path/'my.yml', device)
    return read

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

def test_the_few_keys_of_a_moco_file_are_enough(load):
    assert load(MOCO_FILE) == dataclasses.replace(PAPER['imagenet_50'].pretext, pretrained=None)

def test_the_few_keys_of_an_evaluation_file_are_enough(load):
    content = yaml.safe_load((CONFIGS/'scan/imagenet_eval.yml').read_text())
    for key in ('optimizer', 'optimizer_kwargs', 'scheduler', 'epochs', 'batch_size',
                'update_cluster_head_only'):
        del content[key]
    recipe = load(content)
    assert (recipe.n_clusters, recipe.n_heads, recipe.entropy_weight) == (1000, 10, 5)

@each_file
def test_the_stage_is_found_without_setup(load, name):
    content = yaml.safe_load((CONFIGS/f'{name}.yml').read_text())
    del content['setup']
    assert load(content) == load_recipe(f'{name.partition("/")[2]}.yml')

@pytest.mark.parametrize('written,number',
                         [('1e-4', 1e-4), ('5E-2', .05), ("'0.3'", .3), ('1', 1.), ('.5', .5)])
def test_numbers_however_they_are_written(load, written, number):
    text = (CONFIGS/'scan/scan_cifar10.yml').read_text().replace('lr: 0.0001', f'lr: {written}')
    assert f'lr: {written}' in text and load(text).lr == number and type(load(text).lr) is float

@pytest.mark.parametrize('use,alpha,decay', [
    (True, .9, .9), (True, ..., .999), (False, .9, None), (False, ..., None), (..., ..., None),
    (..., .9, .9)])
def test_ema(load, use, alpha, decay):
    content = yaml.safe_load((CONFIGS/'selflabel/selflabel_cifar10.yml').read_text())
    content |= dict(use_ema=use, ema_alpha=alpha)
    assert load({k: v for k, v in content.items() if v is not ...}).ema_decay == decay

def test_an_empty_group_says_nothing(load):
    content = changed(scheduler_kwargs=None, augmentation_kwargs={})
    assert load(content) == dataclasses.replace(PAPER['cifar-10'].scan, views_options={})

def test_settings_of_other_views_mean_nothing(load):
    "A user of the authors' code may change the strategy and leave the rest."
    content = yaml.safe_load((CONFIGS/'pretext/simclr_cifar10.yml').read_text())
    recipe = load(content | dict(augmentation_strategy='standard'))
    assert recipe.views_options == dict(scale=(.2, 1.))
    assert isinstance(make_views(recipe.views, recipe.size, recipe.views_options), WeakAugment)

@pytest.mark.parametrize('setup', ['simclr', 'moco', 'scan', 'selflabel'])
def test_every_setting_has_a_key(setup):
    "All settings of a stage but mappings, whose parts have keys of their own; and no two the same key."
    stage = {'simclr': 'pretext', 'moco': 'pretext'}.get(setup, setup)
    named = {name for name in known_keys(setup).values() if name}
    mappings = {'views_options', 'backbone_options'}
    own = {f.name for f in dataclasses.fields(Recipe().stages[stage])} - mappings
    assert own <= named and {name.partition('.')[0] for name in named - own} == mappings

# ---- cpu ---------------------------------------------------------------------------------------------------

def test_cpu_goes_before_the_rest_on_a_cpu_alone(load):
    content = changed(cpu=dict(epochs=3, optimizer_kwargs=dict(lr='1e-2'), backbone='small_resnet',
                               backbone_options=dict(widths=[8]),
                               augmentation_kwargs=dict(cutout_kwargs=dict(length=4))))
    paper = PAPER['cifar-10'].scan
    assert load(content, 'cuda') == load(content, torch.device('mps')) == paper
    here = load(content, torch.device('cpu'))
    assert here == dataclasses.replace(paper, epochs=3, lr=.01, backbone='small_resnet',
                                       backbone_options=dict(widths=(8,)),
                                       views_options=dict(n_ops=4, cutout=4))
    assert load(to_yaml(here), 'cuda') == here and 'cpu' not in to_yaml(here)

def test_another_network_on_a_cpu_does_not_inherit_the_options_of_the_first(load):
    content = changed(backbone='timm:vit_tiny', backbone_options=dict(pretrained=True),
                      cpu=dict(backbone='small_resnet', backbone_options=dict(stem_stride=2)))
    large, small = load(content, 'cuda'), load(content)
    assert (large.backbone, large.backbone_options) == ('timm:vit_tiny', dict(pretrained=True))
    assert (small.backbone, small.backbone_options) == ('small_resnet', dict(stem_stride=2))
    assert load(to_yaml(large)) == large

@BOTH
@pytest.mark.parametrize('cpu,said', [
    (dict(epoch=3), "cpu.epoch is no key of setup scan: did you mean 'epochs'"),
    (dict(optimizer_kwargs=dict(lr=-1)), 'cpu.optimizer_kwargs.lr: scan.lr is -1'), (3, 'cpu is 3'),
    ([1], r'cpu is \[1\]')])
def test_a_fault_under_cpu_is_found_on_every_device(load, cpu, said, device):
    with pytest.raises(UserError, match=f"my.yml': {said}"): load(changed(cpu=cpu), device)

# ---- files of several stages -------------------------------------------------------------------------------

def keys(r): return yaml.safe_load(to_yaml(r))

@pytest.fixture
def write(tmp_path):
    "function(content) -> a file that holds it."
    def to_file(content, name='our.yml'):
        (tmp_path/name).write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path/name
    return to_file

def test_stages_of_a_file_come_in_their_order(write):
    shuffled = {stage: keys(FOLDER.stages[stage]) for stage in ('selflabel', 'pretext', 'scan')}
    found = load_stages(write(shuffled))
    assert found == FOLDER.stages and [*found] == ['pretext', 'scan', 'selflabel']
    assert find_recipe(write(shuffled)) == find_recipe(str(write(shuffled)), torch.device('cuda')) == FOLDER

def test_a_file_may_leave_out_stages(write):
    two = {stage: keys(FOLDER.stages[stage]) for stage in ('pretext', 'scan')}
    assert find_recipe(write(two)) == dataclasses.replace(FOLDER, selflabel=None)
    assert [*load_stages(write(dict(scan=keys(FOLDER.scan))))] == ['scan']
    for missing, left in (('pretext', 'scan'), ('scan', 'pretext')):
        with pytest.raises(UserError, match=f"our.yml' has no {missing} stage: a recipe needs"):
            find_recipe(write({left: keys(FOLDER.stages[left])}))
    with pytest.raises(UserError, match='has no scan stage'): find_recipe('simclr_cifar10.yml')

def test_stages_of_a_file_need_only_say_what_differs(write):
    said = dict(pretext=dict(setup='moco', epochs=3), scan=dict(setup='scan', num_neighbors=7),
                selflabel=dict(setup='selflabel', confidence_threshold=.9))
    found = find_recipe(write(said))
    assert (found.pretext.setup, found.pretext.epochs, found.scan.n_neighbors) == ('moco', 3, 7)
    assert found.selflabel == dataclasses.replace(Recipe().selflabel, threshold=.9)

def test_cpu_beside_the_stages_is_of_settings_and_within_one_of_keys(write):
    content = {stage: keys(r) for stage, r in FOLDER.stages.items()} | {'cpu': dict(
        size=16, scan=dict(lr=.5), pretext=dict(views_options=dict(flip_p=0)))}
    content['pretext']['cpu'] = dict(optimizer_kwargs=dict(lr=.25), transformation_kwargs=dict(crop_size=20))
    file = write(content)
    wanted = {'size': 16, 'scan.lr': .5, 'pretext.views_options.flip_p': 0, 'pretext.lr': .25}
    assert find_recipe(file, 'cuda') == FOLDER and find_recipe(file, 'cpu') == FOLDER.change(wanted)

def test_our_file_of_a_preset_reads_well():
    "Stages by their names, in the authors' keys; what a CPU does otherwise stands at the end."
    content = yaml.safe_load(to_yaml(PRESETS['aurora']))
    assert [*content] == ['pretext', 'scan', 'selflabel', 'cpu']
    assert content['pretext']['train_db_name'] == 'aurora'
    assert content['cpu']['size'] == 32 and content['cpu']['scan'] == dict(epochs=3)
    assert content['cpu']['backbone_options'] == dict(widths=[16, 32, 64, 128], stem_stride=2)

def several(**changes): return {stage: keys(r) for stage, r in FOLDER.stages.items()} | changes

@BOTH
@pytest.mark.parametrize('content, said', [
    (several(scann={}), "our.yml': scann is no stage: did you mean 'scan'"),
    (several(epochs=3), "our.yml': epochs is no stage: did you mean"),
    (several(scan=3), "our.yml': scan is 3: give keys and values"),
    (several(scan=None), "our.yml': scan is None: give keys and values"),
    (several(cpu=3), "our.yml': cpu is 3: give keys and values"), (several(cpu=None), 'cpu is None'),
    (several(scan=keys(FOLDER.pretext)), "our.yml': the setup of scan is pretext: change it"),
    (several(pretext=dict(setup='byol')), "our.yml, pretext': setup is 'byol': give simclr, moco, frozen"),
    (several(scan=keys(FOLDER.scan) | dict(epoch=3)),
     "our.yml, scan': epoch is no key of setup scan: did you mean 'epochs'"),
    (several(scan=keys(FOLDER.scan) | dict(epochs=-1)), "our.yml, scan': epochs: scan.epochs is -1: give"),
    (several(cpu={'scan': dict(lr=-1)}), "our.yml', cpu: scan.lr is -1"),
    (several(cpu={'scan': dict(lrr=1)}), "our.yml', cpu: There is no setting 'scan.lrr': did you mean"),
    (several(cpu=dict(lr=1)), "our.yml', cpu: 'lr' is a setting of several stages")])
def test_a_fault_in_a_file_of_several_stages(write, content, said, device):
    with pytest.raises(UserError, match=said) as e: find_recipe(write(content), device)
    assert '\n' not in str(e.value)

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
def test_a_wrong_key_is_named_with_the_closest(load, tmp_path, change, wrong, meant):
    with pytest.raises(UserError) as e: load(changed(**change))
    assert f"{tmp_path/'my.yml'}': {wrong} is no key of setup scan: did you mean '" in str(e.value)
    suggested = str(e.value).partition("mean '")[2][:-2]
    assert suggested in known_keys('scan') and meant in (None, suggested)

@pytest.mark.parametrize('change,said', [
    (dict(epochs='many'), "epochs: scan.epochs is 'many': give a whole number of at least 0"),
    (dict(epochs=1.5), 'scan.epochs is 1.5'), (dict(epochs=True), 'scan.epochs is True'),
    (dict(epochs=-1), 'scan.epochs is -1'), (dict(batch_size=0), 'scan.batch_size is 0'),
    (dict(batch_size=math.inf), 'scan.batch_size is inf'),
    (dict(num_classes=1), 'num_classes: n_clusters is 1: give a whole number of at least 2'),
    (dict(optimizer='lion'), "optimizer: scan.optimizer is 'lion': give sgd or adam"),
    (dict(optimizer_kwargs__lr=[1]), r'optimizer_kwargs.lr: scan.lr is \[1\]'),
    (dict(optimizer_kwargs__lr=math.nan), 'scan.lr is nan'),
    (dict(optimizer_kwargs__momentum=1.5), 'momentum is 1.5: .*from 0 to 1'),
    (dict(update_cluster_head_only='no way'),
     "update_cluster_head_only: scan.head_only is 'no way': give true or false"),
    (dict(train_db_name=5), 'train_db_name: data is 5: give a text'),
    (dict(augmentation_strategy='theirs'), 'augmentation_strategy: scan.views .*give standard or simclr or'),
    (dict(augmentation_kwargs__num_strong_augs=-1), 'augmentation_kwargs.num_strong_augs: n_ops is -1'),
    (dict(augmentation_kwargs__num_strong_augs=[1]), r'n_ops is \(1,\)'),
    (dict(augmentation_kwargs__flip_p='x'), "cannot be made of .*'flip_p': 'x'"),
    (dict(augmentation_kwargs__rotation=5), "'ours' have no setting 'rotation'"),
    (dict(augmentation_kwargs__crop_size=64), 'crop_size is 64: it must be the crop_size of'),
    (dict(transformation_kwargs__normalize__mean=[.5]), 'kwargs.normalize.mean: mean is .* and std is'),
    (dict(transformation_kwargs__normalize__mean=5),
     'transformation_kwargs.normalize.mean: mean is 5: give a list of numbers from 0 to 1 or null'),
    (dict(transformation_kwargs__normalize__mean=['a', 'b', 'c']), 'normalize.mean: mean is'),
    (dict(channels=1), 'mean and std have 3 values'),
    (dict(channels=17), 'channels: channels is 17: give a whole number from 1 to 16 or null'),
    (dict(prior=[1, 2]), 'prior: prior is .*: give one share for each of 10 clusters'),
    (dict(prior=[0]*10), 'prior is'),
    (dict(prior='guess'), "prior is 'guess': give a list of numbers from 1e-06 to 1000000 or estimate"),
    (dict(scheduler='step'), "'step' needs lr_decay_epochs"), (dict(seed=2**32), 'seed: seed is'),
    (dict(optimizer_kwargs__nesterov=True, optimizer_kwargs__momentum=0), 'nesterov needs a momentum'),
    (dict(setup='rotnet'), "setup is 'rotnet': give simclr, moco, frozen, scan, selflabel"),
    (dict(setup=['scan']), 'setup is'),
    (dict(setup='selflabel', use_ema='often', criterion_kwargs=..., num_neighbors=...,
          update_cluster_head_only=...), "use_ema is 'often': give true or false"),
    (dict(num_classes=...), 'lacks the key num_classes'),
    (dict(train_db_name=...), 'lacks the key train_db_name'),
    (dict(transformation_kwargs__crop_size=...), 'lacks the key transformation_kwargs.crop_size')])
def test_a_wrong_value_is_named_with_file_and_key(load, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as e: load(changed(**change))
    assert f"'{tmp_path/'my.yml'}'" in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('text,said', [
    ('a: [1', 'my.yml.*look for a mistake in line'), ('', 'holds no settings'), ('- 1', 'holds no settings'),
    ('epochs: 5', 'setup is None'), ('a: \x00', 'cannot be read as YAML'),
    ('cpu: {epochs: 3}', 'setup is None'),
    ('setup: scan\nfirst: !!python/object:os.system {}', 'cannot be read as YAML')])
def test_a_file_that_is_no_recipe(load, text, said):
    with pytest.raises(UserError, match=said): load(text)

def test_a_file_that_is_no_text(tmp_path):
    (tmp_path/'my.yml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='cannot be read as YAML'): load_stages(tmp_path/'my.yml')

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

def test_a_preset_is_found_by_its_name_before_any_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'digits').write_text('no recipe')
    for name in PRESETS: assert find_recipe(name) == PRESETS[name].on('cpu')
    assert find_recipe('aurora', 'cuda') == PRESETS['aurora'].on('cuda') != find_recipe('aurora')
    assert find_recipe(PRESETS['aurora'], 'cuda') == PRESETS['aurora'].on('cuda')
    assert find_recipe(PRESETS['aurora']) == PRESETS['aurora'].on('cpu')

@pytest.mark.parametrize('name, meant', [
    ('digit', 'digits'), ('cifar10', 'cifar-10'), ('fashion', 'fashion-mnist'), ('folders', 'folder'),
    ('fashion-mnist-best', 'fashion-mnist best')])
def test_an_unknown_recipe_is_answered_with_the_closest(name, meant):
    said = f"no recipe '{name}', and no file .*did you mean '{meant}'.*There are {', '.join(PRESETS)}"
    with pytest.raises(UserError, match=said): find_recipe(name)

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
