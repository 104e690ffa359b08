"Synthetic all-sky images: what the generator promises, and what a clustering may not find in them for free."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_nb import datasets as D
from scan_nb.views import disc_mask
from scan_nb.data import UserError
from scan_nb.datasets import AURORA, synthetic_aurora
from scan_nb.evaluate import cluster_metrics

DAY = 86400
quick = settings(max_examples=20, deadline=None)

@pytest.fixture(scope='module')
def sky(): return synthetic_aurora()

# ---- shape, type, time

@quick
@given(st.integers(1, 50), st.integers(1, 40),
       st.sampled_from([1, 3]), st.integers(0, 2**31), st.integers(1, 60))
def test_any_request_gives_a_valid_set(n, size, channels, seed, frames):
    s = synthetic_aurora(n, size, channels, seed, frames)
    assert s.images.shape == (n, channels, size, size) and s.images.dtype == torch.uint8
    assert s.labels.shape == (n,) and s.labels.dtype == torch.int64 and s.labels.max() < 4
    assert s.times.shape == (n,) and s.times.dtype == torch.float64 and (s.times.diff() > 0).all()
    assert s.classes == list(AURORA) and len(s.classes) == 4
    assert (s.images[..., disc_mask(size) == 0] == 0).all(), 'outside the field of view'

def test_the_seed_decides_everything_and_torch_own_generator_nothing():
    torch.manual_seed(1)
    a, state = synthetic_aurora(60, seed=3), torch.get_rng_state()
    torch.manual_seed(2)
    b, c = synthetic_aurora(60, seed=3), synthetic_aurora(60, seed=4)
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('images', 'labels', 'times'))
    assert (a.images != c.images).float().mean() > .5
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())

def test_sequences_days_and_balance(sky):
    sequence = torch.arange(2000)//5
    for i in range(0, 2000, 5):
        five = sky[i:i+5]
        assert len(five.labels.unique()) == 1 and (five.times.diff() == 10).all()
    assert torch.bincount(sky.labels).tolist() == [500]*4
    days = (sky.times//DAY).long()
    assert torch.equal(days - days[0], sequence//20) and len(days.unique()) == 20
    gap = sky.times[5::5] - sky.times[4:-1:5]
    assert gap.min() >= 800, 'a window of ten minutes holds one sequence'
    assert all(len(sky.labels[days == d].unique()) == 4 for d in days.unique())

# ---- what the pictures are like

def test_frames_of_a_sequence_are_near_copies_that_drift():
    x = synthetic_aurora(200, frames=10, noise=0).images.float().flatten(1)/255
    apart = torch.cdist(x, x)
    sequence = torch.arange(200)//10
    next_frame = apart.diagonal(1)[sequence[1:] == sequence[:-1]]
    first_to_last = apart.diagonal(9)[::10]
    strangers = apart[sequence[:, None] != sequence]
    assert next_frame.min() > 0
    assert next_frame.mean() < first_to_last.mean() < strangers.mean()
    assert next_frame.mean() < .4*strangers.mean()

def test_noise_is_what_is_asked_for():
    clean, grainy = (synthetic_aurora(40, noise=v, seed=2).images.float()/255 for v in (0., .05))
    inside = (clean > .2) & (clean < .8)
    spread = (grainy - clean)[inside]/(.3 + clean[inside].sqrt())
    assert abs(spread.mean()) < .002 and spread.std() == pytest.approx(.05, abs=.003)

def test_gray_has_one_channel_and_color_is_green_and_red():
    x = synthetic_aurora(100, channels=3, noise=0).images.float()
    red, green, blue = (x[:, c][:, disc_mask(32) > 0] for c in range(3))
    assert (green.std(1) > blue.std(1)).all() and (red.std(1) > blue.std(1)).all()
    assert len(synthetic_aurora(2).images[0]) == 1

def test_brightness_alone_says_little(sky):
    light = sky.images.float().mean((1, 2, 3))
    within = torch.stack([light[sky.labels == k].std() for k in range(4)])
    means = torch.stack([light[sky.labels == k].mean() for k in range(4)])
    assert means.max() - means.min() < within.mean()

def test_pixels_do_not_cluster_into_the_classes(sky):
    from sklearn.cluster import KMeans
    found = KMeans(4, n_init=2, random_state=0).fit_predict(sky.images.flatten(1).float().numpy()/255)
    assert cluster_metrics(torch.from_numpy(found).long(), sky.labels)['acc'] < .6

def test_the_class_is_in_the_structure_not_in_the_orientation(sky):
    "A classifier with labels on a few features blind to place and turn gets most of them right."
    from sklearn.linear_model import LogisticRegression
    x = sky.images[:, 0].float()/255
    fft = torch.fft.fftshift(torch.fft.fft2(x - x.mean((1, 2), keepdim=True)).abs(), dim=(1, 2)).log1p()
    side = torch.arange(32) - 16
    ring = torch.hypot(side[:, None].float(), side.float()).round().long().clamp_max(15)
    rings = torch.stack([torch.cat([fft[:, ring == k].mean(1)[:, None], fft[:, ring == k].std(1)[:, None]], 1)
                         for k in range(1, 16)], 1).flatten(1).numpy()
    y, train = sky.labels.numpy(), np.arange(2000) < 1000      # first ten days, last ten days
    model = LogisticRegression(max_iter=2000).fit(rings[train], y[train])
    assert model.score(rings[~train], y[~train]) > .85

def test_clouds_and_moon_come_and_go():
    g, t = torch.Generator().manual_seed(0), torch.zeros(300, 1, 1)
    side = (torch.arange(16) + .5)/8 - 1
    x, y = side.expand(16, 16), -side[:, None].expand(16, 16)
    cloud = D._clouds(x, y, t, D._drawer(torch.arange(300), g))
    assert 0 <= cloud.min() and cloud.max() <= 1 and .2 < (cloud.amax((1, 2)) > 0).float().mean() < .4
    seconds = (torch.arange(300)*DAY).double()[:, None, None] + 7*3600
    moon = D._moonlight(x, y, seconds, g)
    up = moon.amax((1, 2)) > .3
    assert .23 < up.float().mean() < .44
    day = int(up.nonzero()[0])
    seconds[day + 1:] = seconds[day] + 3*3600        # as if the same day went on
    g.manual_seed(0)
    D._clouds(x, y, t, D._drawer(torch.arange(300), g))
    later = D._moonlight(x, y, seconds, g)
    assert later[day].flatten().argmax() != later[day + 1].flatten().argmax(), 'it moves'

# ---- faults

@pytest.mark.parametrize('bad', [dict(n=0), dict(size=0), dict(frames=0), dict(frames=61), dict(channels=2),
                                 dict(noise=-.1), dict(noise=float('nan'))], ids=str)
def test_a_wrong_number_is_refused_in_one_sentence(bad):
    with pytest.raises(UserError, match='Synthetic aurora needs') as error: synthetic_aurora(**bad)
    assert '\n' not in str(error.value)
