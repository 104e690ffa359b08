"""Commands in processes of their own, without the seconds that their imports take.

`multiprocessing` keeps one process that has imported all; each command is a copy of it."""
import multiprocessing, os, signal, socket, sys
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
import numba, pytest, torch
from scan_nb import report
from scan_nb.cli import main

numba.njit(lambda x: x)(1)   # the first program that it compiles takes much longer
HERE = Path(__file__).parent
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['shell', 'pytest', 'scan_nb.pipeline', 'torch._dynamo', 'matplotlib.pyplot',
                               'jinja2', 'sklearn.cluster', 'sklearn.manifold'])

def serve():
    "Start that process, once. Python 3.11 does not tell it where modules are."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', os.pathsep.join([str(HERE.parent), str(HERE)]))
        ensure_running()
    return server

def work(words, files, env, first):
    os.environ.update(env)
    torch.set_num_threads(1)
    for i, file in enumerate(files): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i + 1)
    sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)   # strict, as in most terminals
    sys.stderr = open(2, 'w', buffering=1, encoding='utf-8', errors='backslashreplace', closefd=False)
    if first: first()
    sys.exit(main(words))

def forked(function, *args):
    "A call of a test file's function in another process, which has begun and imports only that file."
    process = serve().Process(target=function, args=args)
    process.start()
    return process

def without_figures(): report.draw_figures = lambda run: {}   # they take longer than a tiny run

def start(*words, out, first=None, **env):
    "The command in a process, after a call of `first`; what it says goes to OUT.out and OUT.err."
    files = [f'{out}.out', f'{out}.err']
    args = [str(w) for w in words], files, {**os.environ, **env}, first
    process = serve().Process(target=work, args=args)
    process.start()
    process.said = lambda: [Path(f).read_text(errors='surrogateescape') for f in files]
    return process

def signal_at(at, how):
    "Later in this process: the signal, as soon as the file `at` is there."
    replace = os.replace
    def watched(part, path):
        replace(part, path)
        if str(path) == at: os.kill(os.getpid(), how)
    os.replace = watched

def stop(*words, at, out, how=signal.SIGKILL):
    "The command, which gets a signal as soon as the file `at` is there. The process, which has ended."
    process = start(*words, out=out, first=partial(signal_at, str(at), how))
    process.join()
    return process

def two(*words, out, first=None):
    "The command in two processes, as torchrun starts them; as there, a fault of one ends the other."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    pair = [start(*words, out=f'{out}{i}', first=first, RANK=i, LOCAL_RANK=i, **env) for i in '01']
    while alive := [p.sentinel for p in pair if p.is_alive()]:
        wait(alive)
        if any(p.exitcode for p in pair):
            for p in pair: p.terminate()
    return pair
