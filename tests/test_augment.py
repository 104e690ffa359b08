"Views: every operation against torchvision, properties of every augmentation, and what bad input gets."
import copy
import math
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from scan_nb import augment as A, augment_fast, views
from scan_nb.augment import Normalize, STRONG_OPS, to_float
from scan_nb.data import UserError

BILINEAR = dict(interpolation=TF.InterpolationMode.BILINEAR)
quick = settings(max_examples=25, deadline=None)
SimCLRAugment, WeakAugment, StrongAugment = views.SimCLRAugment, views.WeakAugment, views.StrongAugment
ROOMS = dict(lesson=A, fast=SimpleNamespace(**{**vars(augment_fast), **vars(views)}))
each_room = pytest.mark.parametrize('room', ROOMS.values(), ids=ROOMS)

def generator(seed=0): return torch.Generator().manual_seed(seed)

def images(n=6, c=3, h=20, w=24, seed=0):
    "Random bytes with flat patches, extremes and one constant image."
    x = torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=generator(seed))
    x[:, :, :h//3] = x[:, :, :1, :1]
    if n > 1: x[1] = 77
    if n > 2: x[2] = (x[2] > 128)*255
    return x

def plain(kind):
    "A class of `views` with the lesson's operations and without programs: what its switches mean."
    there, operations = getattr(views, kind), dict(warp=A.warp, jitter=A.color_jitter_, operate=A.operate_)
    own = {name: staticmethod(f) for name, f in operations.items() if hasattr(there, name)}
    return type(kind, (there,), {**own, 'uses_programs': lambda self, x: False})

def one_by_one(f, x, values): return torch.stack([f(image, value.item()) for image, value in zip(x, values)])

def everything(size, room=A, **kw):
    "A SimCLR augmentation with every switch of the room on."
    most = dict(scale=(.3, 1.3), rotation=20, blur_p=.5, erase=2)
    if room is not A: most |= dict(tint_p=.5, strip_p=.5)
    return room.SimCLRAugment(size, **most | kw)

# ---- the fourteen operations and the jitter, against torchvision

def sheared(image, x=0., y=0., shift=(0, 0)):
    angles = [math.degrees(math.atan(v)) for v in (x, y)]
    return TF.affine(image, 0, list(shift), 1., angles, center=[0, 0], **BILINEAR)

FLOAT_OPS = {
    'identity': lambda i, m: i,
    'autocontrast': lambda i, m: TF.autocontrast(i),
    'rotate': lambda i, m: TF.rotate(i, m, **BILINEAR),
    'color': TF.adjust_saturation, 'contrast': TF.adjust_contrast,
    'brightness': TF.adjust_brightness, 'sharpness': TF.adjust_sharpness,
    'shear_x': lambda i, m: sheared(i, x=m), 'shear_y': lambda i, m: sheared(i, y=m),
    'translate_x': lambda i, m: sheared(i, shift=(-m*i.shape[2], 0)),
    'translate_y': lambda i, m: sheared(i, shift=(0, -m*i.shape[1])),
}
BYTE_OPS = {
    'equalize': lambda i, m: TF.equalize(i),
    'solarize': lambda i, m: 255 - i if m <= 0 else TF.solarize(i, m) if m <= 255 else i,
    'posterize': lambda i, m: TF.posterize(i, int(m)),
}

def test_there_are_fourteen_operations_with_the_ranges_of_the_paper():
    assert len(STRONG_OPS) == 14 and STRONG_OPS.keys() == FLOAT_OPS.keys() | BYTE_OPS.keys()
    ranges = {name: bounds for name, (_, bounds) in STRONG_OPS.items()}
    assert ranges['rotate'] == (-30, 30) and ranges['solarize'] == (0, 256) and ranges['posterize'] == (4, 8)
    assert all(ranges[k] == (.05, .95) for k in ('color', 'contrast', 'brightness', 'sharpness'))
    assert all(ranges[k] == (-.1, .1) for k in ('shear_x', 'shear_y', 'translate_x', 'translate_y'))

@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', FLOAT_OPS)
def test_float_operation_equals_torchvision(name, channels):
    op, (low, high) = STRONG_OPS[name]
    x, m = to_float(images(c=channels)), torch.linspace(low, high, 6)
    assert_close(op(x.clone(), m), one_by_one(FLOAT_OPS[name], x, m), atol=2e-4, rtol=0)

@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', BYTE_OPS)
def test_byte_operation_equals_torchvision_exactly(name, channels):
    op, (low, high) = STRONG_OPS[name]
    for seed in range(3):
        x, m = images(c=channels, h=40, w=33, seed=seed), torch.linspace(low, high, 6)
        ours = (255*op(to_float(x), m)).round().byte()
        assert_close(ours, one_by_one(BYTE_OPS[name], x, m), atol=0, rtol=0)

def test_equalize_of_smooth_and_of_tiny_images():
    ramp = torch.arange(64, dtype=torch.uint8).repeat(48, 1)[None]*2 + 40
    x = torch.stack([ramp, 255 - ramp, ramp//16*16])
    ours = (255*A.equalize(to_float(x), torch.zeros(3))).round().byte()
    assert_close(ours, torch.stack([TF.equalize(i) for i in x]), atol=0, rtol=0)
    tiny = images(c=1, h=8, w=8)   # 64 pixels cannot fill 256 levels
    assert_close(A.equalize(to_float(tiny), torch.zeros(6)), to_float(tiny))

def test_operations_round_to_the_nearest_level():
    x = torch.full((1, 1, 4, 4), 99.6/255)
    assert_close(A.solarize(x, torch.tensor([100.])), 1 - x)
    assert_close(A.solarize(x, torch.tensor([100.5])), x)
    assert_close(A.posterize(x, torch.tensor([8.])), torch.full_like(x, 100/255))

@pytest.mark.parametrize('name', ['brightness', 'contrast', 'color'])
def test_blends_above_one_clip_as_torchvision(name):
    x, f = to_float(images()), torch.linspace(0, 2.5, 6)
    assert_close(getattr(A, name)(x, f), one_by_one(FLOAT_OPS[name], x, f), atol=3e-4, rtol=0)

def test_hue_equals_torchvision():
    x, shift = to_float(images(c=3, n=9)), torch.linspace(-.5, .5, 9)
    x[3] = x[3, :1]                                  # gray
    x[4] = torch.eye(3)[:, :, None].repeat(1, 7, 24)[:, :20]   # pure red, green, blue
    assert_close(A.hue(x, shift), one_by_one(TF.adjust_hue, x, shift), atol=1e-5, rtol=0)
    assert_close(A.hue(x, torch.zeros(9)), x, atol=1e-6, rtol=0)

def test_luma_is_that_of_pil():
    from PIL import Image
    x = images()
    gray = [np.array(Image.fromarray(i.permute(1, 2, 0).numpy()).convert('L')) for i in x]
    theirs = torch.tensor(np.stack(gray))
    assert (255*A.luma(to_float(x))[:, 0] - theirs).abs().max() < .6

@each_room
def test_jitter_in_every_order_equals_torchvision_one_by_one(room):
    orders = torch.cartesian_prod(*[torch.arange(3)]*3)
    orders = orders[[len(set(o)) == 3 for o in orders.tolist()]].repeat(5, 1)  # 6 orders × 5 places of hue
    hue_at = torch.arange(5).repeat_interleave(6)
    x, g = to_float(images(30)), generator(1)
    factors, shift = .6 + .8*torch.rand(30, 3, generator=g), .4*torch.rand(30, generator=g) - .2
    ours = room.color_jitter_(x.clone(), orders, factors, shift, hue_at)
    blends = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    for i in range(30):
        y, steps = x[i], [(blends[k], factors[i, k].item()) for k in orders[i].tolist()]
        if hue_at[i] == 4: steps = []
        else: steps.insert(int(hue_at[i]), (TF.adjust_hue, shift[i].item()))
        for f, v in steps: y = f(y, v)
        assert_close(ours[i], y, atol=2e-3, rtol=0)

@each_room
def test_jitter_of_gray_images_is_brightness_and_contrast_only(room):
    x = to_float(images(3, c=1))
    order = torch.tensor([[0, 1], [1, 0], [1, 0]])
    factors = torch.tensor([[1.3, .6, 9.], [.7, 1.4, 9.], [5., 5., 9.]])
    ours = room.color_jitter_(x.clone(), order, factors, torch.full((3,), .3), torch.tensor([0, 0, 4]))
    assert_close(ours[0], TF.adjust_contrast(TF.adjust_brightness(x[0], 1.3), .6), atol=1e-5, rtol=0)
    assert_close(ours[1], TF.adjust_brightness(TF.adjust_contrast(x[1], 1.4), .7), atol=1e-5, rtol=0)
    assert_close(ours[2], x[2])

def test_blur_equals_torchvision():
    x, sigma = to_float(images()), torch.tensor([.1, .3, .7, 1., 1.5, 2.])
    theirs = one_by_one(lambda i, s: TF.gaussian_blur(i, 5, s), x, sigma)
    assert_close(A.gaussian_blur(x, sigma, 2), theirs, atol=1e-5, rtol=0)

def test_cut_out_is_a_square_around_its_center_and_nothing_else():
    side = torch.tensor([0, 1, 4, 5, 7, 40])
    center = torch.tensor([[.5, .5], [.99, .0], [.5, .5], [0., 0.], [.9, .9], [.3, .3]])
    out = A.cut_out_(torch.ones(6, 3, 20, 24), center, side, fill=.25)
    for k in range(6):
        expected, s = torch.ones(20, 24), int(side[k])
        left, top = int(center[k, 0]*24) - s//2, int(center[k, 1]*20) - s//2
        expected[max(0, top):max(0, top + s), max(0, left):max(0, left + s)] = .25
        assert_close(out[k], expected.expand(3, -1, -1), atol=0, rtol=0)
    assert (out[2] == .25).sum() == 3*16 and (out[0] == 1).all()

# ---- geometry

BOXES = [(3, 2, 10, 8), (0, 0, 24, 20), (20, 15, 4, 5), (1, 1, 3, 2), (-4, -3, 30, 28), (-9, 4, 20, 9)]

@each_room
@pytest.mark.parametrize('box', BOXES)
def test_crop_equals_torchvision_inside_and_beyond_the_image(room, box):
    left, top, width, height = box
    x = to_float(images())
    theirs = TF.resized_crop(x, top, left, height, width, [16, 16], antialias=False)
    boxes = torch.tensor([box], dtype=torch.float).expand(6, -1)
    flip = torch.ones(6, dtype=torch.bool)
    assert_close(A.crop(x, boxes, 16, warp=room.warp), theirs, atol=1e-5, rtol=0)
    assert_close(A.crop(x, boxes, 16, flip, room.warp), theirs.flip(3), atol=1e-5, rtol=0)

@each_room
def test_rotated_crop_equals_torchvision_affine(room):
    x, angle = to_float(images(h=24, w=24)), torch.tensor([-90., -30, -5, 0, 17, 180])
    whole = torch.tensor([[0., 0, 24, 24]]).expand(6, -1)
    ours = room.warp(x, A.crop_matrix(whole, 24, angle=angle), 24)
    assert_close(ours, one_by_one(FLOAT_OPS['rotate'], x, angle), atol=1e-4, rtol=0)
    box = torch.tensor([[6., 3, 16, 16]])            # 1.5 times larger, center (14, 11) moved to (12, 12)
    ours = room.warp(x[:1], A.crop_matrix(box, 24, angle=torch.tensor([20.])), 24)
    theirs = TF.affine(x[0], -20., [-2*1, 1], 1.5, [0.], center=[14, 11], **BILINEAR)
    assert_close(ours[0], theirs, atol=1e-4, rtol=0)

@each_room
def test_rotation_is_counter_clockwise_and_a_flip_comes_first_in_the_output(room):
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 7] = 1                                 # right of the center
    whole = torch.tensor([[0., 0, 9, 9]])
    up = room.warp(x, A.crop_matrix(whole, 9, angle=torch.tensor([90.])), 9)
    assert up[0, 0, 1, 4] > .99
    both = room.warp(x, A.crop_matrix(whole, 9, torch.tensor([True]), torch.tensor([30.])), 9)
    turned = room.warp(x, A.crop_matrix(whole, 9, angle=torch.tensor([30.])), 9)
    assert_close(both, turned.flip(3), atol=1e-5, rtol=0)

@each_room
def test_identity_map_and_whole_pixel_shifts_are_exact(room):
    x = to_float(images())
    assert_close(room.warp(x, torch.eye(2, 3).expand(6, -1, -1)), x, atol=1e-5, rtol=0)
    left = room.warp(x, A.motion('translate_x', torch.full((6,), 3/24), 20, 24))
    assert_close(left[..., :-3], x[..., 3:], atol=1e-5, rtol=0)
    assert left[..., -3:].abs().max() < 1e-5

@pytest.mark.parametrize('low, shape', [(.2, (1000, 1000)), (.9, (1000, 1000)), (.08, (600, 1100))])
def test_boxes_have_torchvisions_distribution(low, shape):
    from scipy.stats import ks_2samp
    n, state = 3000, torch.random.get_rng_state()
    torch.manual_seed(6)
    blank, scale, draw = torch.empty(1, *shape), (low, 1.), T.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(blank, scale, (3/4, 4/3)) for _ in range(n)]).double()
    torch.random.set_rng_state(state)
    boxes = A.random_boxes(torch.empty(n, 1, *shape, device='meta'), scale, generator=generator(2)).double()
    whole, sizes = torch.tensor(shape[::-1]), boxes[:, 2:].round()               # torchvision's whole pixels
    place = (boxes[:, :2]/(whole - boxes[:, 2:])).nan_to_num() * (whole - sizes + 1)
    ours = torch.cat([place.floor(), sizes], 1)[:, [1, 0, 3, 2]]
    for k in range(4): assert ks_2samp(ours[:, k], theirs[:, k]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2]*ours[:, 3], theirs[:, 2]*theirs[:, 3]).pvalue > 1e-3

@quick
@given(st.integers(1, 40), st.integers(1, 40), st.floats(.01, 1), st.floats(.2, 5), st.integers(0, 99))
def test_boxes_lie_inside_unless_the_scale_exceeds_one(h, w, low, ratio, seed):
    ratios = (min(ratio, 1/ratio), max(ratio, 1/ratio))
    boxes = A.random_boxes(torch.empty(50, 1, h, w), (low, 1.), ratios, generator(seed))
    left, top, width, height = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (width > 0).all() and (height > 0).all()
    assert (left + width <= w*1.0001).all() and (top + height <= h*1.0001).all()
    aspect = width/height
    assert (aspect > ratios[0]*.999).all() and (aspect < ratios[1]*1.001).all()
    far = A.random_boxes(torch.empty(50, 1, h, w), (1.5, 2.), (1., 1.), generator(seed))
    assert_close(far[:, 2]*far[:, 3]/(h*w), (far[:, 2]*far[:, 3]/(h*w)).clamp(1.499, 2.001))
    room = torch.tensor([w, h]) - far[:, 2:]         # the image lies in the box, or the box in the image
    assert ((far[:, :2] >= room.clamp_max(0) - 1e-3) & (far[:, :2] <= room.clamp_min(0) + 1e-3)).all()

@each_room
def test_zooming_out_pads_with_black(room):
    augment = room.SimCLRAugment(16, scale=(4., 4.), ratio=(1, 1), jitter_p=0, gray_p=0)
    lit = augment(torch.full((20, 3, 16, 16), 255, dtype=torch.uint8), generator()).mean((1, 2, 3))
    assert_close(lit, torch.full((20,), .25), atol=.02, rtol=0)

# ---- properties of the three augmentations

MAKERS = {f'{name}-{where}': maker for where, room in ROOMS.items() for name, maker in dict(
    simclr=room.SimCLRAugment, everything=partial(everything, room=room), weak=room.WeakAugment,
    strong=room.StrongAugment).items()}

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
@quick
@given(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(8, 20), st.integers(0, 9), st.integers(0, 9),
       st.booleans(), st.integers(0, 999))
def test_shape_type_range_seed_and_input_untouched(maker, n, c, size, dh, dw, as_float, seed):
    x = images(n, c, size + dh, size + dw, seed)
    x = to_float(x) if as_float else x
    before, augment = x.clone(), maker(size)
    view = augment(x, generator(seed))
    assert view.shape == (n, c, size, size) and view.dtype == torch.float32 and view.is_contiguous()
    assert view.min() >= 0 and view.max() <= 1
    assert_close(x, before, atol=0, rtol=0)
    assert_close(augment(x, generator(seed)), view, atol=0, rtol=0)

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('c', [1, 3])
def test_a_row_depends_on_its_own_settings_alone(maker, c):
    x, augment = images(40, c, 16, 16), maker(16)
    settings_ = augment.draw(x, generator(3))
    views = augment.render(x, settings_)
    for i in range(40):
        alone = augment.render(x[i:i+1], {name: value[i:i+1] for name, value in settings_.items()})
        assert_close(alone[0], views[i], atol=1e-5, rtol=0)
    order = torch.randperm(40, generator=generator(4))
    mixed = augment.render(x[order], {name: value[order] for name, value in settings_.items()})
    assert_close(mixed, views[order], atol=1e-5, rtol=0)

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
def test_threads_change_nothing(maker):
    x, augment, threads = images(200, 3, 24, 24), maker(24), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = augment(x, generator(1))
        torch.set_num_threads(3)
        assert (augment(x, generator(1)) == alone).all()
    finally: torch.set_num_threads(threads)

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
def test_bytes_and_floats_memory_formats_and_copies_agree(maker):
    x, augment = images(9, 3, 12, 12), maker(12)
    view = augment(x, generator(1))
    assert_close(augment(to_float(x), generator(1)), view)
    assert_close(augment(x.double()/255, generator(1)), view)
    assert_close(augment(x.contiguous(memory_format=torch.channels_last), generator(1)), view)
    assert_close(augment(x.repeat_interleave(2, 0)[::2], generator(1)), view)
    assert_close(copy.deepcopy(augment)(x, generator(1)), view)

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('c', [1, 3])
def test_every_tensor_is_made_on_the_device_of_the_images(maker, c):
    x = images(30, c, 12, 12).to('meta')             # another device than the generator's
    assert maker(12)(x, generator()).device.type == 'meta'

@pytest.mark.parametrize('maker', MAKERS.values(), ids=MAKERS)
def test_the_global_generator_is_used_only_without_one(maker):
    x, augment, state = images(5, 3, 12, 12), maker(12), torch.random.get_rng_state()
    augment(x, generator())
    assert (torch.random.get_rng_state() == state).all()
    augment(x)
    assert (torch.random.get_rng_state() != state).any()
    torch.random.set_rng_state(state)

def test_rows_differ_and_calls_differ():
    g, x = generator(), images(1, 3, 16, 16).expand(8, -1, -1, -1)
    for maker in MAKERS.values():
        a, b = maker(16)(x, g), maker(16)(x, g)
        assert (a != b).any() and len(a.flatten(1).unique(dim=0)) > 4

@each_room
def test_all_switches_off_is_the_image(room):
    x, close = images(7, 3, 16, 16), dict(atol=1e-5, rtol=0)
    still, same = dict(scale=(1, 1), ratio=(1, 1), flip_p=0), to_float(x)
    no_colors = dict(brightness=0, contrast=0, saturation=0, hue=0, gray_p=0)
    assert_close(room.SimCLRAugment(16, **still, jitter_p=0, gray_p=0)(x, generator()), same, **close)
    assert_close(room.SimCLRAugment(16, **still, **no_colors)(x, generator()), same, **close)
    assert_close(room.WeakAugment(16, **still)(x, generator()), same, **close)
    assert_close(room.StrongAugment(16, n_ops=0, cutout=0, flip_p=0)(x, generator()), same, **close)
    assert_close(room.StrongAugment(16, n_ops=0, cutout=0, flip_p=1)(x, generator()), same.flip(3), **close)

@each_room
def test_gray_images_ignore_color_settings(room):
    x = images(30, 1, 12, 12)
    plain = room.SimCLRAugment(12, saturation=0, hue=0, gray_p=0)(x, generator(2))
    assert_close(room.SimCLRAugment(12, saturation=3., hue=.5, gray_p=1.)(x, generator(2)), plain)
    assert_close(A.color(to_float(x), torch.zeros(30)), to_float(x))
    assert_close(A.hue(to_float(x), torch.full((30,), .4)), to_float(x))

@each_room
def test_gray_content_stays_gray_and_gray_views_are_gray(room):
    gray = images(30, 1, 12, 12).expand(-1, 3, -1, -1)
    makers = [partial(room.SimCLRAugment, gray_p=0, hue=hue) for hue in (.1, .5)]
    for augment in (maker(12) for maker in (*makers, room.StrongAugment)):
        view = augment(gray, generator())
        assert (view - view[:, :1]).abs().max() < 1e-5
    view = room.SimCLRAugment(12, gray_p=1)(images(30, 3, 12, 12), generator())
    assert (view - view[:, :1]).abs().max() == 0

def test_chances_and_ranges_of_the_settings():
    n = 20_000
    augment = SimCLRAugment(16, flip_p=.3, rotation=25, jitter_p=.7, gray_p=.15, blur_p=.4, brightness=1.5)
    p = augment.draw(torch.empty(n, 3, 16, 16, device='meta'), generator())
    share = lambda v: v.double().mean().item()
    assert share(p['hue_at'] < 4) == pytest.approx(.7, abs=.02)
    for k in range(4): assert share(p['hue_at'] == k) == pytest.approx(.175, abs=.02)
    assert share(p['gray']) == pytest.approx(.15, abs=.02)
    assert share(p['sigma'] > 0) == pytest.approx(.4, abs=.02)
    assert share(torch.det(p['matrix'][:, :, :2]) < 0) == pytest.approx(.3, abs=.02)
    assert (p['sigma'] <= 2).all() and (p['sigma'][p['sigma'] > 0] >= .1).all()
    assert p['shift'].abs().max() <= .1 and p['factors'][:, 0].min() >= 0 and p['factors'][:, 0].max() <= 2.5
    assert p['factors'][:, 1].min() >= .6 and p['factors'][:, 1].max() <= 1.4
    codes = p['order'] @ torch.tensor([9, 3, 1])
    assert len(codes.unique()) == 6
    for code in codes.unique(): assert share(codes == code) == pytest.approx(1/6, abs=.02)

def test_strong_settings_are_uniform_and_with_replacement():
    n, augment = 8000, StrongAugment(32, cutout=10, flip_p=.25)
    p = augment.draw(torch.empty(n, 3, 36, 40, device='meta'), generator())
    flip, ops = p['ops'][:, 0], p['ops'][:, 1:]
    assert ((flip == 14).double().mean() - .25).abs() < .02 and set(flip.tolist()) == {0, 14}
    counts = torch.bincount(ops.flatten(), minlength=14)/ops.numel()
    assert len(counts) == 14 and (counts - 1/14).abs().max() < .01
    repeated = (ops.sort(1).values.diff(dim=1) == 0).any(1).double().mean()
    assert repeated == pytest.approx(1 - 13*12*11/14**3, abs=.02)
    assert set(p['side'].int().tolist()) == set(range(1, 11))
    assert set(p['corner'][:, 0].int().tolist()) == set(range(9))
    assert set(p['corner'][:, 1].int().tolist()) == set(range(5))
    for k, (_, (low, high)) in enumerate(STRONG_OPS.values()):
        amounts = p['amounts'][:, 1:][ops == k]
        assert amounts.min() >= low and amounts.max() <= high
        assert amounts.max() - amounts.min() >= .9*(high - low)

@each_room
@pytest.mark.parametrize('c', [1, 3])
def test_strong_view_is_its_operations_one_after_the_other(room, c):
    x, augment = images(60, c, 16, 16), room.StrongAugment(16, fill=.5)
    p = augment.draw(x, generator(8))
    views, functions = augment.render(x, p), [*(f for f, _ in STRONG_OPS.values()), lambda x, m: x.flip(3)]
    for i in range(60):
        y = to_float(x[i:i+1])
        for k, m in zip(p['ops'][i].tolist(), p['amounts'][i]): y = functions[k](y, m.view(1))
        y = A.cut_out_(y.clone(), p['center'][i:i+1], p['side'][i:i+1], .5)
        assert_close(views[i:i+1], y, atol=1e-5, rtol=0)

@each_room
def test_strong_crop_takes_whole_pixels(room):
    x, augment = images(20, 3, 15, 19), room.StrongAugment(12, n_ops=0, cutout=0, flip_p=0)
    p = augment.draw(x, generator())
    for view, image, (left, top) in zip(augment.render(x, p), to_float(x), p['corner'].int().tolist()):
        assert_close(view, image[:, top:top + 12, left:left + 12], atol=1e-5, rtol=0)

# ---- round views and chosen operations

def inside(size):
    "Pixels whose center lies in the inscribed circle, one by one."
    return torch.tensor([[math.hypot(i + .5 - size/2, j + .5 - size/2) <= size/2 for j in range(size)]
                         for i in range(size)])

@quick
@given(n=st.integers(1, 5), c=st.sampled_from([1, 3]), h=st.integers(1, 9), w=st.integers(1, 9),
       seed=st.integers(0, 999))
def test_tint_is_pixel_by_pixel(n, c, h, w, seed):
    g = generator(seed)
    x = torch.rand(n, c, h, w, generator=g)*(torch.rand(n, 1, h, w, generator=g) < .4)
    tone, detail = torch.rand(n, generator=g), 2*torch.rand(n, generator=g) - 1
    masks, out = views.silhouette(x), views.tint_(x.clone(), tone, detail)
    for image, t, d, mask, result in zip(x.double(), tone.tolist(), detail.tolist(), masks, out):
        rows = (image > .04).any(0).tolist()
        spans = lambda line, i: any(line[:i + 1]) and any(line[i:])
        inside = [[spans(row, j) and spans(column, i) for j, column in enumerate(zip(*rows))]
                  for i, row in enumerate(rows)]
        assert mask.shape == (1, h, w) and mask[0].bool().tolist() == inside
        within = torch.tensor(inside)
        mean = image[:, within].mean() if within.any() else 0
        assert_close(result.double(), (t + d*(image - mean)).clamp(.04, 1)*within, atol=1e-6, rtol=0)

def test_tints_are_drawn_only_when_asked_for_and_leave_the_rest_of_a_view_alone():
    x = torch.empty(20_000, 1, 8, 8, device='meta')
    plain, tinted = (SimCLRAugment(8, tint_p=p).draw(x, generator()) for p in (0, .3))
    for name in plain.keys() - {'tone', 'detail'}: assert torch.equal(plain[name], tinted[name]), name
    on, detail = tinted['tone'] > 0, tinted['detail']
    assert not plain['tone'].any() and on.double().mean().item() == pytest.approx(.3, abs=.02)
    assert tinted['tone'][on].min() >= .25 and tinted['tone'].max() <= 1
    assert detail.abs().min() >= .1 and (detail < 0).double().mean().item() == pytest.approx(.2, abs=.02)
    still = dict(scale=(1, 1), ratio=(1, 1), flip_p=0, jitter_p=0, gray_p=0)
    photos = to_float(images(9, 3, 16, 16))
    p = SimCLRAugment(16, **still, tint_p=1).draw(photos, generator())
    assert_close(SimCLRAugment(16, **still, tint_p=1)(photos, generator()),
                 views.tint_(photos.clone(), p['tone'], p['detail']), atol=1e-5, rtol=0)

@quick
@given(c=st.sampled_from([1, 3]), top=st.integers(0, 9), bottom=st.integers(1, 9), left=st.integers(0, 9),
       right=st.integers(1, 9), share=st.floats(0, 1), byte=st.booleans())
def test_strip_keeps_the_middle_of_upright_things_the_top_of_others(c, top, bottom, left, right, share, byte):
    x = torch.full((2, c, 20, 12), 10 if byte else .04, dtype=torch.uint8 if byte else torch.float32)   # dark
    x[:, -1, top:top+bottom, left:left+right] = 11 if byte else .05   # in one channel
    out = views.take_strip(x, torch.tensor([share, .5]))
    share = torch.tensor(share).item()   # as float32 has it
    assert out.dtype == x.dtype
    assert torch.equal(out[1], views.take_strip(x[1:], torch.tensor([.5]))[0])
    if upright := bottom > min(right, 12 - left): over = [abs(j + .5 - 6) - share*6 for j in range(12)]
    else: over = [i + .5 - top - (share + .2)*bottom for i in range(20)]
    axis = -1 if upright else -2
    for line, old, v in zip(out[0].unbind(axis), x[0].unbind(axis), over):
        assert abs(v) < 1e-5 or torch.equal(line, old*(v <= 0))

def test_strips_are_drawn_only_when_asked_for_and_leave_the_rest_of_a_view_alone():
    x = torch.empty(20_000, 1, 8, 8, device='meta')
    plain, some = (SimCLRAugment(8, tint_p=.5, strip_p=p).draw(x, generator()) for p in (0, .3))
    for name in plain.keys() - {'strip'}: assert torch.equal(plain[name], some[name]), name
    on = some['strip'] < 1
    assert (plain['strip'] == 1).all() and on.double().mean().item() == pytest.approx(.3, abs=.02)
    assert some['strip'][on].min() >= .3 and some['strip'][on].max() <= .5
    still = dict(scale=(1, 1), ratio=(1, 1), flip_p=0, jitter_p=0, gray_p=0)
    photos = images(9, 3, 16, 16)
    photos[:4, ..., :3] = 0   # upright
    p = SimCLRAugment(16, **still, strip_p=.5).draw(photos, generator())
    expected = torch.where(p['strip'][:, None, None, None] < 1, views.take_strip(photos, p['strip']), photos)
    assert_close(SimCLRAugment(16, **still, strip_p=.5)(photos, generator()), to_float(expected),
                 atol=1e-5, rtol=0)

@pytest.mark.parametrize('size', [1, 2, 3, 7, 8, 31, 32, 96])
def test_disc_mask_is_the_inscribed_circle(size):
    mask = views.disc_mask(size)
    assert mask.dtype == torch.float32 and torch.equal(mask, inside(size).float())
    assert torch.equal(mask, mask.rot90()) and torch.equal(mask, mask.flip(0))

PLAIN = SimpleNamespace(**{kind: plain(kind) for kind in ('SimCLRAugment', 'WeakAugment', 'StrongAugment')})
ROUND = {f'{name}-{where}': maker for where, room in dict(plain=PLAIN, fast=ROOMS['fast']).items()
         for name, maker in dict(simclr=room.SimCLRAugment, everything=partial(everything, room=room),
                                 strong=partial(room.StrongAugment, fill=1.)).items()}

@pytest.mark.parametrize('name', ROUND)
@quick
@given(st.integers(1, 7), st.sampled_from([1, 3]), st.integers(8, 20), st.integers(0, 6), st.integers(0, 999))
def test_disc_blackens_the_outside_and_changes_nothing_inside(name, n, c, size, more, seed):
    x = images(n, c, size + more, size + more, seed)
    plain, disc = (ROUND[name](size, disc=on)(x, generator(seed)) for on in (False, True))
    where = inside(size).expand_as(plain)
    assert (disc[~where] == 0).all() and torch.equal(disc[where], plain[where])

def test_disc_is_no_parameter_and_moves_with_the_augmentation():
    augment = SimCLRAugment(8, disc=True)
    assert not augment.state_dict() and 'disc=True' in repr(augment)
    assert augment.mask.shape == (8, 8) and augment.to('meta').mask.device.type == 'meta'
    assert StrongAugment(8).mask is None

def test_ops_are_drawn_evenly_from_those_named():
    names = ('brightness', 'rotate', 'sharpness')
    p = StrongAugment(8, ops=names).draw(torch.empty(6000, 1, 8, 8, device='meta'), generator())
    counts = torch.bincount(p['ops'][:, 1:].flatten(), minlength=14)/24000
    found = {name: float(share) for name, share in zip(STRONG_OPS, counts) if share}
    assert found.keys() == set(names)
    assert all(share == pytest.approx(1/3, abs=.015) for share in found.values())
    for k, (_, (low, high)) in enumerate(STRONG_OPS.values()):
        amounts = p['amounts'][:, 1:][p['ops'][:, 1:] == k]
        if len(amounts): assert low <= amounts.min() < low + .05*(high - low) and amounts.max() <= high

@each_room
def test_all_ops_named_is_the_same_as_none(room):
    x = images(50, 3, 12, 12)
    a, b = (room.StrongAugment(12, ops=ops)(x, generator(5)) for ops in (None, list(STRONG_OPS)))
    assert torch.equal(a, b)

@each_room
def test_one_op_alone_is_that_op(room):
    x, only = images(30, 1, 12, 12), dict(n_ops=1, cutout=0, flip_p=0., ops=('contrast',))
    augment = room.StrongAugment(12, **only)
    p = augment.draw(x, generator(2))
    assert_close(augment.render(x, p), A.contrast(to_float(x), p['amounts'][:, 1]))

BAD_OPS = [(('rotated',), "did you mean 'rotate'"), (('hue', 'rotate'), "'hue'"), ((), 'ops is'),
           ('rotate', 'ops is'), ((3,), '3'), (('identity', ''), "''")]

@pytest.mark.parametrize('ops, word', BAD_OPS, ids=str)
def test_unknown_ops_are_named(ops, word):
    with pytest.raises(UserError, match=word) as error: StrongAugment(8, ops=ops)
    assert '\n' not in str(error.value)

@each_room
def test_settings_survive_a_state_dict_and_print(room):
    augment = room.SimCLRAugment(28, flip_p=0., rotation=15)
    assert not augment.state_dict() and 'rotation=15' in repr(augment) and isinstance(hash(augment), int)
    assert torch.nn.Sequential(augment, torch.nn.Flatten())(images(2, 1, 28, 28)).shape == (2, 784)

# ---- normalization

@quick
@given(st.integers(1, 30), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(0, 99))
def test_normalize_fits_mean_and_deviation(n, c, side, seed):
    x = torch.randint(0, 256, (n, c, side, side), dtype=torch.uint8, generator=generator(seed))
    normalize, exact = Normalize.fit(x), x.double()/255
    assert_close(normalize.mean.double(), exact.mean((0, 2, 3)), atol=1e-6, rtol=0)
    deviation = exact.std((0, 2, 3), unbiased=False)
    assert_close(normalize.std.double(), deviation.clamp_min(1/255), atol=1e-5, rtol=0)
    assert_close(normalize(x), TF.normalize(to_float(x), normalize.mean, normalize.std))
    assert_close(normalize(to_float(x)), normalize(x))

def test_normalize_takes_many_images_constants_and_gradients():
    x = torch.randint(0, 256, (9000, 1, 3, 3), dtype=torch.uint8, generator=generator())
    assert_close(Normalize.fit(x).std[0].double(), (x.double()/255).std(unbiased=False), atol=1e-6, rtol=0)
    flat = Normalize.fit(torch.full((5, 3, 4, 4), 9, dtype=torch.uint8))
    assert flat(torch.zeros(1, 3, 4, 4)).isfinite().all()
    z = torch.rand(2, 3, 4, 4, requires_grad=True)
    flat(z).sum().backward()
    assert_close(z.grad, torch.full_like(z, 255.))
    assert {*flat.state_dict()} == {'mean', 'std'}

# ---- what is refused

LIKE = (2, 3, 8, 8)
BAD_BATCHES = [
    (np.zeros(LIKE, np.uint8), 'ndarray'), (torch.zeros(3, 8, 8), 'shape'),
    (torch.zeros(2, 0, 8, 8), 'C = 1 to 16'), (torch.zeros(2, 17, 8, 8), 'C = 1 to 16'),
    (torch.zeros(0, 3, 8, 8), 'not empty'), (torch.zeros(2, 3, 0, 8), 'not empty'),
    (torch.zeros(LIKE, dtype=torch.int64), 'int64'), (torch.zeros(LIKE, dtype=torch.bool), 'bool'),
    (torch.full(LIKE, 1.5), 'outside'), (torch.full(LIKE, -.5), 'outside'),
    (torch.full(LIKE, 255.), 'outside'), (torch.full(LIKE, math.nan), 'NaN'),
    (torch.full(LIKE, math.inf), 'outside'),
]

BOLD = partial(everything, room=views)

@pytest.mark.parametrize('maker', [SimCLRAugment, BOLD, WeakAugment, StrongAugment])
@pytest.mark.parametrize('batch, word', BAD_BATCHES, ids=range(len(BAD_BATCHES)))
def test_bad_images_are_refused_in_one_sentence(maker, batch, word):
    with pytest.raises(UserError, match=word) as error: maker(8)(batch, generator())
    assert '\n' not in str(error.value)

BAD_SETTINGS = [
    (SimCLRAugment, dict(size=0), 'size'), (SimCLRAugment, dict(size=8.5), 'size'),
    (WeakAugment, dict(size='8'), 'size'), (StrongAugment, dict(size=0), 'size'),
    *[(SimCLRAugment, dict(size=8, **{name: value}), name) for name, value in [
        ('scale', (0., 1.)), ('scale', (1., .5)), ('scale', .5), ('scale', (.2, math.nan)),
        ('ratio', (-1., 1.)), ('flip_p', 1.2), ('jitter_p', -1), ('gray_p', math.nan), ('blur_p', 7),
        ('tint_p', -.5), ('strip_p', 2), ('hue', .6), ('rotation', -5),
        ('brightness', -.1), ('contrast', math.inf), ('saturation', -2), ('erase', -1)]],
    *[(WeakAugment, dict(size=8, **{name: value}), name) for name, value in [
        ('scale', (.2, .5, 1)), ('ratio', (2., 1.)), ('flip_p', -.1)]],
    *[(StrongAugment, dict(size=8, **{name: value}), name) for name, value in [
        ('n_ops', -1), ('n_ops', 1.5), ('cutout', -2), ('cutout', .5), ('flip_p', 2), ('fill', 2.)]],
]

@pytest.mark.parametrize('maker, bad, word', BAD_SETTINGS)
def test_bad_settings_are_named(maker, bad, word):
    with pytest.raises(UserError, match=f'^{word} is ') as error: maker(**bad)
    assert '\n' not in str(error.value)

def test_other_bad_input():
    with pytest.raises(UserError, match='8×30 are smaller than size 9'): StrongAugment(9)(images(2, 3, 8, 30))
    with pytest.raises(UserError, match='int32'): to_float(torch.zeros(3, dtype=torch.int32))
    for images_ in (torch.zeros(0, 1, 8, 8), torch.zeros(3, 8, 8), np.zeros((1, 1, 2, 2))):
        with pytest.raises(UserError): Normalize.fit(images_)
    for mean, std in (([.5], [0.]), ([.5, .5], [1.]), ([math.nan], [1.]), ([.5], [math.inf]), ([.5], [-1.])):
        with pytest.raises(UserError, match='std above 0'): Normalize(mean, std)
