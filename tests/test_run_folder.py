"What a stage hands on, in memory and in a folder: to the bit, refused where it does not fit, damage named."
import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scan_nb import files, run_folder
from scan_nb.augment import Normalize
from scan_nb.data import ImageSet, UserError
from scan_nb.models import ClusteringModel, ContrastiveModel, SideBySide
from scan_nb.recipe_files import load_stages
from scan_nb.recipes import PARTS, PretextRecipe, ScanRecipe, SelfLabelRecipe
from scan_nb.run_folder import (Outcome, make_model, make_normalize, open_folder, read_model, read_run,
                                write_model)
from scan_nb.files import writing
from scan_nb.training import Checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')

N, SHAPE = 12, [1, 8, 8]
SHARED = dict(n_clusters=3, channels=1, size=8, backbone='small_resnet', backbone_options=dict(widths=(4, 8)))
SIMCLR = PretextRecipe(**SHARED, setup='simclr', n_neighbors=4, epochs=2)
MOCO = dataclasses.replace(SIMCLR, setup='moco')
SCAN, SELF = ScanRecipe(**SHARED, epochs=2), SelfLabelRecipe(**SHARED, epochs=2)
FOLDERS = {'pretext/simclr': SIMCLR, 'pretext/moco': MOCO, 'scan': SCAN, 'selflabel': SELF}

def pictures(seed=0, n=N): return ImageSet(torch.randint(256, (n, *SHAPE), generator=seeded(seed)).byte())

def seeded(seed): return torch.Generator().manual_seed(seed)

def outcome(recipe, seed=0, **parts):
    "An outcome of weights that nothing has trained."
    model = make_model(dataclasses.replace(recipe, seed=seed), SHAPE, Normalize([.4], [.3]))
    near = torch.stack([torch.arange(1, 5)]*N).add(torch.arange(N)[:, None]) % N
    found = dict(neighbors=near, note='a note', clusters={recipe.stage: {'all': torch.arange(N).int() % 3}},
                 steps={recipe.stage: dict(kept=True, reason='why', epochs=2, seconds=.5)},
                 history={recipe.stage: [dict(loss=1.5), dict(loss=1.25, acc=.5)]})
    if recipe.stage == 'pretext': found['embeddings'] = torch.randn(N, 8, generator=seeded(seed))
    return Outcome.of(model, recipe, SHAPE, **found | parts)

def finish(folder, recipe, before=None, seed=0):
    "A stage in a run folder, as if it had just been trained; gives its outcome."
    open_folder(folder, [recipe], {'all': pictures()}, torch.device('cpu'), before and before.sha256)
    found = outcome(recipe, seed)
    found.write(folder)
    return found

def make_run(folder):
    "All stages, SCAN from MoCo's features although SimCLR's came later."
    moco = finish(folder, MOCO, seed=1)
    simclr = finish(folder, SIMCLR, seed=2)
    os.utime(moco.file, (1e9, 1e9))
    scan = finish(folder, SCAN, moco, seed=3)
    return dict(moco=moco, simclr=simclr, scan=scan, selflabel=finish(folder, SELF, scan, seed=4))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')/'run'
    return folder, make_run(folder)

@pytest.fixture
def run(made, tmp_path): # a copy that may be damaged
    return Path(shutil.copytree(made[0], tmp_path/'run'))

def listing(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def same(a, b):
    "Two outcomes are equal to the bit."
    for name, value in vars(a).items():
        if name in ('file', 'model'): continue   # a place; what `load` made, see below
        other = getattr(b, name)
        if isinstance(value, torch.Tensor): assert torch.equal(value, other) and value.dtype == other.dtype
        elif name in ('weights', 'clusters'): assert repr(value) == repr(other), name
        else: assert value == other, name
    assert equal_weights(a.load(), b.load())
    return True

def equal_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())

def refused(said, work, *args, **options):
    with pytest.raises(UserError, match=said) as e: work(*args, **options)
    assert '\n' not in str(e.value) and str(e.value)[-1] in '.?'
    return str(e.value)

# -- models --

@pytest.mark.parametrize('recipe', FOLDERS.values(), ids=FOLDERS)
def test_a_model_is_drawn_by_its_seed_alone(recipe):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (make_model(dataclasses.replace(recipe, seed=s), SHAPE, Normalize([.4], [.3]))
                           for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert type(first) is (ContrastiveModel if recipe.stage == 'pretext' else ClusteringModel)

def test_a_model_has_the_form_of_its_recipe():
    x, both = torch.zeros(2, *SHAPE), dataclasses.replace(SCAN, n_networks=2)
    def make(recipe, **options): return make_model(recipe, SHAPE, Normalize([.4], [.3]), **options)
    assert make(SCAN, n_heads=5)(x).shape == (5, 2, 3)
    assert make(dataclasses.replace(SIMCLR, head='linear', features_dim=7))(x).shape == (2, 7)
    assert isinstance(make(both).backbone, SideBySide) and make(both).embed(x).shape == (2, 16)
    assert not isinstance(make(both, n_networks=1).backbone, SideBySide)
    refused('resnet9', make, dataclasses.replace(SCAN, backbone='resnet9'))

def test_where_mean_and_deviation_come_from():
    "What stands beside the weights, else in the recipe, else what the images have."
    images, saved = pictures().images, {'normalize': dict(mean=torch.tensor([.1]), std=torch.tensor([.2]))}
    told = dataclasses.replace(SCAN, mean=[.3], std=[.4])
    def numbers(*args): return [float(v) for v in make_normalize(*args).state_dict().values()]
    assert numbers(told, saved, images) == numbers(told, saved) == pytest.approx([.1, .2])
    assert numbers(told, None, images) == numbers(told, {'model': {}}) == pytest.approx([.3, .4])
    x = images.double()/255
    assert numbers(SCAN, {}, images) == pytest.approx([float(x.mean()), float(x.std())], rel=.01)

# -- an outcome, there and back --

@pytest.mark.parametrize('place', FOLDERS)
def test_an_outcome_comes_back_to_the_bit(made, place):
    folder, outcomes = made
    wrote, read = outcomes[place.split('/')[-1]], Outcome.read(folder/place/'model.pth.tar')
    assert same(wrote, read) and read.file == wrote.file == folder/place/'model.pth.tar'
    assert read.sha256 == wrote.sha256 and read.recipe == FOLDERS[place] and read.shape == SHAPE
    assert not read.load().training

def test_an_outcome_without_a_folder_is_as_good():
    bare = outcome(SCAN, neighbors=None)
    assert bare.file is None and not bare.load().training
    assert bare.load()(torch.zeros(2, *SHAPE)).shape == (1, 2, 3) and equal_weights(bare.load(), bare.load())

def test_weights_are_copies():
    model = make_model(SCAN, SHAPE, Normalize([.4], [.3]))
    found = Outcome.of(model, SCAN, SHAPE)
    before = found.sha256
    for p in model.parameters(): p.data.zero_()
    assert found.sha256 == before and found.load().cluster_head.weight.abs().sum() > 0

def test_the_hash_is_of_the_weights_alone():
    same_weights = outcome(SCAN, note='another', history={}, neighbors=None)
    assert outcome(SCAN).sha256 == same_weights.sha256 != outcome(SCAN, seed=1).sha256
    assert len(outcome(SCAN).sha256) == 20

def test_each_stage_leaves_its_files(made):
    folder, _ = made
    common = {'stage.json', 'outcome.pth.tar', 'model.pth.tar', 'topk-train-neighbors.npy', 'metrics.json',
              'metrics.jsonl', 'recipe.yml'}
    for place in FOLDERS:
        names = {p.name for p in (folder/place).iterdir()}
        assert names == common | ({'embeddings.npy'} if place.startswith('pretext') else set()), place
    assert {p.name for p in folder.iterdir()} == {*PARTS, 'recipe.yml', 'model.safetensors'}

def test_files_say_what_the_outcome_says(made):
    folder, outcomes = made
    lines = [json.loads(line) for line in (folder/'scan/metrics.jsonl').read_text().splitlines()]
    assert lines == [dict(stage='scan', loss=1.5), dict(stage='scan', loss=1.25, acc=.5)]
    assert json.loads((folder/'scan/metrics.json').read_text()) == outcomes['scan'].steps
    near = np.load(folder/'scan/topk-train-neighbors.npy')
    assert near.dtype == np.int64 and (near == outcomes['scan'].neighbors.numpy()).all()
    assert (np.load(folder/'pretext/moco/embeddings.npy') == outcomes['moco'].embeddings.numpy()).all()
    assert load_stages(folder/'scan/recipe.yml') == dict(scan=SCAN)
    assert [*load_stages(folder/'recipe.yml').values()] == [SIMCLR, SCAN, SELF]

def test_models_have_the_authors_layout(made):
    folder, _ = made
    pretext, scan = (torch.load(folder/place/'model.pth.tar', weights_only=True)
                     for place in ('pretext/simclr', 'scan'))
    heads = {f'contrastive_head.{i}.{kind}' for i in (0, 2) for kind in ('weight', 'bias')}
    assert {*heads, 'backbone.conv1.weight'} <= pretext['model'].keys()
    assert scan['head'] == 0 and scan['model']['cluster_head.0.weight'].shape == (3, 8)
    assert not [k for k in scan['model'] if not k.startswith(('backbone.', 'cluster_head.'))]

def test_files_hold_data_and_no_code(made):
    for file in made[0].rglob('*.pth.tar'): torch.load(file, weights_only=True)
    for file in made[0].rglob('*.npy'): np.load(file, allow_pickle=False)

def test_a_later_stage_keeps_the_recipes_before_it(tmp_path):
    finish(tmp_path, SIMCLR)
    finish(tmp_path, SCAN)
    assert [*load_stages(tmp_path/'recipe.yml')] == ['pretext', 'scan']
    assert read_model(tmp_path)[0].cluster_head.weight.shape[0] == 1
    finish(tmp_path, MOCO)   # features alone are what is newest again
    assert load_stages(tmp_path/'recipe.yml') == dict(pretext=MOCO)
    assert isinstance(read_model(tmp_path)[0], ContrastiveModel)

def test_the_model_is_written_last(tmp_path, monkeypatch):
    "A kill before leaves a stage that is not finished."
    order = []
    def watch(file):
        order.append(Path(file).name)
        return writing(file)
    monkeypatch.setattr(run_folder, 'writing', watch)
    finish(tmp_path, SIMCLR)
    assert order[-1] == 'model.pth.tar' and Counter(order)['model.pth.tar'] == 1

def test_the_other_processes_write_nothing(tmp_path, monkeypatch):
    for room in (run_folder, files): monkeypatch.setattr(room, 'place', lambda: (1, 2))
    outcome(SIMCLR).write(tmp_path)
    assert listing(tmp_path) == {}

# -- damage --

DAMAGE = {'cut': lambda raw: raw[:len(raw)//2], 'empty': lambda raw: b'', 'garbage': lambda raw: b'x'*1000}
each_damage = pytest.mark.parametrize('how', DAMAGE)

def harm(file, how): file.write_bytes(DAMAGE[how](file.read_bytes()))

@each_damage
@pytest.mark.parametrize('name', ['pretext/moco/embeddings.npy', *(
    f'{place}/{name}' for place in ('pretext/moco', 'scan')
    for name in ('outcome.pth.tar', 'model.pth.tar', 'topk-train-neighbors.npy'))])
def test_a_damaged_file_of_a_stage_is_named(run, name, how):
    file = run/name
    harm(file, how)
    before = listing(run)
    for work, what in ((Outcome.read, file.with_name('model.pth.tar')), (read_run, run)):
        assert str(file) in refused('is damaged', work, what)
    assert listing(run) == before

def test_missing_features_are_named(run):
    "A finished pretext task without them would give nothing to look at."
    (run/'pretext/moco/embeddings.npy').unlink()
    refused(r'moco/embeddings\.npy', Outcome.read, run/'pretext/moco/model.pth.tar')

@each_damage
def test_a_damaged_stage_file_is_named(run, how):
    harm(run/'scan/stage.json', how)
    for work in (lambda: open_folder(run, [SCAN], {'all': pictures()}, 'cpu'), lambda: read_run(run)):
        assert str(run/'scan/stage.json') in refused('damaged: put back a copy', work)

@pytest.mark.parametrize('text', ['[1, 2]', '3', 'null', '"text"', '{"a": 1', '\xff'])
def test_a_stage_file_of_another_kind_is_named(run, text):
    (run/'scan/stage.json').write_bytes(text.encode('latin1'))
    refused(r'stage\.json. is .*damaged', open_folder, run, [SCAN], {'all': pictures()}, 'cpu')

@pytest.mark.parametrize('state', [
    dict(something=1), dict(stage='scan'), dict(stage='rotnet', recipe={}), dict(stage='scan', recipe=3),
    dict(stage='scan', recipe=dict(epoch=3)), dict(stage='scan', recipe=dict(lr=-1.)),
    dict(stage='scan', recipe={}), dict(stage='scan', recipe={}, shape=SHAPE, somewhat=3)])
def test_a_checkpoint_of_another_kind_is_named(run, state):
    Checkpoint(run/'scan/outcome.pth.tar').save(**state)
    refused(r'scan/outcome\.pth\.tar. is of another kind', Outcome.read, run/'scan/model.pth.tar')

def test_an_outcome_from_before_a_setting_existed_is_read(run):
    saved = Checkpoint(run/'scan/outcome.pth.tar')
    state = saved.load()
    for name in ('precision', 'head_choice', 'tried_heads'): del state['recipe'][name]
    saved.save(**state)
    assert Outcome.read(run/'scan/model.pth.tar').recipe == SCAN

@pytest.mark.parametrize('array', [np.array(['text']), np.array([None])], ids=['text', 'objects'])
def test_arrays_of_another_kind_are_named(run, array):
    np.save(run/'scan/topk-train-neighbors.npy', array, allow_pickle=True)
    refused(r'topk-train-neighbors\.npy', Outcome.read, run/'scan/model.pth.tar')

@each_damage
def test_a_damaged_model_is_named(run, how):
    harm(run/'model.safetensors', how)
    assert str(run/'model.safetensors') in refused('is damaged or belongs to another recipe', read_model, run)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.uint8])
def test_a_digest_sees_every_bit(dtype):
    x = torch.arange(6, dtype=torch.float64).view(2, 3).to(dtype)
    known, raw = files.digest({'x': x, 'y': x[1, 2]}), x.flatten().view(torch.uint8)
    for i in range(8*len(raw)):
        raw[i//8] ^= 1 << i % 8
        assert files.digest({'x': x, 'y': x[1, 2]}) != known
        raw[i//8] ^= 1 << i % 8
    assert files.digest({'x': x, 'y': x[1, 2]}) == known

def test_a_model_of_another_recipe_is_named(run):
    content = yaml.safe_load((run/'recipe.yml').read_text())
    for change in (dict(num_classes=4), dict(backbone_options=dict(widths=[4, 8, 16]))):
        (run/'recipe.yml').write_text(yaml.safe_dump(content | dict(selflabel=content['selflabel'] | change)))
        refused(r'model\.safetensors. is damaged or belongs to another recipe', read_model, run)
    (run/'recipe.yml').write_text(yaml.safe_dump({k: v for k, v in content.items() if k != 'selflabel'}))
    refused('belongs to another recipe', read_model, run)

def test_a_model_without_its_description_is_named(run):
    from safetensors.torch import save_file
    for known in (None, dict(stage='selflabel'), dict(shape='[1, 8, 8]'), *(
            dict(stage='selflabel', shape=shape) for shape in ('eight', '[]', '[1]', '8'))):
        save_file({'w': torch.zeros(2)}, run/'model.safetensors', known)
        refused(r'model\.safetensors. is damaged', read_model, run)

@pytest.mark.parametrize('text', ['', '[1, 2]', 'scan: 3', '{', 'scan: {setup: scan, epoch: 3}', '\xff'])
def test_a_damaged_recipe_is_named(run, text):
    (run/'recipe.yml').write_bytes(text.encode('latin1'))
    assert str(run/'recipe.yml') in refused(r'recipe\.yml', read_model, run)

def test_what_is_missing_is_said(run, tmp_path):
    (run/'model.safetensors').unlink()
    refused(r'has no model\.safetensors: finish the run first', read_model, run)
    (run/'recipe.yml').unlink()
    for folder in (run, tmp_path, tmp_path/'missing'):
        refused('is not a run folder: it has no recipe.yml', read_model, folder)

def test_the_model_of_a_run_is_that_of_its_last_stage(made):
    folder, outcomes = made
    model, stages, shape = read_model(folder)
    assert equal_weights(model, outcomes['selflabel'].load()) and not model.training
    assert stages == dict(pretext=SIMCLR, scan=SCAN, selflabel=SELF) and shape == SHAPE

def test_a_model_is_written_with_what_it_needs(tmp_path):
    (tmp_path/'recipe.yml').write_bytes(run_folder.to_yaml(dict(pretext=SIMCLR)).encode())
    model = make_model(SIMCLR, SHAPE, Normalize([.4], [.3]))
    write_model(tmp_path, model, SHAPE, SIMCLR)
    back, _, _ = read_model(tmp_path)
    assert equal_weights(model, back)
    assert float(back.normalize.state_dict()['mean']) == pytest.approx(.4)

# -- whose folder it is --

def begin(folder, recipes=(SIMCLR,), images=None, device='cpu', start=None):
    return open_folder(folder, recipes, images or {'all': pictures()}, torch.device(device), start)

def test_a_folder_is_made_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert begin('~/a/b') == begin(tmp_path/'a/b') == tmp_path/'a/b'
    asked = json.loads((tmp_path/'a/b/pretext/simclr/stage.json').read_text())
    assert asked['pretext.epochs'] == 2 and 'n_clusters' not in asked and asked['device'] == 'cpu'
    assert asked['images']['all']['images'] == N and asked['start'] is None
    before = listing(tmp_path)
    begin(tmp_path/'a/b')
    assert listing(tmp_path) == before

def test_all_stages_of_a_run_are_asked_at_once(tmp_path):
    begin(tmp_path, [SIMCLR, SCAN, SELF])
    asked = {f'{place}/stage.json' for place in ('pretext/simclr', 'scan', 'selflabel')}
    assert {str(p) for p in listing(tmp_path)} == asked
    with pytest.raises(UserError, match='scan.lr: 0.0001 → 0.5; selflabel.epochs: 2 → 3'):
        begin(tmp_path, [SIMCLR, dataclasses.replace(SCAN, lr=.5), dataclasses.replace(SELF, epochs=3)])

@pytest.mark.parametrize('change, said', [
    (dict(temperature=.3), 'pretext.temperature: 0.1 → 0.3'), (dict(seed=1), r'\(seed: 0 → 1\)'),
    (dict(whiten=.5), 'pretext.whiten: 0.0 → 0.5'),
    (dict(views_options=dict(flip_p=0.)), 'pretext.views_options.flip_p: None → 0.0'),
    (dict(backbone_options=dict(widths=(4, 16))), r'backbone_options.widths: \[4, 8\] → \[4, 16\]'),
    (dict(epochs=3, lr=.5), 'pretext.epochs: 2 → 3|pretext.lr: 0.4 → 0.5')])
def test_other_settings_are_refused(run, change, said):
    before, other = listing(run), dataclasses.replace(SIMCLR, **change)
    refused(f'holds other results .*{said}.*choose another folder', begin, run, [other])
    assert listing(run) == before

def test_other_images_are_refused(run):
    changed = pictures()
    changed.images[3, 0, 4, 4] ^= 1
    for images, said in (({'all': changed}, 'images.all.sha256: '), ({'train': pictures()}, 'images.all'),
                         ({'all': pictures()[:9]}, 'images.all.images: 12 → 9'),
                         ({'all': pictures(), 'test': pictures(1)}, 'images.test'),
                         ({'all': pictures(), 'pretext': pictures(1)}, 'images.pretext')):
        refused(said, begin, run, images=images)

def test_images_for_the_pretext_task_alone_matter_to_it_alone(tmp_path):
    begin(tmp_path, [SIMCLR, SCAN], {'all': pictures(), 'pretext': pictures(1)})
    begin(tmp_path, [SCAN], {'all': pictures()})
    refused('images.pretext', begin, tmp_path, [SIMCLR], {'all': pictures()})

def test_labels_and_names_of_images_do_not_matter(run):
    images = pictures()
    named = ImageSet(images.images, torch.arange(N) % 3, ['a', 'b', 'c'], [f'{i}.png' for i in range(N)])
    begin(run, images={'all': named})

def test_another_device_is_refused(run):
    refused('device: cpu → cuda', begin, run, device='cuda')

def test_other_weights_to_start_from_are_refused(run, made):
    scan, moco, simclr = (made[1][name] for name in ('scan', 'moco', 'simclr'))
    begin(run, [SCAN], start=moco.sha256)
    before = listing(run)
    refused(f'start: {moco.sha256} → {simclr.sha256}', begin, run, [SCAN], start=simclr.sha256)
    assert listing(run) == before
    begin(run, [SIMCLR, SCAN, SELF])   # not known yet: nothing is forgotten
    assert listing(run) == before
    assert json.loads((run/'selflabel/stage.json').read_text())['start'] == scan.sha256

def test_a_start_is_noted_when_it_is_known(tmp_path):
    begin(tmp_path, [SIMCLR, SCAN])
    begin(tmp_path, [SCAN], start='abc')
    refused('start: abc → abd', begin, tmp_path, [SCAN], start='abd')

def test_a_folder_from_before_a_setting_existed_is_continued(run):
    file = run/'scan/stage.json'
    now = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in now.items() if k not in ('precision', 'scan.head_choice')}
                               | dict(scan_nb='0.0.1')))
    begin(run, [SCAN])
    assert json.loads(file.read_text()) == now
    refused('scan.head_choice: loss → both', begin, run, [dataclasses.replace(SCAN, head_choice='both')])

def test_equal_settings_in_other_words_are_not_refused(run):
    begin(run, [dataclasses.replace(SIMCLR, backbone_options=dict(widths=[np.int64(4), 8]), seed=np.int32(0),
                                    lr_decay_epochs=[], more_views=[], temperature='.1')])

def test_two_pretext_tasks_live_side_by_side(tmp_path):
    begin(tmp_path, [SIMCLR])
    begin(tmp_path, [MOCO])
    assert {str(p) for p in listing(tmp_path)} == {'pretext/simclr/stage.json', 'pretext/moco/stage.json'}

def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    refused('is not empty and holds no run: choose another folder', begin, tmp_path)
    refused('is a file: give a folder', begin, tmp_path/'notes.txt')
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']

def test_an_empty_folder_and_hidden_files_are_fine(tmp_path):
    for i, names in enumerate([(), ('.DS_Store',), ('.gitkeep', '.git/config')]):
        folder = tmp_path/f'{i}'
        folder.mkdir()
        for name in names:
            (folder/name).parent.mkdir(exist_ok=True)
            (folder/name).touch()
        assert begin(folder) == folder and (folder/'pretext/simclr/stage.json').exists()
    (tmp_path/'0'/'notes.txt').touch()   # a run folder may get other files later
    begin(tmp_path/'0')

# -- what belongs together --

def stages_of(outcomes): return [o.recipe for o in outcomes]

def test_a_run_gives_its_stages_in_their_order(made):
    folder, outcomes = made
    found = read_run(str(folder))
    assert stages_of(found) == [MOCO, SCAN, SELF]   # SimCLR is newer, but SCAN began with MoCo
    assert all(same(o, outcomes[name]) for o, name in zip(found, ('moco', 'scan', 'selflabel')))

@pytest.mark.parametrize('gone, left', [
    (['selflabel/model.pth.tar'], [MOCO, SCAN]), (['selflabel/outcome.pth.tar'], [MOCO, SCAN]),
    (['selflabel', 'scan'], [SIMCLR]), (['selflabel', 'scan/model.pth.tar'], [SIMCLR]),
    (['selflabel', 'scan', 'pretext/simclr'], [MOCO]), (['pretext/simclr'], [MOCO, SCAN, SELF])])
def test_however_far_it_has_come(run, gone, left):
    for name in gone: shutil.rmtree(run/name) if (run/name).is_dir() else (run/name).unlink()
    assert stages_of(read_run(run)) == left

def test_a_stage_that_began_elsewhere_stands_alone(tmp_path):
    "SCAN from a file of weights: the features beside it are not its own."
    finish(tmp_path, SIMCLR)
    finish(tmp_path, SCAN, outcome(MOCO, seed=9))
    assert stages_of(read_run(tmp_path)) == [SCAN]

def test_a_result_of_what_is_there_no_more_does_not_count(run, made):
    "SCAN was repeated from other features: self-labelling of the old one is no result of this run."
    shutil.rmtree(run/'scan')
    scan = finish(run, SCAN, made[1]['simclr'], seed=8)
    assert stages_of(read_run(run)) == [SIMCLR, SCAN] and read_run(run)[-1].sha256 == scan.sha256

def test_what_a_run_gives_is_the_model_it_has(run):
    "New features after all: `model.safetensors` is theirs, so the rest is of the past."
    shutil.rmtree(run/'pretext/moco')
    newest = finish(run, MOCO, seed=7)
    assert read_run(run)[-1].sha256 == newest.sha256

def test_no_run(tmp_path):
    begin(tmp_path/'begun')
    for folder in (tmp_path/'begun', tmp_path, tmp_path/'missing'):
        refused('is not a run folder: no stage is finished there', read_run, folder)

def test_a_stage_without_its_stage_file_is_named(run):
    (run/'selflabel/stage.json').unlink()
    refused(r'selflabel/stage\.json', read_run, run)

# -- files of the authors --

def theirs(folder, content, near=None, name='model.pth.tar'):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder/name)
    if near is not None: np.save(folder/'topk-train-neighbors.npy', near)
    return folder/name

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s}, lambda s: {'model': s, 'epoch': 500},
                                  lambda s: {'state_dict': s, 'epoch': 800, 'arch': 'resnet50'}],
                         ids=['raw', 'model', 'checkpoint', 'MoCo'])
def test_their_weights_are_read_with_our_recipe(tmp_path, wrap):
    ours = outcome(SIMCLR)
    file = theirs(tmp_path/'pretext', wrap(ours.weights['model']))
    found = Outcome.read(file, dataclasses.replace(SIMCLR, mean=[.4], std=[.3]), SHAPE)
    assert found.neighbors is None and found.embeddings is None and found.file == file and found.steps == {}
    assert found.sha256 == ours.sha256
    assert equal_weights(found.load(), ours.load())

def test_their_neighbors_begin_with_the_image_itself(tmp_path):
    ours = outcome(SIMCLR)
    with_itself = np.c_[np.arange(N), ours.neighbors.numpy()]
    file = theirs(tmp_path/'theirs', ours.weights['model'], with_itself)
    assert torch.equal(Outcome.read(file, SIMCLR, SHAPE).neighbors, ours.neighbors)
    file = theirs(tmp_path/'ours', ours.weights['model'], ours.neighbors.numpy())
    assert torch.equal(Outcome.read(file, SIMCLR, SHAPE).neighbors, ours.neighbors)

@pytest.mark.parametrize('seed', range(5))
def test_their_neighbors_hold_the_image_itself_in_any_column(tmp_path, seed):
    "Behind exact copies, or not at all where there are many."
    rng, ours = np.random.default_rng(seed), outcome(SIMCLR)
    near = ours.neighbors.numpy()
    rows, want = [], []
    for i, row in enumerate(near):
        at = rng.integers(len(row) + 2)   # beyond the last: it is not there
        rows.append([*row[:at], i, *row[at:]] if at <= len(row) else [*row, (row[-1] + 1) % N])
        want.append(row)
    file = theirs(tmp_path/'theirs', ours.weights['model'], np.array(rows))
    assert Outcome.read(file, SIMCLR, SHAPE).neighbors.tolist() == np.array(want).tolist()

def test_another_file_beside_ours_is_not_taken_for_it(run):
    "Weights under another name are a foreign file, even in the folder of a stage."
    file = theirs(run/'scan', outcome(SCAN, seed=9).weights, name='older.pth.tar')
    found = Outcome.read(file, SCAN, SHAPE)
    assert found.sha256 == outcome(SCAN, seed=9).sha256 and found.steps == {} and found.note == ''
    assert torch.equal(found.neighbors, outcome(SCAN).neighbors)

@each_damage
def test_damaged_files_of_theirs_are_named(tmp_path, how):
    ours = outcome(SIMCLR)
    for name in ('model.pth.tar', 'topk-train-neighbors.npy'):
        file = theirs(tmp_path/f'of {name}', ours.weights['model'], ours.neighbors.numpy())
        harm(file.with_name(name), how)
        assert str(file.with_name(name)) in refused('damaged', Outcome.read, file, SIMCLR, SHAPE)
    refused('There is no file', Outcome.read, tmp_path/'nowhere.pth.tar', SIMCLR, SHAPE)
