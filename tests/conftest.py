"What several test files need."
import pytest
import torch

def pytest_collection_modifyitems(items):
    "Notebooks are executed first, so that what takes longest is not left for the end; a file stays together."
    items.sort(key=lambda item: not item.name.startswith('test_runs['))
    for item in items:
        if not item.name.startswith('test_runs['): item.add_marker(pytest.mark.xdist_group(item.path.stem))

@pytest.fixture(scope='module')
def one_thread():
    "Nets this small are slower with more."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
