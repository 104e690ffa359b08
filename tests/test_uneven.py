"Sets with a long tail."
import pytest
import torch
from scan_nb.data import ImageSet, digits
from scan_nb.uneven import long_tail


@pytest.mark.parametrize('ratio', [1, 10, 100])
def test_class_sizes_fall_geometrically(ratio):
    ds = digits()
    tail, every = long_tail(ds, 3, ratio), ds.labels.bincount()
    kept = ds.labels[tail].bincount(minlength=10)
    assert len(set(tail.tolist())) == len(tail)
    shares = (kept/every).sort(descending=True).values
    torch.testing.assert_close(shares, ratio**(-torch.arange(10)/9), atol=.004, rtol=0)
    assert torch.equal(tail, long_tail(ds, 3, ratio))
    assert ratio == 1 or not torch.equal(tail, long_tail(ds, 4, ratio))


def test_few_classes():
    images = torch.zeros(12, 1, 4, 4, dtype=torch.uint8)
    assert len(long_tail(ImageSet(images, torch.zeros(12, dtype=torch.long)), 0)) == 12
    two = long_tail(ImageSet(images, torch.arange(12) % 2), 0, ratio=3)
    assert len(two) == 6 + 2
