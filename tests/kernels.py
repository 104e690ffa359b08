"""Kernels that are copies of one process, which has imported what takes seconds.

`patch()` makes jupyter_client start kernels in this way. Run as a program, this file is that process: for
each line `[words, environment, folder]` on stdin it forks a kernel and says its number."""
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from threading import Lock

IMPORTED = ('ipykernel.kernelapp', 'ipykernel.zmqshell', 'ipykernel.debugger', 'torch', 'torch._dynamo',
            'torchvision', 'numba', 'matplotlib.pyplot', 'sklearn.cluster', 'sklearn.datasets',
            'sklearn.manifold')

class Kernel:
    "What `subprocess.Popen` is to jupyter_client."
    stdin = stdout = stderr = None
    def __init__(self, pid): self.pid = pid
    def send_signal(self, number): os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)
    def wait(self): return self.poll()
    def poll(self):
        try: self.send_signal(0)
        except ProcessLookupError: return 0

def patch(env):
    "From now on. The environment is that of the process with the imports."
    from jupyter_client.provisioning import local_provisioner
    started, lock = [], Lock()
    def launch_kernel(cmd, **options):
        with lock:
            if not started:
                started.append(subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, text=True, env=env,
                                                start_new_session=True))
            server, words = started[0], cmd[cmd.index('ipykernel_launcher'):]
            print(json.dumps([words, options['env'], str(options['cwd'])]), file=server.stdin, flush=True)
            return Kernel(int(server.stdout.readline()))
    local_provisioner.launch_kernel = launch_kernel

def become_kernel(words, env, folder):
    for name in [name for name in sys.modules if re.match(r'triton(?!._C)\b', name)]:
        del sys.modules[name]   # a notebook may want its interpreter, and has to say so before the import
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for stream, flags in enumerate((os.O_RDONLY, os.O_WRONLY)): os.dup2(os.open(os.devnull, flags), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = words
    importlib.import_module('ipykernel.kernelapp').launch_new_instance()

if __name__ == '__main__':
    del sys.path[0]   # the folder of this file
    for name in IMPORTED: importlib.import_module(name)
    sys.modules['numba'].njit(lambda x: x)(1)   # the first program that it compiles takes much longer
    gc.freeze()   # what is here is no garbage: kernels need not look through it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)   # a kernel that has ended leaves nothing behind
    for line in sys.stdin:
        if pid := os.fork():
            os.setpgid(pid, pid)   # before anybody asks for its group, to signal it
            print(pid, flush=True)
        else:
            become_kernel(*json.loads(line))
            os._exit(0)
