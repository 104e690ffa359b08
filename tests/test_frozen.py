"Features of a network that others trained: weights, sizes, channels, one pass, and a kill in between."
import numpy as np
import pytest, timm, torch
from PIL import Image
from torch.nn import functional as F
from scan_nb import frozen, pipeline, report, stages
from scan_nb.cli import main
from scan_nb.data import UserError, digits, to_color
from scan_nb.frozen import (FEATURES, FrozenNet, embed_blocks, find_features, load_frozen, make_frozen)
from scan_nb.neighbors import embed
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import find_recipe, load_stages, to_yaml
from scan_nb.recipes import frozen_recipe
from scan_nb.run_folder import read_run
from scan_nb.sources import as_image_set
from scan_nb.stages import Stage
from scan_nb.training import Checkpoint, seeded

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = 'timm:test_efficientnet.r160_in1k'   # of timm's own tests: a third of a million weights
FEW = {'pretext.n_neighbors': 3, 'scan.tried_heads': 3, 'scan.heads_epochs': 3}

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp('weights')/'tiny.pt'
    with seeded(0): net = timm.create_model('test_efficientnet')
    torch.save(net.state_dict(), file)
    return str(file)

@pytest.fixture(scope='module')
def recipe(weights): return frozen_recipe(TINY, weights).change(FEW | {'n_clusters': 3})

@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    "They take longer than a tiny run."
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})

@pytest.fixture
def passed(monkeypatch): # images that went through a network
    seen, forward = [], FrozenNet.forward
    def watched(self, x):
        seen.append(len(x))
        return forward(self, x)
    monkeypatch.setattr(FrozenNet, 'forward', watched)
    return seen

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(30):
        side = int(rng.integers(150, 200))
        x = np.full((side, side + 20, 3), rng.integers(0, 256, 3), np.uint8)
        x[rng.integers(side):, :, i % 3] = 255
        Image.fromarray(x).save(folder/f'{i:02}.png')
    return folder

# -- the network --

def test_short_names_are_models_with_weights():
    known = timm.list_pretrained()
    for model, side in FEATURES.values():
        assert model in known and side % 16 in (0, 2 if 'patch14' in model else 0, side % 14)

def test_a_name_of_timm_has_the_size_it_was_tested_with():
    assert find_features('timm:resnet18.a1_in1k') == ('resnet18.a1_in1k', 288)

@pytest.mark.parametrize('name', ['dinov9', 'timm:nothing', 'timm:', '', 'resnet18', 'timm:resnet18.nowhere'])
def test_an_unknown_name_gets_the_closest(name):
    with pytest.raises(UserError, match='did you mean'): find_features(name)

def test_without_timm(monkeypatch):
    monkeypatch.setattr(frozen, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install timm'): make_frozen('dinov2')

def test_the_network_is_that_of_timm_with_its_own_transform(weights):
    "Compared with timm's transform of the picture itself."
    net = load_frozen(make_frozen(TINY), TINY, weights).eval()
    whole = timm.create_model('test_efficientnet', num_classes=0).eval()
    whole.load_state_dict({k: v for k, v in torch.load(weights).items() if not k.startswith('classifier')})
    config = timm.data.resolve_model_data_config(whole)
    assert net.side == config['input_size'][-1] == 160
    picture = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    ready = timm.data.create_transform(**config | dict(crop_pct=1.))(Image.fromarray(picture))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None]/255
    with torch.no_grad(): torch.testing.assert_close(net(x), whole(ready[None]), atol=1e-4, rtol=1e-4)

def test_a_network_with_another_size(weights):
    net = load_frozen(make_frozen(TINY), TINY, weights).eval()
    x = torch.rand(2, 3, 40, 40)
    big = F.interpolate(x, (160, 160), mode='bicubic', antialias=True).clamp(0, 1)
    with torch.no_grad(): torch.testing.assert_close(net(x), net(big))

@pytest.mark.parametrize('c', [1, 2, 3, 5])
def test_any_channels(c, weights):
    net, x = load_frozen(make_frozen(TINY), TINY, weights).eval(), torch.rand(2, c, 160, 160)
    with torch.no_grad(): assert torch.equal(net(x), net(to_color(x)))

# -- weights --

def test_efficientnet_comes_from_the_installed_package():
    net, again = (load_frozen(make_frozen('efficientnet-lite0'), 'efficientnet-lite0') for _ in range(2))
    for a, b in zip(net.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)

def test_weights_by_name_or_in_order(weights, tmp_path):
    state = torch.load(weights)
    want = load_frozen(make_frozen(TINY), TINY, weights).state_dict()
    for name, changed in dict(
            whole={'state_dict': state}, prefixed={f'module.{k}': v for k, v in state.items()},
            other={f'layer{i}': v for i, v in enumerate(state.values())},
            shuffled=dict(reversed(state.items()))).items():
        torch.save(changed, tmp_path/f'{name}.pt')
        found = load_frozen(make_frozen(TINY), TINY, tmp_path/f'{name}.pt').state_dict()
        assert all(torch.equal(found[k], v) for k, v in want.items()), name

def test_weights_of_another_network(weights, tmp_path):
    state = torch.load(weights)
    first, *_ = state
    none = f'has no {first!r}'
    for changed, said in (({k: v for k, v in state.items() if k != first}, none), ({}, none),
                          (state | {first: torch.zeros(3)}, f'another shape of {first!r}'),
                          ({'a': torch.zeros(2)}, none)):
        torch.save(changed, tmp_path/'w.pt')
        with pytest.raises(UserError, match=said) as e: load_frozen(make_frozen(TINY), TINY, tmp_path/'w.pt')
        assert str(tmp_path/'w.pt') in str(e.value)

def test_no_hub(monkeypatch):
    def offline(name, pretrained=False, **options):
        if pretrained: raise OSError('cannot reach the hub')
        return create(name, **options)
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(UserError, match='go online, or .*--weights'): load_frozen(make_frozen(TINY), TINY)

# -- blocks --

def test_blocks_continue_and_are_checked(tmp_path):
    x, seen = torch.arange(70.).view(70, 1, 1, 1), []
    def read(part):
        seen.append(len(part))
        return part.flatten(1)*2
    want = embed_blocks(read, x, block=32)
    assert torch.equal(want, x.flatten(1)*2) and seen == [32, 32, 6]
    embed_blocks(read, x, tmp_path, 'train', block=32)
    (tmp_path/'features-train-1.pth.tar').unlink()
    seen.clear()
    assert torch.equal(embed_blocks(read, x, tmp_path, 'train', block=32), want) and seen == [32]
    file = tmp_path/'features-train-0.pth.tar'
    raw, named = file.read_bytes(), 0
    for at in range(0, len(raw), 7):
        wrong = bytearray(raw)
        wrong[at] ^= 1
        file.write_bytes(wrong)
        try: assert torch.equal(embed_blocks(read, x, tmp_path, 'train', block=32), want)
        except UserError as e: named += 'features-train-0' in str(e)
    assert named > 20

def test_a_deeper_network_of_the_same_family_is_refused(tmp_path):
    "It has every tensor that is wanted, in the shape that is wanted, and more blocks."
    torch.save(timm.create_model('tf_efficientnet_lite1', num_classes=0).state_dict(), tmp_path/'w.pt')
    with pytest.raises(UserError, match="another network: it also has 'blocks"):
        load_frozen(make_frozen('efficientnet-lite0'), 'efficientnet-lite0', tmp_path/'w.pt')

# -- runs --

def test_each_image_passes_once(recipe, passed, tmp_path):
    data = digits()[:60]
    scan = SCAN(recipe=recipe, device='cpu', out=tmp_path/'run').fit(data[:40], test=data[40:])
    assert sum(passed) == 60
    assert scan.metrics_['splits']['test']['n_images'] == 20
    assert 'kmeans_features' in scan.metrics_['baselines']
    passed.clear()
    again = SCAN(recipe=recipe, device='cpu', out=tmp_path/'run').fit(data[:40], test=data[40:])
    assert not passed and (again.labels_ == scan.labels_).all()

def test_other_heads_on_the_same_features(recipe, passed, tmp_path, capsys):
    """In another folder: only heads are trained anew, and no time is told, since that takes seconds.
    Other images and other networks have other features."""
    data = digits()[:40]
    a = SCAN(recipe=recipe, device='cpu', out=tmp_path/'a', progress=True).fit(data)
    assert 'About 1 minute' in capsys.readouterr().err
    passed.clear()
    b = SCAN(4, recipe=recipe, device='cpu', out=tmp_path/'b', progress=True).fit(data)
    assert not passed and (a.embeddings_ == b.embeddings_).all() and 'About' not in capsys.readouterr().err
    for file in stages.cache_dir().glob('features-*/*-0.pth.tar'): file.unlink()   # the last block
    SCAN(5, recipe=recipe, device='cpu', out=tmp_path/'e', progress=True).fit(data)
    assert sum(passed) == 40 + 8 and 'About 1 minute' in capsys.readouterr().err
    passed.clear()
    SCAN(recipe=recipe, device='cpu', out=tmp_path/'c').fit(digits()[40:80])
    assert sum(passed) == 40
    SCAN(recipe=recipe, device='cpu').fit(data)   # in memory nothing is kept
    assert sum(passed) == 80

def test_one_map_of_the_same_features(recipe, tmp_path, monkeypatch):
    "Runs that differ in their clusters share it; other features, or another seed, have another."
    data, drawn, embed_2d = digits()[:40], [], report.embed_2d
    monkeypatch.setattr(report, 'embed_2d', lambda z, seed: drawn.append(seed) or embed_2d(z, seed))
    def points(name, images=data, k=3, **more):
        SCAN(k, recipe=recipe, device='cpu', out=tmp_path/name, **more).fit(images)
        return np.load(tmp_path/name/'examples.npz')['points']
    a, b = points('a'), points('b', k=4)
    assert (a == b).all() and drawn == [0]
    points('c', seed=1)
    points('d', digits()[40:80])
    assert drawn == [0, 1, 0]
    for i, damage in enumerate((b'x', None)):
        for file in (tmp_path/'cache'/'scan_nb').glob('map-*'):
            if damage: file.write_bytes(damage)
            else: Checkpoint(file).save(z=0)
        with pytest.raises(UserError, match='map-'): points(f'e{i}')

def test_predict_agrees_with_the_run(recipe, tmp_path):
    data = digits()[:60]
    scan = SCAN(recipe=recipe, device='cpu', out=tmp_path/'run').fit(data.images)
    loaded = SCAN.load(tmp_path/'run', 'cpu')
    assert (loaded.predict(data) == scan.labels_).all()
    np.testing.assert_allclose(loaded.transform(data), scan.embeddings_, atol=1e-4)

def test_a_kill_between_blocks(recipe, passed, tmp_path, monkeypatch):
    data, blocks = digits()[:60], embed_blocks
    monkeypatch.setattr(stages, 'embed_blocks', lambda *args, **more: blocks(*args, block=20, **more))
    want = SCAN(recipe=recipe, device='cpu').fit(data).labels_
    real, calls = embed, []
    def dies(*args, **more):
        calls.append(0)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(stages, 'embed', dies)
    with pytest.raises(KeyboardInterrupt): SCAN(recipe=recipe, device='cpu', out=tmp_path/'run').fit(data)
    monkeypatch.setattr(stages, 'embed', real)
    passed.clear()
    assert (SCAN(recipe=recipe, device='cpu', out=tmp_path/'run').fit(data).labels_ == want).all()
    assert sum(passed) == 20

@pytest.mark.parametrize('c', [1, 3, 6])
def test_arrays_of_any_size(recipe, c):
    x = np.random.default_rng(0).integers(0, 256, (30, c, 40, 50), dtype=np.uint8)
    scan = SCAN(recipe=recipe, device='cpu').fit(x)
    assert scan.recipe_.size == 40 and scan.recipe_.mean == (0.,)*c and scan.predict(x).shape == (30,)

def test_the_whole_network_when_asked(recipe):
    data = digits()[:40]
    more = recipe.change({f'{s}.{k}': v for s in ('scan', 'selflabel')
                          for k, v in dict(epochs=1, batch_size=20).items()})
    scan = SCAN(recipe=more, device='cpu').fit(data)
    assert list(scan.stages_) == ['pretext', 'neighbors', 'heads', 'scan', 'selflabel']
    assert (scan.predict(data) == scan.labels_).all()

def test_recipe_as_a_file(recipe, tmp_path):
    (tmp_path/'r.yml').write_text(to_yaml(recipe))
    assert load_stages(tmp_path/'r.yml') == recipe.on('cpu').stages
    assert find_recipe('clip').pretext.backbone == 'frozen:clip' and find_recipe('clip').size == 224

@pytest.mark.parametrize('settings', [{'backbone': 'resnet18'},
                                      {'n_networks': 2, 'pretext.more_views': [{}]}])
def test_a_frozen_recipe_needs_its_network(recipe, settings):
    with pytest.raises(UserError, match='frozen needs one network'): recipe.change(settings)

def test_command(pictures, weights, tmp_path, capsys, passed):
    run = tmp_path/'run'
    words = ['run', str(pictures), '--features', TINY, '--weights', weights, '--n-clusters', '3',
             '--device', 'cpu', '--out', str(run), *(w for k, v in FEW.items()
             for w in ('--set', f'{k}={v}'))]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert '160×160' in out and 'Report:' in out and 'is made for a GPU' not in out
    assert sum(passed) == 30 + 8   # eight for the estimate
    assert [o.recipe.stage for o in read_run(run)] == ['pretext', 'scan']
    rows = (run/'clusters.csv').read_text().splitlines()
    assert main(['predict', str(run), str(pictures), '--device', 'cpu']) == 0
    found = capsys.readouterr().out.splitlines()
    assert [r.split(',')[2] for r in found] == [r.split(',')[2] for r in rows]

def test_commands_in_their_order_are_a_run(pictures, weights, tmp_path, capsys, monkeypatch):
    "To the byte; the recipe by the name of the features, or from a file. `eval` takes the newest stage."
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})
    for name in 'ab': (tmp_path/f'{name}.yml').write_text(f'root_dir: {tmp_path}/{name}\n')
    places = dict(data=pictures, test_data=pictures, n_clusters=3)
    few = {'pretext': dict(pretrained=weights, n_neighbors=3), 'scan': dict(tried_heads=3, heads_epochs=3)}
    def sets(**more): return [w for k, v in more.items() for w in ('--set', f'{k}={v}')]
    own = {p: sets(**{f'{p}.{k}': v for k, v in some.items()}) for p, some in few.items()}
    (tmp_path/'r.yml').write_text(to_yaml(frozen_recipe(TINY).on('cpu')))
    for name, config in dict(a=TINY, b=str(tmp_path/'r.yml')).items():
        words = ['--config_exp', config, '--config_env', str(tmp_path/f'{name}.yml'), '--device', 'cpu',
                 *sets(**places)]
        assert main(['scan', *words, *own['scan']]) == 2   # features come first
        assert '`scan-nb frozen`' in capsys.readouterr().err
        assert main(['frozen', *words, *own['pretext']]) == 0
        assert main(['scan', *words, *own['scan']]) == 0
        assert main(['eval', *words, *own['scan']]) == 0
        assert 'all (30 images)' in capsys.readouterr().out.splitlines()[-1]
        for other in ('simclr', 'selflabel'): assert main([other, *words]) == 2
    assert main(['run', str(pictures), '--features', TINY, '--device', 'cpu', '--out', str(tmp_path/'run'),
                 *sets(**places), *own['pretext'], *own['scan']]) == 0
    for file in ('clusters.csv', 'model.safetensors', 'recipe.yml', 'pretext/frozen/embeddings.npy'):
        want = (tmp_path/'run'/file).read_bytes()
        assert all((tmp_path/name/pictures.name/file).read_bytes() == want for name in 'ab'), file

@pytest.mark.parametrize('words, said', [
    (['--features', 'dinov9'], "no features 'dinov9': did you mean 'dinov2'"),
    (['--features', 'clip', '--recipe', 'digits'], 'leave --recipe out'),
    (['--features', TINY, '--weights', 'nowhere.pt'], "no 'nowhere.pt'")])
def test_wrong_words(pictures, tmp_path, capsys, words, said):
    assert main(['run', str(pictures), '--out', str(tmp_path/'run'), '--device', 'cpu', *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in err and not (tmp_path/'run').exists()

def test_what_is_said_of_a_guess_and_of_time(pictures, tmp_path, capsys, monkeypatch):
    def stopped(*args, **more): raise KeyboardInterrupt
    monkeypatch.setattr(SCAN, 'fit', stopped)
    for words, guess in (([], True), (['--n-clusters', '3'], False), (['--n-clusters', 'auto'], False)):
        assert main(['run', str(pictures), '--out', str(tmp_path/'run'), '--device', 'cpu', *words]) == 130
        assert ('10 clusters are a guess' in capsys.readouterr().out) == guess

@pytest.mark.parametrize('minutes, features, files, said', [
    (30, None, True, True), (5, None, True, False), (30, None, False, False), (30, TINY, True, False)])
def test_a_long_run_hears_of_features(recipe, pictures, capsys, monkeypatch, minutes, features, files, said):
    monkeypatch.setattr(pipeline, 'estimate_seconds', lambda *args: dict(pretext=60.*minutes))
    data = as_image_set(str(pictures)) if files else digits()[:30]
    asked = recipe if features else 'folder'
    def stopped(recipe, images, *args, ready, **more):
        ready(Stage(recipe.pretext, images))
        raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'run_stages', stopped)
    with pytest.raises(KeyboardInterrupt): SCAN(3, recipe=asked, device='cpu', progress=True).fit(data)
    err = capsys.readouterr().err
    assert f'About {minutes} minutes' in err and ('--features dinov2' in err) == said
