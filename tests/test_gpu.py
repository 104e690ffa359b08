"Each stage for real, where there is a GPU: the numbers of a CPU, no wait in a step, the same after loading."
import os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from scan_nb.ahead import each
from scan_nb.data import digits
from scan_nb.moco import MoCo, moco_step
from scan_nb.models import ClusteringModel, ContrastiveModel, small_resnet
from scan_nb.neighbors import unit_rows
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.pipeline import SCAN
from scan_nb.recipe_files import PRESETS
from scan_nb.scan import _heads_step, _picker, train_heads, validate_scan
from scan_nb.selflabel import EMA, _step
from scan_nb.simclr import simclr_step
from scan_nb.training import make_generator, make_optimizer, seeded, update
from scan_nb.views import SimCLRAugment, StrongAugment, WeakAugment
from scan_nb.whole_network import Pairs, _scan_step

if not torch.cuda.is_available(): pytest.skip('no GPU', allow_module_level=True)

REPO, GPU = Path(__file__).resolve().parents[1], torch.device('cuda')
IMAGES = torch.randint(256, (64, 3, 32, 32), generator=make_generator(0), dtype=torch.uint8)
VIEWS = dict(simclr=SimCLRAugment(32, rotation=20., blur_p=.5, erase=3, tint_p=.5, strip_p=.5, disc=True),
             weak=WeakAugment(24), strong=StrongAugment(32))

@pytest.mark.parametrize('held', ['cpu', 'cuda'])
@pytest.mark.parametrize('kind', VIEWS)
def test_views_are_those_of_a_cpu(kind, held):
    "But for pixels on the edge between two levels."
    here, there = (VIEWS[kind](x, make_generator(1), n=2).cpu() for x in (IMAGES, IMAGES.to(GPU)))
    assert ((here - there).abs() > 1e-4).float().mean() < 2e-3

def steps(kind, held):
    "The step of a stage, what it trains, and indices."
    x, rows, near = IMAGES.to(held), torch.arange(32), torch.arange(128).view(64, 2) % 64
    g = make_generator(0)
    with seeded(0): model = ContrastiveModel(small_resnet(3, (8, 16))).to(GPU)
    if kind == 'simclr': return simclr_step(model, x, VIEWS['simclr'], .5, g), model, rows
    if kind == 'moco': return moco_step(MoCo(model, IMAGES[:1], 48), x, VIEWS['weak'], .2, g), model, rows
    with seeded(0): model = ClusteringModel(small_resnet(3, (8, 16)), 5).to(GPU).train()
    if kind == 'scan':
        loss = dict(entropy_weight=5., prior=None)
        return _scan_step(model, x, Pairs(near), VIEWS['strong'], loss, False, g), model, rows
    if kind == 'selflabel':
        return _step(model, EMA(model, .9), x, VIEWS['strong'], None, g, 5., None, threshold=.1), model, rows
    z, g, near = torch.randn(64, 16, device=GPU), make_generator(0, GPU), near.to(GPU)
    with seeded(0): heads = ClusteringModel(small_resnet(3, (8, 16)), 5, 4).cluster_head.to(GPU)
    step = _heads_step(heads, _picker(z, None, 0., 1., g), near, 5., None, g, 'scan')
    return step, heads, rows.to(GPU)

class Settings:
    optimizer, lr, weight_decay, momentum, nesterov = 'adam', 1e-3, 1e-4, .9, False

@pytest.mark.parametrize('held', ['cpu', 'cuda'])
@pytest.mark.parametrize('kind', ['simclr', 'moco', 'scan', 'selflabel', 'heads'])
def test_no_step_waits(kind, held):
    "PyTorch itself watches; the first steps compile programs and choose algorithms."
    step, model, rows = steps(kind, held)
    optimizer = make_optimizer(Settings, model.parameters())
    def train():
        for losses in each(step, [rows]*3): update(losses, optimizer)
    train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: train()
    finally: torch.cuda.set_sync_debug_mode('default')

def test_neighbors_are_the_brute_force():
    z = torch.randn(3000, 64, generator=make_generator(0))
    near = mine_neighbors(z.to(GPU), 20).cpu()
    exact = unit_rows(z).double()
    cosine = (exact @ exact.T).fill_diagonal_(-2)
    found, best = cosine.gather(1, near), cosine.topk(20).values
    assert torch.allclose(found, best, atol=1e-6)

def test_heads_and_their_losses():
    z = torch.randn(500, 16, generator=make_generator(0))
    near = mine_neighbors(z, 5)
    found = train_heads(z.to(GPU), near.to(GPU), 4, n_heads=3, epochs=3)
    logits = found.heads(z.to(GPU)).detach()
    for there, here in zip(validate_scan(logits, near.to(GPU)), validate_scan(logits.cpu(), near)):
        assert torch.allclose(there.cpu(), here, atol=1e-4)

@pytest.mark.parametrize('precision', ['bf16', 'float32'])
def test_the_same_clusters_after_loading(tmp_path, precision):
    recipe = PRESETS['digits'].change({'precision': precision, 'pretext.epochs': 3, 'scan.epochs': 1,
                                       'selflabel.epochs': 1, 'scan.tried_heads': 4, 'scan.heads_epochs': 5})
    scan = SCAN(10, recipe=recipe, device='cuda', out=tmp_path/'run').fit(digits().images)
    scan.save(tmp_path/'saved')
    for folder in (tmp_path/'run', tmp_path/'saved'):
        loaded = SCAN.load(folder, device='cuda')
        assert np.array_equal(loaded.predict(digits().images), scan.labels_)

def test_what_pretends_to_be_a_gpu_works_beside_one():
    "In a process that does not see it: see the fixture `gpu` of test_placement."
    words = '-m pytest -q -p no:cacheprovider tests/test_placement.py tests/test_views.py'.split()
    done = subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(REPO)})
    assert done.returncode == 0, done.stdout[-3000:]
