"Benchmarks: all cases run in little, what they count is right, and what goes wrong is said."
import io
import json
import math
import statistics
import sys
from contextlib import redirect_stdout

import pytest
import torch
from scan_nb import benchmarks
from scan_nb.benchmarks import (
    CASES, Case, check, compare_neighbors, count_work, explain, format_result, interleave, plot_checks,
    plot_growth, prepare_ways, ratio, row, run_apart, run_benchmarks, run_python, say_check, limits, threads)
from scan_nb.cli import main
from scan_nb.neighbors_fast import mine_neighbors

pytestmark = pytest.mark.usefixtures('one_thread')

# -- all cases, in little --

def check_shape(name, result):
    assert result['name'] == name and result['title'] == CASES[name].title and result['quick']
    assert (result['threads'] == 'cuda' if CASES[name].gpu else result['threads'] >= 1)
    assert result['minutes'] > 0 and result['rows']
    for r in result['rows']: assert r['low'] <= r['median'] <= r['high'] and r['rounds'] >= 1 and r['unit']
    for x in result.get('checks', []): assert math.isfinite(x['value']) and x['met'] in (True, False, None)
    if name == 'machine': return
    assert result['checks'] and (result.get('count') or result['work']['seconds'] > 0)

def check_table(name, said, results):
    table = format_result(results[name], results['machine']['peaks'])
    assert table in said and CASES[name].why in table
    assert all(r['name'].strip() in table for r in results[name]['rows'])

def check_machine(machine):
    info = machine['info']
    assert info['cpu'] and info['cores'] >= 1 and info['memory_gb'] > 0 and info['python'] and info['system']
    assert torch.__version__.startswith(info['versions']['torch']) and 'kornia' in info['versions']
    assert all(min(peak.values()) > 1e6 for peak in machine['peaks'].values())

def check_agreement(results):
    values = {x['what']: x for r in results.values() for x in r.get('checks', [])}
    assert values['scores differ by']['met'] and values['K = 3: cosines differ by']['met']
    assert values['true neighbors that ivf misses']['value'] < 10

def check_pictures(results):
    import matplotlib
    matplotlib.use('agg')
    faster, allowed = plot_checks(results)
    names = [t.get_text() for t in faster.get_yticklabels()]
    assert 'views32: torchvision on PIL / ours' in names and allowed.get_xscale() == 'log'
    assert len(plot_growth(results['growth']['growth']).lines) > 6
    assert len(plot_checks({})) == 2

def copied(values): return json.loads(json.dumps(values))   # as they come out of another process

@pytest.fixture
def one_process(monkeypatch):
    "Processes of its own cost imports; one is started below."
    def here(name, **options): return copied(getattr(benchmarks, name)(**copied(options)))
    monkeypatch.setattr(benchmarks, 'run_apart', here)

GPU_CASES = [name for name, case in CASES.items() if case.gpu]

def test_all_cases_run(one_process, tmp_path, monkeypatch, subtests):
    "What the command says and writes."
    monkeypatch.setenv('OMP_NUM_THREADS', '1')   # beside other tests, two threads wait busily for each other
    file = tmp_path/'all.json'
    with redirect_stdout(io.StringIO()) as out: code = main(['bench', '--quick', '--json', str(file)])
    said, results = out.getvalue(), json.loads(file.read_text())
    assert not [r['error'] for r in results.values() if 'error' in r] and code == 0
    here = [name for name in CASES if torch.cuda.is_available() or name not in GPU_CASES]
    assert list(results) == here and here[0] == 'machine'
    assert f'{len(here)} cases, about' in said.splitlines()[0]
    for name in here:
        with subtests.test(name): check_shape(name, results[name])
        with subtests.test(f'table of {name}'): check_table(name, said, results)
    with subtests.test('the machine is named'): check_machine(results['machine'])
    with subtests.test('alternatives agree with ours'): check_agreement(results)
    with subtests.test('pictures'): check_pictures(results)

# -- cases of a GPU --

@pytest.fixture
def no_gpu(monkeypatch): monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)

@pytest.fixture(scope='module')
def both_peaks(): return benchmarks.run_machine(256, 4, 2, device='cpu')

@pytest.mark.parametrize('name', GPU_CASES)
def test_gpu_cases_run_in_little(name, one_process, both_peaks):
    "All of their code but the device."
    case = CASES[name]
    assert case.full['device'] == case.quick['device'] == 'cuda' and case.title.endswith('on a GPU')
    result = dict(name=name, title=case.title) | case.run(**case.quick | dict(device='cpu'))
    assert result['threads'] == result['work']['threads'] == 'cpu' and not result.get('missing')
    for x in result['checks']: assert math.isfinite(x['value'])
    table = format_result(result, both_peaks['peaks'])
    assert f'{case.title}, cpu\n' in table and 'that cpu can do here' in table and table.endswith(case.why)

def test_a_gpu_has_peaks_of_its_own(both_peaks, monkeypatch):
    assert list(both_peaks['peaks'])[-1] == 'cpu' and 'cache' not in both_peaks['peaks']['cpu']
    assert [r['name'] for r in both_peaks['rows']][-1] == 'copy in memory, cpu'
    monkeypatch.setattr(torch.cuda, 'get_device_name', {'cuda': 'NVIDIA H200'}.get)
    assert [benchmarks._who(n) for n in (1, '2', 'cuda')] == ['1 thread', '2 threads', 'NVIDIA H200']

def test_a_turn_ends_when_the_gpu_has_done_its_part(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: order.append('waits'))
    interleave(dict(a=lambda: order.append('a')), 2)
    assert order == ['waits', 'a', 'waits', 'a', 'waits']
    order.clear()
    count_work(lambda: torch.ones(2).exp())
    assert order == ['waits']*6   # each operation, three times

def test_without_a_gpu_its_cases_are_left_out(no_gpu, monkeypatch):
    assert GPU_CASES and not {*GPU_CASES} & {*benchmarks.choose_cases([])}
    monkeypatch.setattr(benchmarks, 'run_case', lambda name, quick: dict(name=name, error='none'))
    said = []
    run_benchmarks(quick=True, say=said.append)
    assert [text for text in said if 'GPU' in text] == ['Cases of a GPU are left out: there is none.']

def test_with_a_gpu_all_cases_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert benchmarks.choose_cases([]) == list(CASES)
    assert benchmarks.choose_cases(['gpu_heads']) == ['machine', 'gpu_heads']

def test_a_case_of_a_gpu_needs_one(no_gpu, capsys):
    assert main(['bench', 'heads', 'gpu_heads']) == 2
    out, err = capsys.readouterr()
    assert not out and err == "scan-nb: The benchmark 'gpu_heads' needs a GPU, and PyTorch finds none here.\n"

def test_goals_of_a_gpu():
    most = {name: CASES[f'gpu_{name}'].full['targets']['ours'] for name in (
        'views32', 'views96', 'views224', 'strong32', 'strong96', 'strong224')}
    assert [*most.values()] == [1, 2, 8, 3, 4, 15]
    steps = [CASES[f'gpu_step{size}'].full for size in (32, 96, 224)]
    assert [step['batches'] for step in steps] == [{'small ResNet, whole images': 512, 'ResNet-18': 512},
                                                   {'ResNet-18 for STL': 256}, {'ResNet-50': 128}]
    assert [*steps[0]['targets'].values()] == [1.1, 1.05]
    near = [CASES[f'gpu_near{n}'].full for n in ('60k', '120k', '240k', '1281k')]
    assert [x.get('target') for x in near] == [2, 2, 2, None] and near[-1]['most'] == 15
    assert CASES['gpu_heads'].full['targets'] == (None, 1.5) and CASES['gpu_validate'].full['most'] == 2
    assert CASES['gpu_train'].full['targets'] == dict(scan=17_070, selflabel=38_553)

def test_targets_stand_in_the_full_sizes():
    assert CASES['views32'].full['targets'] == {'torchvision on PIL': 15, 'kornia': 5}
    assert CASES['views96'].full['targets'] == {'torchvision on PIL': 6, 'kornia': 10}
    assert CASES['strong32'].full['targets']['torchvision on PIL'] == 5
    assert CASES['simclr_step'].full['targets']['ResNet-18'] == 1.08
    assert CASES['neighbors'].full['target'] == 2.5 and CASES['folder'].full['target'] == 20
    assert CASES['heads'].full['targets'] == (12, 40) and CASES['imports'].full['targets'] == (.1, 1.)
    assert CASES['validation'].full['target'] == 1e9 and CASES['hungarian'].full['target'] == 1.

# -- what goes wrong --

def test_a_missing_alternative_is_named(monkeypatch, capsys):
    loaded = [name for name in sys.modules if name.split('.')[0] == 'kornia']
    for name in [*loaded, 'kornia']: monkeypatch.setitem(sys.modules, name, None)
    assert main(['bench', 'views32', '--quick']) == 0
    out = capsys.readouterr().out
    assert 'kornia: not installed, `pip install scan_nb[bench]`' in out and 'torchvision v2 / ours' in out
    assert 'kornia / ours' not in out

def test_a_broken_alternative_is_left_out_but_ours_is_not():
    def broken(): return lambda: 1/0
    ready, missing = prepare_ways(dict(ours=lambda: int, other=broken))
    assert list(ready) == ['ours'] and missing == ['other: left out (ZeroDivisionError: division by zero)']
    with pytest.raises(ZeroDivisionError): prepare_ways(dict(ours=broken))

@pytest.mark.parametrize('wrong,near', [('view32', 'views32'), ('neighbor', 'neighbors'), ('Head', 'heads')])
def test_an_unknown_name(wrong, near, capsys):
    assert main(['bench', 'heads', wrong]) == 2
    out, err = capsys.readouterr()
    assert not out and err == f"scan-nb: There is no benchmark '{wrong}': did you mean '{near}'?\n"

@pytest.fixture
def toys(monkeypatch):
    def fails(): raise ValueError('no\nluck')
    good = dict(rows=[row('it', [1., 2., 4.])], threads=1, count='It is one')
    cases = dict(bad=fails, good=lambda: good)
    for name, run in cases.items(): monkeypatch.setitem(CASES, name, Case(name, run, {}, {}, 1, 'why.'))

def test_a_case_that_fails_stops_no_other(toys, tmp_path, capsys):
    assert main(['bench', 'bad', 'good', '--quick', '--json', str(tmp_path/'r.json')]) == 2
    out, err = capsys.readouterr()
    assert 'bad: failed, ValueError: no luck\n' in out and 'It is one: why.' in out
    assert err == 'scan-nb: These benchmarks failed, as said above: bad.\n'
    assert list(json.loads((tmp_path/'r.json').read_text())) == ['machine', 'bad', 'good']

def test_nothing_measured_is_lost(toys, tmp_path, monkeypatch):
    def stop(): raise KeyboardInterrupt
    monkeypatch.setitem(CASES, 'stop', Case('stop', stop, {}, {}, 1))
    assert main(['bench', 'good', 'stop', '--quick', '--json', str(tmp_path/'r.json')]) == 130
    assert json.loads((tmp_path/'r.json').read_text())['good']['rows'][0]['median'] == 2
    assert [p.name for p in tmp_path.iterdir()] == ['r.json']

def test_an_unwritable_file_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CASES, 'machine', None)
    assert main(['bench', '--quick', '--json', str(tmp_path/'no'/'such'/'r.json')]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1

def test_the_names_are_listed(capsys):
    assert main(['bench', '--list']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CASES)

def test_a_program_that_fails_says_why():
    with pytest.raises(RuntimeError, match='ValueError: so it is'): run_python('raise ValueError("so it is")')
    assert run_apart('cores') >= 1

# -- what is counted --

def test_ways_take_turns():
    order, naps = [], iter(range(99))
    ways = dict(a=lambda: order.append('a'), b=lambda: order.append('b') or next(naps))
    seconds = interleave(ways, 3)
    assert order == list('ababab') and {len(v) for v in seconds.values()} == {3}
    assert interleave(dict(a=lambda: order.append('c')), 2, turn=.01)['a'][0] < .01 and order.count('c') > 2

def test_cores_are_those_asked_for(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    all_cores = benchmarks.cores()
    for asked, found in (('3', 3), ('0', 1), ('2,1', all_cores), ('', all_cores)):
        monkeypatch.setenv('OMP_NUM_THREADS', asked)
        assert benchmarks.cores() == found

def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(2): assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before

def test_rows_and_ratios():
    r = row('x', [3., 1., 2.], 'ms', 1e3)
    assert (r['median'], r['low'], r['high'], r['rounds'], r['unit']) == (2e3, 1e3, 3e3, 3, 'ms')
    x = ratio(dict(a=[4., 6., 9.], b=[2., 2., 3.]), 'a', 'b', at_least=2.5)
    assert (x['value'], x['low'], x['high'], x['met']) == (statistics.median([4, 6, 9])/2, 2, 3, True)
    assert check('x', 2, at_most=1)['met'] is False and check('x', 1, at_most=1)['met'] is True
    assert check('x', 2)['met'] is None and check('x', 0., at_least=0)['met'] is True
    assert say_check(check('it', 2., 's', at_most=1.)) == 'it  2 s, at most 1 s: missed'

@pytest.mark.parametrize('work,calls,read_and_written,flops', [
    (lambda a: a @ a, 1, 3*400, 2*1000), (lambda a: a + 1, 1, 2*400, 0), (lambda a: a.t()[2:], 0, 0, 0),
    (lambda a: a.add_(1), 1, 2*400, 0), (lambda a: torch.empty(9).copy_(a[0, :1].expand(9)), 1, 36 + 4, 0),
    (lambda a: a.index_select(0, torch.tensor([1])), None, None, 0),
    (lambda a: torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3]), 1, 400 + 36 + 256, 64*18)])
def test_work_is_counted(work, calls, read_and_written, flops):
    found = count_work(lambda: work(torch.ones(10, 10)))
    ones = count_work(lambda: torch.ones(10, 10))
    assert found['flops'] == flops
    assert count_work(lambda: work(torch.ones(10, 10).bfloat16()))['flops16'] == flops
    if calls is not None: assert found['calls'] - ones['calls'] == calls
    if read_and_written is not None: assert found['bytes'] - ones['bytes'] == read_and_written

def test_the_nearest_limit_is_named():
    peaks = {'1': dict(flops=1e9, flops16=2e9, ram=1e9, cache=2e9)}
    work = dict(calls=5, flops=8e8, flops16=2e8, bytes=1e8, by_op=dict(mm=.7, add=.1), seconds=1.,
                threads=1, memory='ram')
    assert limits(work, peaks) == pytest.approx({'arithmetic': .9, 'memory bandwidth': .1, 'Python': .2})
    words = [explain(dict(name='heads', work=work | change), peaks) for change in (
        {}, dict(flops=0, bytes=8e8), dict(flops=0, by_op=dict(mm=.1)), dict(flops=0))]
    ends = 'limit is arithmetic', 'limit is memory bandwidth', 'limit is Python', 'Neither is near'
    assert all(end in text and CASES['heads'].why in text for end, text in zip(ends, words))
    assert 'mm 70 %' in words[0] and '90 % of the arithmetic' in words[0]

def test_neighbors_are_compared():
    z = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    near = mine_neighbors(z, 5)
    assert compare_neighbors(z, near, near) == (1., 0.)
    other = near.clone()
    other[3, 4] = near[3, 0]
    same, gap = compare_neighbors(z, near, other)
    assert same == pytest.approx(1 - 1/1000) and gap > 1e-3
    twins = z.repeat(2, 1)
    first, second = (torch.tensor([[1], [0]]), torch.tensor([[201], [200]]))
    assert compare_neighbors(twins, first, second)[1] < 1e-12

def test_the_two_ways_to_step_see_the_same_shape(monkeypatch):
    shapes = []
    class Spy(torch.nn.Module):
        dim = 4
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 1)
        def forward(self, x):
            shapes.append((x.shape, x.stride()))
            return self.layer(x).mean((2, 3))
    monkeypatch.setitem(benchmarks.STEP_NETWORKS, 'spy', Spy)
    whole, bare = benchmarks._step_ways('spy', 6, 8)
    whole(), bare()
    assert len(shapes) == 3 and len(set(shapes)) == 1 and shapes[0][0] == (12, 3, 8, 8)

def test_views_of_all_ways_are_images():
    tiles = benchmarks.photo_tiles(6, 32)
    assert tiles.shape == (6, 3, 32, 32) and tiles.dtype == torch.uint8
    assert torch.equal(tiles, benchmarks.photo_tiles(6, 32)) and len(tiles.flatten(1).unique(dim=0)) == 6
    for ways in (benchmarks._simclr_ways(tiles), benchmarks._strong_ways(tiles)):
        ready, missing = prepare_ways(ways)
        assert not missing
        for work in ready.values():
            x = work()
            assert x.shape == tiles.shape and x.dtype == torch.float32
            assert -1e-5 <= x.min() and x.max() <= 1 + 1e-5

def test_run_without_a_file(capsys):
    said = []
    results = run_benchmarks(['machine'], quick=True, say=said.append)
    assert list(results) == ['machine'] and len(said) == 2 and not capsys.readouterr().out
