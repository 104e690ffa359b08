"The compiled loops give what the lesson gives."
import subprocess
import sys
from types import SimpleNamespace
import numba
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scan_nb import augment as lesson, augment_fast as fast
from scan_nb.augment import STRONG_OPS, to_float
from test_augment import generator, images
from torch.testing import assert_close

often = settings(max_examples=40, deadline=None)

# ---- each operation

@often
@given(n=st.integers(1, 9), c=st.sampled_from([1, 2, 3, 7]), h=st.integers(1, 17), w=st.integers(1, 17),
       size=st.integers(1, 20), turned=st.booleans(), bounded=st.booleans(), floats=st.booleans(),
       seed=st.integers(0, 10**6))
def test_pixels_are_sampled_as_in_the_lesson(n, c, h, w, size, turned, bounded, floats, seed):
    g, x = generator(seed), images(n, c, h, w, seed)
    boxes = lesson.random_boxes(x, (.3, 2.), generator=g)
    angle = (torch.rand(n, generator=g) - .5)*300 if turned else None
    matrix = lesson.crop_matrix(boxes, size, torch.rand(n, generator=g) < .5, angle)
    bounds = lesson._edges(boxes) if bounded and not turned else None
    x = to_float(x) if floats else x
    views = lesson.warp(x, matrix, size, bounds)
    loop, ours = (f(x, matrix, size, bounds) for f in (fast.warp_loop, fast.warp))
    assert_close(loop, views, atol=1e-4, rtol=0)
    assert torch.equal(ours, loop)

@often
@given(n=st.integers(1, 40), c=st.sampled_from([1, 2, 3, 7]), h=st.integers(1, 17), w=st.integers(1, 17),
       flat=st.booleans(), seed=st.integers(0, 10**6))
def test_colors_change_as_in_the_lesson(n, c, h, w, flat, seed):
    x = to_float(images(n, c, h, w, seed))
    if flat: x[:] = x[:, :1, :1, :1]                     # gray, without any hue
    p = lesson.SimCLRAugment(8, hue=.5, brightness=1.).draw(x, generator(seed))
    settings_ = p['order'], p['factors'], p['shift'], p['hue_at']
    views = lesson.color_jitter_(x.clone(), *settings_)
    for jitter_ in (fast.jitter_loop_, fast.color_jitter_):
        ours = x.clone()
        assert jitter_(ours, *settings_) is ours and 0 <= ours.min() and ours.max() <= 1
        assert_close(ours, views, atol=2e-5, rtol=0)
    ours, strided = fast.jitter_loop_(x.clone(), *settings_), x.clone(memory_format=torch.channels_last)
    assert fast.jitter_loop_(strided, *settings_) is strided
    assert_close(strided, ours, atol=0, rtol=0)

@pytest.mark.parametrize('c', [1, 2, 3, 7])
@pytest.mark.parametrize('number', range(15), ids=[*STRONG_OPS, 'mirror'])
def test_each_strong_operation_is_that_of_the_lesson(number, c):
    smooth = images(20, c, 3, 23).repeat_interleave(9, 2)
    x = to_float(torch.cat([images(20, c, 27, 23), smooth]))
    low, high = [*STRONG_OPS.values(), (None, (0, 0))][number][1]
    ops, amounts = torch.full((40, 1), number), low + (high - low)*torch.rand(40, 1, generator=generator(1))
    ours, views = (f(x.clone(), ops, amounts) for f in (fast.strong_loop, lesson.operate_))
    assert ((ours - views).abs() > 1e-5).float().mean() < 1e-3
    assert torch.equal(fast.operate_(x.clone(), ops, amounts), ours)
    does_nothing = number == 0 or (c != 3 and [*STRONG_OPS, 'mirror'][number] == 'color')
    assert (ours != x).any() != does_nothing

# ---- the machinery

def test_the_lesson_needs_no_numba():
    code = "import sys, scan_nb.augment; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_machine_code_needs_no_folder_to_write(monkeypatch):
    def njit(cache=False, **kw):
        if cache: raise RuntimeError('no locator available')
        return numba.njit(**kw)
    monkeypatch.setattr(fast, 'numba', SimpleNamespace(njit=njit))   # numba's own modules keep theirs
    assert fast.compiled(lambda x: x + 1)(2) == 3

def test_every_number_is_in_one_range():
    def note(own, seen): seen[own[0]:own[1]] += 1
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5, 64):
            for count in (1, 3):
                torch.set_num_threads(count)
                seen = torch.zeros(n)
                fast.in_threads(note, n, seen)
                assert (seen == 1).all()
    finally: torch.set_num_threads(threads)
