"Two processes over gloo do what one does with the whole batch: losses, gradients, weights, features, files."
import copy, io, json, os, re, signal, subprocess, sys, time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
import pytest, torch
import torch.distributed as dist
from PIL import Image
from scan_nb import distributed, files as files_room, moco, report, training
from scan_nb.views import SimCLRAugment
from scan_nb.cli import main
from scan_nb.data import UserError, digits
from scan_nb.datasets import atomic_write
from scan_nb.distributed import (JointBatchNorm, batches, check_shares, from_first, gather, joined,
                                 own_numbers, place, processes, shares, update)
from scan_nb.exchange import exchange_parts
from scan_nb.models import ClusteringModel, small_resnet
from scan_nb.moco import MoCo, moco_step, shuffled_keys
from scan_nb.neighbors import embed, embed_views
from scan_nb.recipe_files import to_yaml
from scan_nb.recipes import PretextRecipe, Recipe, ScanRecipe, SelfLabelRecipe
from scan_nb.scan import logits_of, train_heads
from scan_nb.selflabel import EMA, _step
from scan_nb.simclr import simclr_step, train_simclr
from scan_nb.stages import LABELS
from scan_nb.training import Checkpoint, CosineSchedule, make_generator, seeded
from scan_nb.whole_network import Pairs, _scan_step
from shell import serve, two, without_figures
from torch import nn
from torch.nn import functional as F

REPO = Path(__file__).parents[1]
IMAGES = digits().images[:96]
NEIGHBORS = torch.arange(96)[:, None].add(torch.tensor([1, 2])) % 96
pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module', autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield

class Net(nn.Module):
    "Images to unit vectors, all in float64: differences are then the method's, not the rounding's."
    def __init__(self):
        super().__init__()
        with seeded(0): self.backbone, self.head = small_resnet(1, (4, 8)), nn.Linear(8, 6)
        self.double()
    def embed(self, x): return self.backbone(x.double()/255)
    def forward(self, x): return F.normalize(self.head(self.embed(x)), dim=1)

class Net3(ClusteringModel):
    "Three clusters, in float64 (the losses compute in float32)."
    def __init__(self, n_heads=1):
        with seeded(1): super().__init__(small_resnet(1, (4, 8)), 3, n_heads)
        self.double()
    def embed(self, x): return self.backbone(x.double()/255)

def view(x, generator=None):
    "The same in every process."
    return x.flip(3)

class Views:
    "Two views of an image, in turn."
    def __init__(self): self.calls = 0
    def __call__(self, x, generator):
        self.calls += 1
        return x if self.calls % 2 else x.flip(3)

# ---- the same steps, alone or as a share -------------------------------------------------------------------

def run_steps(step, model, n=12, steps=2, networks=None):
    "Losses, gradients and states after updates with two batches, of which this process gets its share."
    optimizer, losses, (rank, world) = torch.optim.SGD(model.parameters(), .1), [], place()
    with joined(*(networks or [model])):
        for i in range(steps):
            rows = torch.arange(i*n, (i + 1)*n)
            losses.append({k: v.item() for k, v in update(step(rows.chunk(world)[rank]), optimizer).items()})
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return dict(losses=losses, grads=grads, state=copy.deepcopy(model.state_dict()))

def simclr():
    model = Net()
    return run_steps(simclr_step(model, IMAGES, Views(), .3, make_generator(0)), model)

def momentum():
    model = Net()
    state = MoCo(model, IMAGES[:1], 20).double()
    step = moco_step(state, IMAGES, Views(), .3, make_generator(0))
    found = run_steps(step, model, networks=[state], steps=3)
    return found | dict(queue=state.queue, owners=state.owners)

def scan(n_heads=1, head_only=False):
    model, prior = Net3(n_heads), torch.tensor([.5, .3, .2])
    pairs, loss = Pairs(NEIGHBORS[:, :1]), dict(entropy_weight=2., prior=prior)
    return run_steps(_scan_step(model, IMAGES, pairs, view, loss, head_only, make_generator(0)), model)

def selflabel(threshold=.4, ema=True, **lesson):
    model = Net3().train()
    slow = EMA(model, .5) if ema else None
    step = _step(model, slow, IMAGES, view, lambda x, g: x, make_generator(0), 1., None, threshold=threshold,
                 balance=True, soft=False, **lesson)
    return run_steps(step, model)

def most_confident():
    "The highest confidence among the first twelve images, and the process that has it."
    confidence = logits_of(Net3(), IMAGES[:12]).softmax(1).amax(1)
    return confidence.max().item() - 1e-6, confidence.argmax().item()//6

def one_teacher(): return selflabel(threshold=most_confident()[0], ema=False)

def no_teacher(): return selflabel(threshold=.9999)

STEPS = dict(simclr=simclr, moco=momentum, scan=scan, scan_heads=partial(scan, 3),
             scan_head_only=partial(scan, 1, True), selflabel=selflabel, one_teacher=one_teacher,
             no_teacher=no_teacher)

def heads():
    z = torch.randn(90, 5, generator=make_generator(0))
    found = train_heads(z, NEIGHBORS[:90] % 90, 3, n_heads=4, epochs=2, batch_size=30)
    return dict(weight=found.heads.weight.detach(), losses=found.losses)

def exchange():
    "Three heaps, which two processes have to find as one does."
    z = torch.randn(90, 5, generator=make_generator(0)) + 8*torch.eye(3, 5).repeat(30, 1)
    near = (torch.arange(90)[:, None] + torch.tensor([3, 6, 9, 12])) % 90
    first = train_heads(z, near, 3, n_heads=6, epochs=4, batch_size=30)
    better = exchange_parts(first, z, near, rounds=2)
    with torch.no_grad(): said = better.heads(z)[better.best].argmax(1)
    return dict(weight=better.heads.weight.detach(), clusters=said, losses=better.losses)

# ---- the rest of what processes do -------------------------------------------------------------------------

def features():
    "`embed` and `logits_of` at sizes that two can and cannot share."
    sizes = (1, 2, 7, 8, 33)
    found = {f'embed {n}': embed(Net(), IMAGES[:n], 4) for n in sizes}
    found |= {f'logits {n}': logits_of(Net3(2), IMAGES[:n], 4, head=None) for n in sizes}
    return found | {'one head': logits_of(Net3(2), IMAGES[:7], 4, head=1)}

VIEWS = SimCLRAugment(8, scale=(.6, 1.4), flip_p=0, rotation=15)

class Killed(Exception): pass

def fit(checkpoint=None, end=None, seed=0):
    model = Net()
    with seeded(seed): nn.init.normal_(model.head.weight)
    kinds = [type(m) for m in model.modules()]
    def monitor(epoch):
        if epoch == end: raise Killed
        return dict(size=embed(model, IMAGES[:5]).norm())
    history = train_simclr(model, IMAGES, VIEWS, epochs=3, batch_size=32, temperature=.5, monitor=monitor,
                           checkpoint=checkpoint)
    assert kinds == [type(m) for m in model.modules()] and JointBatchNorm not in kinds
    return model.state_dict(), history

def twice(folder):
    "Two runs of three epochs: one without a stop, the other stopped and continued from other weights."
    state, history = fit()
    saved = Checkpoint(folder/'run.pt')
    try: fit(saved, end=2)
    except Killed: pass
    dist.barrier()
    written = len(saved.load()['history'])
    again = fit(saved, seed=9)
    return dict(state=state, history=history, again=again, written=written)

def odds(rank):
    "Small things: shares, random numbers, decisions of the first process, what is refused."
    def refused(n, size):
        try: check_shares(n, size)
        except UserError as e: return str(e)
    g = make_generator(3)
    order = batches(20, 8, g)
    with own_numbers(g): own = torch.rand(4, generator=g)
    with seeded(rank): module = nn.Linear(2, 2)
    with joined(module): pass
    return dict(place=place(), order=order, own=own, joint=torch.rand(4, generator=g), first=from_first(rank),
                small=batches(5, 8, make_generator(3)), refused=[refused(20, 7), refused(1, 8)],
                shares=shares(5, 2), joined=module.weight.detach(),
                views=embed_views(Net(), IMAGES[:7], VIEWS, 2), columns=gather(torch.tensor([[rank]]), 1))

def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    steps = STEPS | dict(heads=heads, exchange=exchange, features=features)
    found = {name: make() for name, make in steps.items()}
    found |= dict(training=twice(folder), odds=odds(rank))
    torch.save(found, folder/f'{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What each of two processes found."
    folder = tmp_path_factory.mktemp('two')
    serve()
    torch.multiprocessing.start_processes(process, (folder,), nprocs=2, start_method='forkserver')
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in (0, 1)]

def same(a, b):
    "To the bit, all the way down."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def difference(a, b):
    "The largest difference of two dicts of tensors, by the largest value."
    largest = max(v.abs().max() for v in b.values())
    return max((a[k] - b[k]).abs().max() for k in b)/largest

@pytest.mark.parametrize('name', STEPS)
def test_two_processes_have_the_gradients_of_one(both, name, monkeypatch):
    monkeypatch.setattr(moco, 'shuffled_keys', partial(shuffled_keys, parts=2))   # companies as of two
    one, (first, second) = STEPS[name](), (found[name] for found in both)
    assert same(first, second)                       # weights, batch norm's averages, losses
    for mine, theirs in zip(first['losses'], one['losses'], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    if one['grads']: assert difference(first['grads'], one['grads']) <= 1e-5
    assert difference(first['state'], one['state']) <= 1e-6
    assert ('skipped' in one['losses'][0]) == (name == 'no_teacher') == (not one['grads'])
    if name == 'moco': assert torch.equal(first['owners'], one['owners'])
    if name == 'moco': torch.testing.assert_close(first['queue'], one['queue'])

def test_one_process_alone_would_have_skipped_that_batch():
    threshold, rank = most_confident()
    confidence = logits_of(Net3(), IMAGES[:12]).softmax(1).amax(1)
    assert (confidence > threshold).sum() == 1 and not (confidence.chunk(2)[1 - rank] > threshold).any()

def test_gradients_differ_without_the_other_half(both):
    "The test above can fail: a process that knows only its half has another gradient."
    model = Net()
    half = run_steps(simclr_step(model, IMAGES, Views(), .3, make_generator(0)), model, n=6)
    assert difference(half['grads'], both[0]['simclr']['grads']) > .01

def test_heads_are_trained_together(both):
    a, b = (found['heads'] for found in both)
    assert same(a, b) and a['losses'].isfinite().all()

def test_parts_are_exchanged_together(both):
    a, b = (found['exchange'] for found in both)
    alone = exchange()['clusters']
    assert same(a, b)
    pairs = torch.stack([a['clusters'], alone]).unique(dim=1)
    assert pairs.shape == (2, 3) and len(alone.unique()) == 3   # the same but for names


def test_features_are_those_of_one(both):
    one = features()
    for found in both:
        for name, value in one.items(): torch.testing.assert_close(found['features'][name], value)

def test_training_keeps_processes_together_and_continues_to_the_bit(both):
    a, b = (found['training'] for found in both)
    assert same(a, b) and len(a['history']) == 3
    assert a['written'] == 1 and same(a['again'], (a['state'], a['history']))

def test_shares_numbers_and_decisions(both):
    a, b = (found['odds'] for found in both)
    g = make_generator(3)
    whole = torch.randperm(20, generator=g)[:16].split(8)
    assert (a['place'], b['place'], a['first'], b['first']) == ((0, 2), (1, 2), 0, 0)
    assert all(torch.equal(torch.cat(halves), batch) for *halves, batch in zip(a['order'], b['order'], whole))
    assert not torch.equal(a['own'], b['own']) and torch.equal(a['joint'], b['joint'])
    assert [len(v) for v in (a['small'][0], b['small'][0])] == [2, 2] and len(a['small']) == 1
    assert a['refused'] == b['refused']
    assert 'batch of 7 images' in a['refused'][0] and 'multiple of 2' in a['refused'][0]
    assert torch.cat([*a['shares'], *b['shares']]).tolist() == [0, 1, 2, 3, 4, 0]
    assert torch.equal(a['joined'], b['joined']) and a['columns'].tolist() == [[0, 1]]
    assert torch.equal(a['views'], b['views']) and a['views'].shape == (2, 7, 8)
    assert not torch.equal(a['views'][0], a['views'][1])

def test_alone_nothing_changes():
    x = torch.ones(2)
    assert place() == (0, 1) and gather(x) is x and from_first(x) is x
    model = Net()
    with joined(model): assert JointBatchNorm not in map(type, model.modules())
    with processes(torch.device('cpu')): assert not dist.is_initialized()

def noisy(train, checkpoint=None, end=None):
    "A short run that draws numbers in its steps and skips a batch now and then; it ends after `end` epochs."
    with seeded(0): net = nn.Linear(64, 3)
    g, optimizer = make_generator(1), torch.optim.Adam(net.parameters(), 1e-2)
    def step(i):
        if torch.rand((), generator=g) < .1: return None
        x = IMAGES[i].flatten(1)/16 + torch.rand(len(i), 64, generator=g)
        return dict(loss=F.cross_entropy(net(x), i % 3))
    def monitor(epoch):
        if epoch == end: raise Killed
        return dict(bias=net.bias.mean())
    history = train(step, 96, optimizer, epochs=4, batch_size=10, generator=g, modules=[net], monitor=monitor,
                    schedule=CosineSchedule(optimizer, 4*9, 3), checkpoint=checkpoint)
    return history, net.state_dict(), g.get_state()

def test_alone_the_loop_is_the_lessons_to_the_bit(tmp_path):
    expected = noisy(training.train)
    assert sum(row.get('skipped', 0) for row in expected[0]) and same(noisy(distributed.train), expected)
    for i, (first, then) in enumerate([(training, distributed), (distributed, training)]):
        checkpoint = Checkpoint(tmp_path/f'{i}.pt')
        with pytest.raises(Killed): noisy(first.train, checkpoint, end=3)
        assert same(noisy(then.train, checkpoint), expected)

@pytest.mark.parametrize('n,batch_size', [(20, 8), (5, 8), (1, 1), (8, 8)])
def test_alone_batches_are_the_lessons(n, batch_size):
    a, b = (f.batches(n, batch_size, make_generator(3)) for f in (training, distributed))
    assert same(a, b)

def test_alone_an_update_is_the_lessons():
    def made(update):
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([p], .1, momentum=.9)
        values = [update(loss and dict(loss=loss(p)), optimizer) for loss in (torch.sum, None, torch.prod)]
        return values, p.detach()
    assert same(made(training.update), made(update))

def test_the_lesson_knows_of_one_process_only():
    assert 'distributed' not in Path(training.__file__).read_text()

def test_more_processes_than_gpus(monkeypatch):
    for name, value in dict(WORLD_SIZE='4', LOCAL_RANK='2').items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='nproc-per-node may be 2'):
        with processes(torch.device('cuda')): pass

# ---- from a shell ------------------------------------------------------------------------------------------

SHARED = dict(data='digits', test_data='digits', n_clusters=10, size=8, backbone='small_resnet',
              backbone_options=dict(widths=[8, 16]), views='simclr', epochs=1, batch_size=500)
RECIPE = Recipe(PretextRecipe(**SHARED, lr=.1, n_neighbors=4),
                ScanRecipe(**SHARED, lr=1e-3, n_neighbors=4, heads_epochs=2, tried_heads=4),
                SelfLabelRecipe(**SHARED, threshold=.2))

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "60 digits in class folders, and a file that is none."
    folder = tmp_path_factory.mktemp('data')/'digits'
    for i, (x, y) in enumerate(zip(IMAGES[:60, 0], digits().labels.tolist())):
        (folder/str(y)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(folder/f'{y}/{i}.png')
    (folder/'0/broken.png').touch()
    return folder

def slow_disk():
    "The first process writes slowly: nobody may read what is not there yet."
    def slowly(path):
        time.sleep(.1)
        return atomic_write(path)
    if os.environ['RANK'] == '0': files_room.atomic_write = training.atomic_write = slowly
    without_figures()

def words(name, data, folder, *more):
    "A stage with these images, and its results in this folder."
    folder.mkdir(exist_ok=True)
    (folder/'env.yml').write_text(f'root_dir: {folder}/results\n')
    (folder/'all.yml').write_text(to_yaml(RECIPE.change(dict(data=str(data), test_data=None))))
    return [name, '--config_env', f'{folder}/env.yml', '--config_exp', f'{folder}/all.yml', '--device', 'cpu',
            *map(str, more)]

def pair(*words, out):
    "What the first of two processes says; the other one says nothing."
    first, second = two(*words, out=out, first=slow_disk)
    assert (first.exitcode, second.exitcode) == (0, 0), first.said()[1] + second.said()[1]
    assert second.said() == ['', '']
    return first.said()

@pytest.fixture(scope='module')
def chains(pictures, tmp_path_factory):
    "Two stages, of two processes in the folder `two` and of one in `one`; and what was said."
    root, said = tmp_path_factory.mktemp('chains'), {}
    for name in ('simclr', 'scan'):
        ours = pair(*words(name, pictures, root/'two'), out=root/name)
        with redirect_stdout(io.StringIO()) as alone: assert main(words(name, pictures, root/'one')) == 0
        said[name] = *ours, alone.getvalue()
    return root, said

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

def test_two_processes_write_and_say_what_one_does(chains):
    root, said = chains
    for bar, (out, err, alone) in zip(('1/4 SimCLR: 100%', '3/4 SCAN: 100%'), said.values()):
        assert out.count(' begins: ') == 1 and out.count(' result: ') == 1 and bar in err
        out, alone = ([line.split(':')[0] for line in text.splitlines()] for text in (
            out.replace(str(root/'two'), str(root/'one')), alone))
        assert out == alone
    assert files(root/'two/results') == files(root/'one/results')
    for file in files(root/'one/results'):
        if not file.endswith('/model.pth.tar'): continue
        a, b = (torch.load(root/n/'results'/file, weights_only=True)['model'] for n in ('two', 'one'))
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    a, b = (json.loads((root/n/'results/digits/metrics.json').read_text()) for n in ('two', 'one'))
    assert a.keys() == b.keys() and all(a['stages'][k].keys() == b['stages'][k].keys() for k in b['stages'])

def test_two_processes_use_a_run_as_one_does(chains, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, 'draw_figures', lambda run: {})
    run, stage = chains[0]/'two/results/digits', partial(words, data=pictures, folder=chains[0]/'two')
    cpu, table = ['--device', 'cpu'], tmp_path/'p.csv'
    for each in (['report', run], ['eval', run], ['eval', run, pictures, *cpu], stage('scan'),   # done before
                 [*stage('eval'), '--model', run/'scan/model.pth.tar'],
                 ['predict', run, pictures, *cpu], ['predict', run, pictures, *cpu, '--out', table]):
        out, err = pair(*each, out=tmp_path/'said')
        assert main([str(w) for w in each]) == 0
        assert out == capsys.readouterr().out and bool(out) == (table not in each), each
    assert (run/'report.html').exists() and len(table.read_text().splitlines()) == 61

def test_torchrun(tmp_path):
    "The whole way, by torchrun itself: one report, and every line once."
    run, recipe, source = tmp_path/'run', tmp_path/'all.yml', tmp_path/'digits'
    recipe.write_text(to_yaml(RECIPE))
    for i, (x, y) in enumerate(zip(IMAGES[:, 0], digits().labels.tolist())):
        file = source/f"{'test' if i % 4 == 0 else 'train'}/{y}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.numpy()).save(file)
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2', '-m', 'scan_nb', 'run',
               source, '--epochs', '1', '--recipe', recipe, '--device', 'cpu', '--out', run]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if not line.startswith('Note: ')]
    assert sum(line.startswith('72 train and 24 test images of 8×8 pixels, gray') for line in rows) == 1
    rows = rows[[line.startswith('10 clusters') for line in rows].index(True):]
    names = [re.split(', percent|  +', row)[0] for row in rows]
    steps = ['k-means on pixels', 'k-means on features', 'Heads on fixed features', 'SCAN, the whole network',
             'Self-labelling']
    assert names[:-2] == ['10 clusters of 72 images', 'train images', *steps, 'test images', *steps]
    assert rows[-2:] == [f"Clusters: {run/'clusters.csv'}", f"Report:   {run/'report.html'}"]
    assert all(f'{bar}: 100%' in done.stderr for name, bar in LABELS.items()
               if name not in ('moco', 'frozen'))
    for name, n in {'clusters.csv': 72, 'clusters-test.csv': 24}.items():
        assert len((run/name).read_text().splitlines()) == n + 1
    assert len(list(tmp_path.rglob('report.html'))) == 1

def test_a_batch_that_cannot_be_shared_is_refused_in_one_sentence(pictures, tmp_path):
    first, second = two(*words('simclr', pictures, tmp_path, '--set', 'batch_size=33'), out=tmp_path/'said')
    out, err = first.said()
    *bar, said = err.splitlines()
    assert not out and said == ('scan-nb: A batch of 33 images cannot be shared equally by 2 processes: '
                                'make batch_size a multiple of 2.')
    assert all(line.startswith('images: ') for line in bar if line)
    assert first.exitcode == 2 and second.exitcode == -signal.SIGTERM and second.said() == ['', '']
    assert not (tmp_path/'results').exists()
