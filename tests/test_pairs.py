"The sum over all pairs: a loop in machine code and blocks, against float64."
import pytest
import torch
from scan_nb import pairs as room
from scan_nb.training import make_generator


@pytest.mark.parametrize('scale', [1., 30., 200.])
def test_the_loop_over_pairs_is_the_stream(scale):
    g = torch.Generator().manual_seed(0)
    logits, near = scale*torch.randn(500, 7, generator=g), torch.randint(500, (500, 6), generator=g)
    lse, losses = logits.logsumexp(-1), torch.empty(500, dtype=torch.float64)
    p = (logits - lse[:, None]).exp()
    room.in_threads(room._pair_losses, 500, p, logits, lse, near, losses)
    pairs, mean = room._stream_pairs(logits, lse, near, 100)
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p[:, None] + log_p[near]).logsumexp(-1)
    torch.testing.assert_close(losses, exact.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs, exact.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, log_p.exp().mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('block', [None, 1, 100])
def test_both_ways_are_that_of_float64(block):
    g = make_generator(0)
    logits, near = 3*torch.randn(200, 7, generator=g), torch.randint(200, (200, 6), generator=g)
    log_p = logits.double().log_softmax(-1)
    exact = -(log_p[:, None] + log_p[near]).logsumexp(-1).sum()
    in_blocks = room._stream_pairs(logits, logits.logsumexp(-1), near, block or 2**20)
    for pairs, mean in (room.sum_pairs(logits, near, block), in_blocks):
        assert pairs.dtype == mean.dtype == torch.float64
        torch.testing.assert_close(pairs, exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(mean, log_p.exp().mean(0), rtol=1e-5, atol=1e-7)


def test_no_gradient_is_kept():
    logits = torch.randn(20, 3, generator=make_generator(0)).requires_grad_()
    near = torch.arange(20)[:, None]
    assert not any(found.requires_grad for found in room.sum_pairs(logits, near))
