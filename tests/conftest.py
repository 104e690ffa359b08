"What several test files need."
import sys
import pytest
import torch

sys.modules.setdefault('rfc3987_syntax', None)   # a grammar of addresses; jsonschema can do without

LONG = ('test_pipeline', 'test_stages', 'test_cli', 'test_distributed', 'test_faults', 'test_matrix',
        'test_benchmarks', 'test_site')

def pytest_collection_modifyitems(items):
    "Notebooks are executed first, then long files, so that little is left at the end; a file stays whole."
    items.sort(key=lambda item: (not item.name.startswith('test_runs['), item.path.stem not in LONG))
    for item in items:
        if not item.name.startswith('test_runs['): item.add_marker(pytest.mark.xdist_group(item.path.stem))

@pytest.fixture(scope='module')
def one_thread():
    "Nets this small are slower with more."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
