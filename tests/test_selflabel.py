"Self-labelling: the loss, the slow teacher, and a stage that cannot fail or harm."

import copy
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from scan_nb.augment import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.models import ClusteringModel, small_resnet
from scan_nb.neighbors import embed, mine_neighbors
from scan_nb.scan import logits_of, train_heads
from scan_nb.selflabel import EMA, confident_cross_entropy, train_selflabel
from scan_nb.training import Checkpoint, make_generator


def draw(seed, *shape, scale=3.0):
    return torch.randn(*shape, generator=make_generator(seed)) * scale


def reference(weak, strong, threshold, balance):
    "Float64, image by image."
    p, q = weak.double().softmax(1).numpy(), strong.double().softmax(1).numpy()
    rows = [i for i in range(len(p)) if p[i].max() > threshold]
    if not rows:
        return None
    labels = {i: int(p[i].argmax()) for i in rows}
    count = np.bincount(list(labels.values()), minlength=p.shape[1])
    weight = {i: 1 / count[y] if balance else 1.0 for i, y in labels.items()}
    return sum(-weight[i] * np.log(q[i, labels[i]]) for i in rows) / sum(weight.values())


@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 30),
    c=st.integers(2, 8),
    threshold=st.floats(0, 0.99),
    balance=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_loss_equals_brute_force(seed, b, c, threshold, balance):
    weak, strong = draw(seed, b, c), draw(seed + 1, b, c)
    if (weak.softmax(1).amax(1) - threshold).abs().min() < 1e-6:
        return  # a tie with the threshold
    ours, exact = (
        confident_cross_entropy(weak, strong, threshold, balance),
        reference(weak, strong, threshold, balance),
    )
    if exact is None:
        assert ours is None
    else:
        assert ours.item() == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_teacher_gets_no_gradient_and_balance_evens_the_classes():
    weak = torch.tensor([[9.0, 0.0]] * 9 + [[0.0, 9.0]]).requires_grad_()
    strong = torch.zeros(10, 2, requires_grad=True)
    confident_cross_entropy(weak.detach(), strong, 0.9).backward()
    assert strong.grad[:9, 0].sum().item() == pytest.approx(strong.grad[9, 1].item())


def test_moving_average_follows_weights_and_batch_norm():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema, start = EMA(model, 0.8), copy.deepcopy(model.state_dict())
    model.train()(torch.randn(20, 3) + 5)
    with torch.no_grad():
        model[0].weight.add_(1)
    for _ in range(3):
        ema.update(model)
    for name, new in model.state_dict().items():
        got = ema.model.state_dict()[name]
        if new.is_floating_point():
            torch.testing.assert_close(got, start[name] * 0.8**3 + new * (1 - 0.8**3))
        else:
            assert got == new
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    with pytest.raises(UserError, match='decay is 1'):
        EMA(model, 1.0)


@pytest.fixture(scope='module')
def start():
    "Digits clustered on the features of an untrained network: many mistakes, quick to make."
    images = digits()[:300].images
    torch.manual_seed(0)
    model = ClusteringModel(small_resnet(1, (8, 16)), 10)
    z = embed(model, images)
    neighbors = mine_neighbors(z, 5)
    trained = train_heads(z, neighbors, 10, n_heads=8, epochs=30, batch_size=100)
    model.cluster_head = trained.heads
    return images, neighbors, model.select(trained.best), SimCLRAugment(8, scale=(0.8, 1.2), flip_p=0.0)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_no_confident_image_is_skipped_and_counted(start):
    images, neighbors, model, views = start
    trained = copy.deepcopy(model)
    result = train_selflabel(trained, images, neighbors, views, threshold=1 - 1e-12, epochs=2, batch_size=100)
    assert [row['skipped'] for row in result.history] == [3, 3] and result.kept
    assert torch.equal(logits_of(trained, images), logits_of(model, images))


def test_ruin_is_noticed_and_undone_at_once(start):
    images, neighbors, model, views = start
    trained = copy.deepcopy(model)
    result = train_selflabel(
        trained, images, neighbors, views, threshold=0.5, ema_decay=None, lr=1.0, epochs=5, batch_size=100
    )
    assert not result.kept and same(trained, model) and not trained.training
    assert len(result.history) == 1, 'the stage stops as soon as it got worse'


def test_entropy_term_keeps_the_clusters_even(start):
    images, neighbors, model, views = start

    def effective(weight):
        options = dict(
            threshold=0.3, balance=False, ema_decay=None, lr=3e-3, epochs=6, batch_size=100, tolerance=1e9
        )
        result = train_selflabel(
            copy.deepcopy(model), images, neighbors, views, entropy_weight=weight, **options
        )
        return result.history[-1]['effective_clusters']

    assert effective(5.0) > effective(0.0)


@pytest.mark.parametrize('ema_decay', [None, 0.9])
def test_deterministic_and_resumed_to_the_bit(start, tmp_path, ema_decay):
    images, neighbors, model, views = start
    options = dict(threshold=0.5, batch_size=100, seed=2, ema_decay=ema_decay, weak=views, tolerance=1e9)
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    a = train_selflabel(whole, images, neighbors, views, epochs=3, **options)

    class Killed(Exception):
        pass

    def kill(epoch):
        if epoch == 2:
            raise Killed
        return {}

    with pytest.raises(Killed):
        train_selflabel(
            copy.deepcopy(model),
            images,
            neighbors,
            views,
            epochs=3,
            monitor=kill,
            checkpoint=Checkpoint(tmp_path / 's.pt'),
            **options,
        )
    b = train_selflabel(
        again, images, neighbors, views, epochs=3, checkpoint=Checkpoint(tmp_path / 's.pt'), **options
    )
    assert same(whole, again) and a.history == b.history and not same(whole, model)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(threshold=1.0), 'threshold is 1'),
        (dict(threshold=-0.1), 'threshold is -0.1'),
        (dict(entropy_weight=-1.0), 'entropy_weight is -1'),
    ],
)
def test_wrong_settings(start, wrong, message):
    images, neighbors, model, views = start
    with pytest.raises(UserError, match=message):
        train_selflabel(copy.deepcopy(model), images, neighbors, views, **wrong)
