"Kinds of pictures: their views, and the look that chooses one without labels."
import numpy as np
import pytest
import torch
from PIL import Image
from scan_nb import report
from scan_nb.views import SimCLRAugment
from scan_nb.cli import main
from scan_nb.data import ImageSet, UserError
from scan_nb.datasets import digits, synthetic_aurora
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import load_stages
from scan_nb.recipes import FOLDER, KINDS, VIEWS, Recipe, find_kind, make_views, view_distance
from sklearn.datasets import load_sample_images
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures('one_thread')
ALONE = dict(scale=(1, 1), ratio=(1, 1), flip_p=0, jitter_p=0, gray_p=0)

def parts(n, side=32):
    "Random squares of two photographs."
    g, photos = np.random.default_rng(0), load_sample_images().images
    found = []
    for i in range(n):
        photo, wide = photos[i % 2], int(g.integers(60, 200))
        y, x = (int(g.integers(0, m - wide)) for m in photo.shape[:2])
        found.append(torch.tensor(photo[y:y + wide, x:x + wide]).permute(2, 0, 1)[None].float())
    resized = [torch.nn.functional.interpolate(p, (side, side), mode='area') for p in found]
    return torch.cat(resized).round().byte()

def things(n, side=24):
    "Bright ellipses and boxes amid black, as often the one side up as the other."
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)]*2, indexing='ij')
    a, b, box = (torch.rand(n, 1, 1, generator=g) for _ in range(3))
    far = torch.where(box < .5, ((x/(.3 + .4*a))**2 + (y/(.3 + .4*b))**2).sqrt(),
                      torch.maximum((x/(.3 + .4*a)).abs(), (y/(.3 + .4*b)).abs()))
    return ((far < 1)*(120 + 120*torch.rand(n, 1, 1, generator=g))).byte()[:, None]

@pytest.mark.parametrize('images, kind', [
    (digits().images, 'handwriting'), (digits().images[:400], 'handwriting'),
    (digits().images.expand(-1, 3, -1, -1), 'handwriting'), (synthetic_aurora(400).images, 'all-sky'),
    (synthetic_aurora(400, 96, channels=3).images, 'all-sky'), (things(600), 'silhouettes'),
    (parts(400), 'photographs'), (digits().images[:199], 'photographs'),
    (torch.zeros(300, 2, 5, 9, dtype=torch.uint8), 'photographs'),
    (torch.full((250, 1, 28, 28), 200, dtype=torch.uint8), 'photographs')])
def test_the_kind_is_seen_and_the_reason_told(images, kind):
    found, why = find_kind(images)
    assert found == kind and 5 < len(why) < 80
    assert find_kind(images) == (found, why)   # no draw

def test_distance_by_brute_force():
    images = (torch.rand(60, 1, 32, 32, generator=torch.Generator().manual_seed(1))*255).byte()
    share, ratio = view_distance(images, lambda x, generator: x.flip(3))
    x = images.double().numpy()[:, 0]/255
    x = x.reshape(60, 16, 2, 16, 2).mean((2, 4))
    def tenth(seen):
        d = np.sqrt(((seen[:, None] - x[None])**2).sum((2, 3)))
        np.fill_diagonal(d, np.inf)
        return np.sort(d, 1)[:, 9]
    own, other = tenth(x), tenth(x[:, :, ::-1])
    assert_close([share, ratio], [(other > own).mean(), np.sort(other/own)[29]], atol=1e-4, rtol=1e-4)

def test_the_same_image_is_no_farther_and_a_blank_one_is():
    images = digits().images
    assert view_distance(images, lambda x, generator: x) == (0, 1)
    share, ratio = view_distance(images, lambda x, generator: 1 - x)
    assert share == 1 and ratio > 1.5

@pytest.mark.parametrize('views', VIEWS)
@pytest.mark.parametrize('kind', KINDS)
def test_settings_of_a_kind_reach_the_views(kind, views):
    made = make_views(views, 24, {}, kind)
    for name, value in KINDS[kind].get(views, {}).items(): assert getattr(made, name) == value
    assert make_views(views, 24, dict(flip_p=.25), kind).flip_p == .25   # what is given goes before
    assert repr(make_views(views, 24, {}, 'auto')) == repr(make_views(views, 24, {}))
    x = torch.rand(5, 3, 30, 30)
    assert made(x, torch.Generator().manual_seed(0)).shape == (5, 3, 24, 24)
    assert {'simclr', 'standard', 'ours'} == {*VIEWS} >= {*KINDS[kind]}

def test_a_recipe_takes_the_kind_of_its_images():
    data = digits()
    assert Recipe.for_images(data).kind == 'handwriting'
    assert Recipe.for_images(data, base=FOLDER.change({'kind': 'microscopy'})).kind == 'microscopy'
    with pytest.raises(UserError, match="kind is 'drawings': give auto or photographs or handwriting"):
        FOLDER.change({'kind': 'drawings'})
    r = Recipe.for_images(data, base=FOLDER.change({'pretext.views_options.rotation': 3})).pretext
    made = make_views(r.views, 8, r.views_options, r.kind)
    assert made.rotation == 3 and made.flip_p == 0 and made.scale == (.6, 1.3)

SHORT = {'pretext.epochs': 1, 'scan.epochs': 1, 'selflabel.epochs': 1, 'scan.tried_heads': 2,
         'scan.heads_epochs': 2, 'backbone_options.widths': [8, 16]}

def test_a_run_says_the_kind_and_keeps_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'.cache'))
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})
    (tmp_path/'pngs').mkdir()
    data = digits()[:240]
    for i, x in enumerate(data.images): Image.fromarray(x[0].numpy()).save(tmp_path/f'pngs/{i:03d}.png')
    words = [f'--set={name}={value}'.replace(' ', '') for name, value in SHORT.items()]
    command = ['run', str(tmp_path/'pngs'), '--n-clusters', '10', '--device', 'cpu', *words]
    assert main([*command, '--out', str(tmp_path/'auto')]) == 0
    said = capsys.readouterr()
    assert 'Views: as for handwriting, since 9' in said.out and '--kind says otherwise' in said.out
    assert '--features' not in said.err
    kinds = {r.kind for r in load_stages(tmp_path/'auto/recipe.yml').values()}
    assert kinds == {'handwriting'}
    assert main([*command, '--out', str(tmp_path/'named'), '--kind', 'handwriting']) == 0
    assert 'Views:' not in capsys.readouterr().out
    assert (tmp_path/'auto/clusters.csv').read_bytes() == (tmp_path/'named/clusters.csv').read_bytes()
    estimator = SCAN(10, recipe=FOLDER.change(SHORT), device='cpu').fit(tmp_path/'pngs')   # every door
    assert estimator.recipe_.kind == 'handwriting'
    assert (estimator.labels_ == SCAN.load(tmp_path/'auto', 'cpu').predict(tmp_path/'pngs')).all()
    assert main([*command, '--kind', 'drawing']) == 2 and 'kind' in capsys.readouterr().err

def test_every_stage_uses_the_kind(monkeypatch):
    seen = []
    draw = SimCLRAugment.draw
    monkeypatch.setattr(SimCLRAugment, 'draw', lambda self, *a: seen.append(self.flip_p) or draw(self, *a))
    recipe = FOLDER.change(SHORT | {'scan.views': 'simclr', 'selflabel.views': 'simclr'})
    SCAN(10, recipe=recipe.change({'kind': 'handwriting'}), device='cpu').fit(digits()[:60])
    assert len(seen) >= 3 and {*seen} == {0}
    seen.clear()
    SCAN(10, recipe=recipe.change({'kind': 'photographs'}), device='cpu').fit(ImageSet(digits().images[:60]))
    assert {*seen} == {.5}
