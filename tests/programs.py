"""The programs for a GPU give what the lesson gives: on a GPU, or on a CPU by Triton's interpreter.

`test_views.py` runs this file in processes of its own: the interpreter (TRITON_INTERPRET) is chosen before
Triton is imported."""
import os
import pytest
import torch
from scan_nb import augment as lesson, views
from scan_nb.augment import STRONG_OPS, to_float
from test_augment import generator, images, plain as without_programs
from torch.testing import assert_close

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') else 'cuda'
each_number_of_channels = pytest.mark.parametrize('c', [1, 2, 3])

@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    "Several to an image of two channels, the last not full; and the programs, though there is no GPU."
    monkeypatch.setattr(views, 'BLOCK', 128 if request.node.callspec.params.get('c', 2) == 2 else 512)
    monkeypatch.setattr(views, 'has_kernels', lambda x: True)

def by_program(f, *args):
    "What an operator returns, or makes of its first argument."
    args = [a.to(DEVICE, copy=True) if isinstance(a, torch.Tensor) else a for a in args]
    out = f(*args)
    return (args[0] if out is None else out).cpu()

def close(ours, plain): assert_close(ours, plain, atol=1e-5, rtol=0)

# ---- each program

@each_number_of_channels
@pytest.mark.parametrize('floats, turned', [(False, True), (True, False)])
def test_sample(c, floats, turned):
    x, g = images(2, c, 11, 13), generator(c)
    if floats: x = to_float(x)
    boxes, flip = lesson.random_boxes(x, (.3, 2.), generator=g), torch.rand(2, generator=g) < .5
    matrix = lesson.crop_matrix(boxes, 12, flip, torch.tensor([100., -40]) if turned else None)
    bounds = torch.tensor([-torch.inf, torch.inf]).repeat(2, 2) if turned else lesson._edges(boxes)
    close(by_program(views.sample, x, matrix, bounds, 12), lesson.warp(x, matrix, 12, bounds))
    part = x[:, :, ::2]   # not contiguous
    close(by_program(lambda x, *args: views.sample(x[:, :, ::2], *args), x, matrix, bounds, 12),
          lesson.warp(part, matrix, 12, bounds))

@each_number_of_channels
def test_jitter(c):
    x, g = to_float(images(7, c, 9, 15)), generator(c)
    order = torch.rand(7, 3 if c == 3 else 2, generator=g).argsort(1)
    hue_at = torch.arange(7) % 5 if c == 3 else (torch.arange(7) % 2)*4
    factors, shift = 2*torch.rand(7, 3, generator=g), torch.rand(7, generator=g) - .5
    gray = torch.arange(7) % 3 == 0
    plain = lesson.color_jitter_(x.clone(), order, factors, shift, hue_at)
    if c == 3: plain[gray] = lesson.luma(plain[gray]).expand(-1, 3, -1, -1)
    close(by_program(views.jitter_, x, order.float(), factors, shift, hue_at.float(), gray.float()), plain)

@pytest.mark.parametrize('shape', [(9, 11), (23, 7)])
def test_blur(shape):
    x, sigma = to_float(images(4, 2, *shape)), torch.tensor([0, .1, 2, 0])
    for radius in (1, 3):
        rows = by_program(views.blur, x, sigma, radius, False)
        ours = by_program(views.blur, rows, sigma, radius, True)
        close(ours[1:3], lesson.gaussian_blur(x[1:3], sigma[1:3], radius))
        assert torch.equal(ours[::3], x[::3])

@pytest.mark.parametrize('disc', [False, True])
@pytest.mark.parametrize('size', [9, 12])
def test_cover(size, disc):
    x, center = to_float(images(20, 2, size, size)), torch.rand(20, 2, generator=generator(size))
    side = torch.arange(20)/2//1
    plain = lesson.cut_out_(x.clone(), center, side, .3)
    if disc: plain *= views.disc_mask(size)
    assert torch.equal(by_program(views.cover_, x, center, side, .3, disc), plain)

def things(c, h=7, w=9):
    "On black: tall, wide and with a hole, at the border, two apart, nothing."
    mask = torch.zeros(5, 1, h, w)
    mask[0, :, 1:6, 3:6], mask[1, :, 2:5, 2:8], mask[1, :, 3:4, 4:6], mask[2, :, :, 7:] = 1, 1, 0, 1
    mask[3, :, 2:4, 1:3], mask[3, :, 5:, 7:8] = 1, 1
    return (images(5, c, h, w, 3)*mask).byte()

@each_number_of_channels
def test_strip(c):
    x, share = things(c) if c in (2, 3) else to_float(things(c)), torch.tensor([.3, .4, .5, .3, .5])
    assert torch.equal(by_program(views.strip, x, share), views.take_strip(x, share))
    assert torch.equal(by_program(views.strip, x[:2], torch.ones(2)), x[:2])

@each_number_of_channels
def test_tint(c):
    x, tone, detail = to_float(things(c)), torch.tensor([.3, .5, 0, 1, .6]), torch.linspace(-1, 1, 5)
    plain = views.tint_(x.clone(), tone, detail)
    plain[2] = x[2]
    close(by_program(views.tint, x, tone, detail), plain)

@each_number_of_channels
def test_operations(c):
    "Equalize needs more than 255 pixels; of one channel it gets fewer as well."
    low, high = torch.tensor([*(bounds for _, bounds in STRONG_OPS.values()), (0., 0)]).unbind(1)
    for h, w, between in ((17, 16, .1), (2, 9, 0))[:2 if c == 1 else 1]:
        x, ops = to_float(images(15, c, h, w, 1))*(1 - between) + between/3, torch.arange(15)
        amounts = low + (high - low)*torch.rand(15, generator=generator(c))
        ours = by_program(views.operate, x, ops.float(), amounts)
        close(ours, lesson.operate_(x.clone(), ops[:, None], amounts[:, None]))

@pytest.mark.parametrize('c', [1, 3])
def test_a_chain_of_operations(c):
    "Each link on what the links before it gave."
    x, augment = to_float(images(4, c, 17, 16)), lesson.StrongAugment(16)
    p = augment.draw(x, generator(c))
    for ops, amounts in zip(p['ops'].T, p['amounts'].T):
        plain = lesson.operate_(x.clone(), ops[:, None], amounts[:, None])
        x = by_program(views.operate, x, ops.float(), amounts.contiguous())
        close(x, plain)

# ---- the three classes

MOST = dict(scale=(.3, 1.3), rotation=20, blur_p=.5, erase=2, tint_p=.5, strip_p=.5, disc=True)
SMOOTH = sorted(STRONG_OPS.keys() - {'autocontrast', 'equalize', 'solarize', 'posterize'})

@each_number_of_channels
@pytest.mark.parametrize('name, switches', [
    ('SimCLRAugment', {}), ('SimCLRAugment', MOST), ('WeakAugment', {}),
    ('StrongAugment', dict(ops=SMOOTH, disc=True, fill=.5))])
def test_views(c, name, switches):
    "Two of each image. Operations that jump from level to level have tests of their own."
    some = images(1, c, 12, 9)
    for x in (some, to_float(some)) if not switches else (some,):
        ours, plain = (kind(8, **switches) for kind in (getattr(views, name), without_programs(name)))
        close(by_program(ours, x, generator(c), 2), plain(x, generator(c), n=2))
