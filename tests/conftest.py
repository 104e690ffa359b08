"What several test files need."
import pytest
import torch

def pytest_collection_modifyitems(items):
    "Notebooks are executed first: what takes longest should not be left for the end."
    items.sort(key=lambda item: not item.name.startswith('test_runs['))

@pytest.fixture(scope='module')
def one_thread():
    "Nets this small are slower with more."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
