"""Run notebooks top to bottom, each in a fresh kernel, and store their outputs.

    python tests/run_notebooks.py [--check] [--slow] [--gpu] [--notest] [notebook …]

Without a notebook named: all of `nbs/`. Cells under `#| eval: false` or a flag of `tst_flags` (settings.ini)
are left alone, with the outputs they hold; `--slow` and its like run them too. `--check` saves nothing: it
reports notebooks that fail, and cells whose stored output is missing or of another kind than the fresh one.

A kernel computes with one thread, so that its numbers don't depend on the number of cores, and as many
notebooks run at a time as there are cores. `OMP_NUM_THREADS=4` changes both: more threads, fewer notebooks.
"""
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import kernels
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbconvert.filters import strip_ansi
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
DIRECTIVE = re.compile(r'^[ \t]*#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*)$', re.M)
ENV = {'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONHASHSEED': '0',
       'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
       'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}
kernels.patch(ENV)
WORKERS = max(1, min(8, (os.cpu_count() or 1)//int(ENV['OMP_NUM_THREADS'])))

def notebooks():
    "The notebooks of the course, the index and the tutorials, in their order."
    return [p for p in sorted(NBS.rglob('*.ipynb')) if not re.search(r'/[._]', p.as_posix()[len(str(NBS)):])]

def directives(cell): return dict(DIRECTIVE.findall(cell.source)) if cell.cell_type == 'code' else {}

def skipped(cell, skip):
    "Does this cell carry a flag in `skip`, or `#| eval: false`?"
    found = directives(cell)
    off = found.get('eval', '').strip().lower() == 'false'
    return off or bool(skip & found.keys()) or 'nbdev_export(' in cell.source

class Client(NotebookClient):
    "A client that leaves skipped cells, and the outputs they already hold, alone."
    skip = frozenset()
    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == 'code' and skipped(cell, self.skip): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)

def shown(cell):
    "The kinds of output a cell holds: streams but stderr, and the richest form of each display."
    outs = cell.get('outputs', [])
    streams = {o.name for o in outs if o.output_type == 'stream'} - {'stderr'}
    return streams.union(*(set(o.data)-{'text/plain'} or {'text/plain'} for o in outs if 'data' in o))

TIMES = re.compile(r'\n+\*Reading: (.+) Running: (.+)\*')   # at the head of a lesson

def reading(nb):
    "Minutes, in fives: 200 words of text or 15 lines of code in one; what only Colab needs is not read."
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == 'markdown')
    lines = sum(len(re.findall(r'^\s*(?!\s|#).', c.source, re.M)) for c in nb.cells
                if c.cell_type == 'code' and 'google.colab' not in c.source)
    return max(5, 5*round((words/200 + lines/15)/5))

def tell_times(nb, seconds):
    "How long a lesson takes, below its claim; index and benchmarks have other readers."
    minutes = max(1, round(seconds/60))
    running = f"{minutes} minute{'s'*(minutes > 1)}" if seconds > 40 else 'less than a minute'
    head = nb.cells[0]
    head.source = TIMES.sub('', head.source).rstrip() + (
        f'\n\n*Reading: about {reading(nb)} minutes. Running: {running} on a CPU.*')

def solutions(nb):
    "The code in the answers to the exercises, which are folded away, as cells."
    folded = re.findall(r'<details>.*?</details>', '\n'.join(
        c.source for c in nb.cells if c.cell_type == 'markdown'), re.S)
    blocks = re.findall(r'^( *)```python\n(.*?)^ *```$', '\n'.join(folded), re.S | re.M)
    return [nbformat.v4.new_code_cell(dedent(code)) for _, code in blocks]

def run(path, force=frozenset(), check=False):
    """Execute one notebook and save it; the list of its faults.

    With `check`, compare and save nothing, and run the solutions of the exercises as well."""
    nb, start = nbformat.read(path, as_version=4), time.time()
    before = [shown(c) for c in nb.cells]
    if check: nb.cells += solutions(nb)
    with TemporaryDirectory() as sockets:       # not ports: two kernels that start at once may pick one port
        client = Client(nb, timeout=None if force else 600, startup_timeout=180, kernel_name='python3',
                        record_timing=False, resources={'metadata': {'path': str(path.parent)}},
                        config=Config(KernelManager={'transport': 'ipc', 'ip': f'{sockets}/kernel'}))
        client.skip = set(get_config(path=ROOT).tst_flags.split()) - set(force)
        try: client.execute(env=ENV)
        except (CellExecutionError, CellTimeoutError, RuntimeError) as e:
            return [f'{path.name}: {strip_ansi(str(e))}']
    if not check:
        if not force and path.stem not in ('index', 'benchmarks'): tell_times(nb, time.time() - start)
        nbformat.write(nb, path)
        nbdev_clean.__wrapped__(str(path))
    changed = [(c, was) for c, was in zip(nb.cells, before) if check and shown(c) != was]
    return [f'{path.name}: stores {sorted(was)} but shows {sorted(shown(c))}; `make notebooks`\n{c.source}\n'
            for c, was in changed]

if __name__ == '__main__':
    flags = {a[2:] for a in sys.argv[1:] if a.startswith('--')}
    files = [Path(a).resolve() for a in sys.argv[1:] if not a.startswith('--')] or notebooks()
    os.chdir(ROOT)
    unknown = flags - {'check', *get_config().tst_flags.split()}
    if unknown: sys.exit(f'unknown option: --{min(unknown)}')
    if missing := [f for f in files if not f.exists()]: sys.exit(f'no such notebook: {missing[0]}')
    def timed(path):
        start, found = time.time(), run(path, flags-{'check'}, 'check' in flags)
        print(f'{path.name}: {time.time()-start:.1f}s', flush=True)
        return found
    with ThreadPoolExecutor(WORKERS) as pool: faults = sum(pool.map(timed, files), [])
    if faults: sys.exit('\n'.join(faults))
