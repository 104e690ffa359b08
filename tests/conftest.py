"What several test files need."
import gc
import os
import shutil
import sys
import pytest
from xdist.scheduler import LoadScopeScheduling

sys.modules.setdefault('rfc3987_syntax', None)   # a grammar of addresses; jsonschema can do without

LONG = ('test_pipeline', 'test_stages', 'test_cli', 'test_distributed', 'test_faults', 'test_matrix',
        'test_benchmarks', 'test_site', 'test_views', 'test_report', 'test_frozen', 'test_sort')

def pytest_configure(config):
    "Temporary files that go with their test lie in memory where there is plenty: no test is about a disk."
    memory, brief = '/dev/shm', config.getini('tmp_path_retention_policy') == 'failed'
    if brief and os.path.isdir(memory) and shutil.disk_usage(memory).free > 4e9:
        os.environ.setdefault('TMPDIR', memory)
    gc.disable()   # until all is imported, which is no garbage

def pytest_collection_finish():
    gc.freeze()
    gc.enable()

def pytest_collection_modifyitems(items):
    "Notebooks are executed first, then long files, so that little is left at the end."
    items.sort(key=lambda item: (not item.name.startswith('test_runs['), item.path.stem not in LONG))

def pytest_xdist_make_scheduler(config, log):
    "A worker has all tests of a file: what they share is made once. Notebooks go where there is room."
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if '::test_runs[' in nodeid else nodeid.split('::')[0]
    return ByFile(config, log)

@pytest.fixture(scope='module')
def one_thread():
    "Nets this small are slower with more."
    import torch   # here, as the process that hands out the tests needs none
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
