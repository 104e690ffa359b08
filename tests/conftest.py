"What several test files need."
import sys
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

sys.modules.setdefault('rfc3987_syntax', None)   # a grammar of addresses; jsonschema can do without

LONG = ('test_pipeline', 'test_stages', 'test_cli', 'test_distributed', 'test_faults', 'test_matrix',
        'test_benchmarks', 'test_site')

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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
