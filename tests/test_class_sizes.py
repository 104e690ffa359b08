"Class sizes: checked, and estimated without labels."
import math
import numpy as np
import pytest
import torch
from scan_nb.class_sizes import estimate_prior, find_prior
from scan_nb.data import UserError
from scan_nb.training import make_generator


@pytest.fixture(scope='module')
def uneven():
    "80, 40, 20, 10 and 5 points in five separate groups."
    labels = torch.arange(5).repeat_interleave(torch.tensor([80, 40, 20, 10, 5]))
    centers = 5*torch.randn(5, 8, generator=make_generator(0))
    return centers[labels] + .3*torch.randn(155, 8, generator=make_generator(1)), labels


@pytest.mark.parametrize(
    'wrong',
    ['guess', [1, 2], torch.ones(4), torch.tensor([1, 1, 0.0]), torch.tensor([1, math.nan, 1]), [[1, 1, 1]]],
)
def test_wrong_priors(wrong):
    with pytest.raises(UserError, match="prior must be 'estimate' or 3 class sizes above 0"):
        find_prior(wrong, 3, None)


def test_prior_in_numbers():
    assert find_prior(None, 3, None) is None
    torch.testing.assert_close(find_prior([6, 3, 1], 3, None), torch.tensor([0.6, 0.3, 0.1]))
    assert find_prior(np.array([1.0, 1.0]), 2, None).tolist() == [0.5, 0.5]


def test_sizes_of_separate_groups_are_found_without_labels(uneven):
    z, labels = uneven
    found = estimate_prior(z[torch.randperm(155, generator=make_generator(0))], 5)
    torch.testing.assert_close(found, labels.bincount() / 155)
    assert estimate_prior(torch.eye(6).repeat(2, 1), 6).tolist() == pytest.approx([1 / 6] * 6)
    outlier = torch.cat([z[:80], -100 * torch.ones(1, 8)])
    assert estimate_prior(outlier, 2)[1] == pytest.approx(0.05 / (0.05 + 80 / 81))


def test_features_are_asked_for_only_by_an_estimate(uneven):
    def never():
        raise AssertionError
    for prior in (None, [1, 2, 3]):
        find_prior(prior, 3, never)
    torch.testing.assert_close(find_prior('estimate', 5, lambda: uneven[0]), estimate_prior(uneven[0], 5))
