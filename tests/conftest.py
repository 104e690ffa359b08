"What several test files need."
import pytest
import torch

@pytest.fixture(scope='module')
def one_thread():
    "Nets this small are slower with more."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
