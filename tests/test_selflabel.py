"Self-labelling: the loss, the slow teacher, and a stage that cannot fail or harm."

import copy
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.models import ClusteringModel, small_resnet
from scan_nb.neighbors import embed
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import logits_of, train_heads
from scan_nb.selflabel import EMA, confident_cross_entropy, train_selflabel
from scan_nb.training import Checkpoint, CosineSchedule, make_generator


def draw(seed, *shape, scale=3.0):
    return torch.randn(*shape, generator=make_generator(seed)) * scale


def reference(weak, strong, threshold, balance, soft):
    "Float64, image by image, with soft or hard targets."
    p, q = weak.double().softmax(1).numpy(), strong.double().softmax(1).numpy()
    rows = [i for i in range(len(p)) if p[i].max() > threshold]
    if not rows:
        return 0.0
    labels = {i: int(p[i].argmax()) for i in rows}
    count = np.bincount(list(labels.values()), minlength=p.shape[1])
    weight = {i: 1 / count[y] if balance else 1.0 for i, y in labels.items()}
    lesson = {i: p[i] if soft else np.eye(p.shape[1])[labels[i]] for i in rows}
    return sum(-weight[i] * (lesson[i] * np.log(q[i])).sum() for i in rows) / sum(weight.values())


@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 30),
    c=st.integers(2, 8),
    threshold=st.floats(0, 0.99),
    balance=st.booleans(),
    soft=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_loss_equals_brute_force(seed, b, c, threshold, balance, soft):
    weak, strong = draw(seed, b, c), draw(seed + 1, b, c)
    if (weak.softmax(1).amax(1) - threshold).abs().min() < 1e-6:
        return  # a tie with the threshold
    ours, exact = (
        confident_cross_entropy(weak, strong, threshold, balance, soft),
        reference(weak, strong, threshold, balance, soft),
    )
    assert ours.item() == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_teacher_gets_no_gradient_and_balance_evens_the_classes():
    weak = torch.tensor([[9.0, 0.0]] * 9 + [[0.0, 9.0]]).requires_grad_()
    strong = torch.zeros(10, 2, requires_grad=True)
    confident_cross_entropy(weak.detach(), strong, 0.9).backward()
    assert strong.grad[:9, 0].sum().item() == pytest.approx(strong.grad[9, 1].item())


@given(seed=st.integers(0, 10**6), b=st.integers(1, 20), c=st.integers(2, 6), balance=st.booleans())
@settings(max_examples=40, deadline=None)
def test_soft_targets_are_learned_when_the_student_agrees(seed, b, c, balance):
    teacher = draw(seed, b, c)
    student = teacher.clone().requires_grad_()
    confident_cross_entropy(teacher, student, 0.0, balance, soft=True).backward()
    assert student.grad.abs().max() < 1e-6
    other = confident_cross_entropy(teacher, draw(seed + 1, b, c), 0.0, balance, soft=True)
    assert other >= confident_cross_entropy(teacher, teacher, 0.0, balance, soft=True) - 1e-5


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


@pytest.mark.parametrize('options', [{}, dict(soft_targets=True), dict(balance=False, ema_decay=None)])
def test_a_mask_of_zeros_never_raises(start, options):
    "The authors' users meet an error here, in whatever setting."
    images, neighbors, model, views = start
    undecided = copy.deepcopy(model)
    with torch.no_grad():
        undecided.cluster_head.weight.zero_()
        undecided.cluster_head.bias.zero_()
    before = copy.deepcopy(undecided)
    result = train_selflabel(undecided, images, neighbors, views, epochs=1, batch_size=100, **options)
    assert result.history[0]['skipped'] == 3 and 'loss' not in result.history[0]
    assert result.kept and same(undecided, before)


def test_ready_made_optimizer_and_schedule_replace_the_defaults(start):
    images, neighbors, model, views = start
    options = dict(threshold=0.5, ema_decay=None, epochs=2, batch_size=100, tolerance=1e9)

    def run(make, schedule=None, **more):
        trained = copy.deepcopy(model)
        optimizer = make and make(trained)
        plan = schedule and schedule(optimizer)
        result = train_selflabel(
            trained, images, neighbors, views, optimizer=optimizer, schedule=plan, **options, **more
        )
        return trained, result.history

    adam = lambda m: torch.optim.Adam(m.parameters(), 1e-4, weight_decay=1e-4)
    still = lambda m: torch.optim.SGD(m.parameters(), 0.0)
    head = lambda m: torch.optim.SGD(m.cluster_head.parameters(), 0.1)
    default, history = run(None)
    assert [row['lr'] for row in history] == [1e-4, 1e-4]
    assert same(default, run(adam)[0]) and not same(default, model)
    assert same(default, run(adam, lambda o: CosineSchedule(o, 6, final=1.0))[0])
    assert same(default, run(adam, lr=1.0)[0]), 'lr is of the default optimizer'
    falling, history = run(adam, lambda o: CosineSchedule(o, 6))
    assert history[0]['lr'] > history[1]['lr'] and not same(falling, default)
    assert all(map(torch.equal, run(still)[0].parameters(), model.parameters()))
    only_head = run(head)[0]
    assert all(map(torch.equal, only_head.backbone.parameters(), model.backbone.parameters()))
    assert not torch.equal(only_head.cluster_head.weight, model.cluster_head.weight)


def test_large_images_are_judged_and_taught_in_the_size_of_their_views(start):
    images, neighbors, model, views = start
    large, trained, sizes = torch.nn.functional.pad(images, (3, 3, 2, 2)), copy.deepcopy(model), set()
    trained.register_forward_pre_hook(lambda module, x: sizes.add(tuple(x[0].shape[2:])))
    result = train_selflabel(trained, large, neighbors, views, epochs=1, batch_size=100, threshold=.3)
    assert sizes == {(8, 8)} and result.history
    whole, sizes_of_whole = copy.deepcopy(model), set()
    whole.register_forward_pre_hook(lambda module, x: sizes_of_whole.add(tuple(x[0].shape[2:])))
    train_selflabel(whole, large, neighbors, lambda x, g: x, epochs=1, batch_size=100)
    assert sizes_of_whole == {(12, 14)}   # views of no size of their own: the images as they are


def test_optimizers_of_other_weights_are_refused(start):
    images, neighbors, model, views = start
    trained, other = copy.deepcopy(model), copy.deepcopy(model)
    stale, own = torch.optim.Adam(other.parameters()), torch.optim.Adam(trained.parameters())
    with pytest.raises(UserError, match='weights of another model'):
        train_selflabel(trained, images, neighbors, views, optimizer=stale)
    for optimizer in own, None:
        with pytest.raises(UserError, match='schedule belongs to another optimizer'):
            train_selflabel(
                trained, images, neighbors, views, optimizer=optimizer, schedule=CosineSchedule(stale, 9)
            )


def test_soft_targets_are_another_lesson(start):
    images, neighbors, model, views = start

    def run(**options):
        trained = copy.deepcopy(model)
        train_selflabel(
            trained, images, neighbors, views, threshold=0.3, epochs=1, batch_size=99, tolerance=9, **options
        )
        return trained

    assert same(run(), run(soft_targets=False)) and not same(run(), run(soft_targets=True))


def test_prior_draws_the_clusters_to_uneven_sizes():
    "A linear model on pixels; ten clusters, one expected to hold 10/19 of the images."
    images, flat = digits()[:300].images, nn.Flatten()
    flat.dim = 64
    model = ClusteringModel(flat, 10)
    z = embed(model, images)
    neighbors = mine_neighbors(z, 5)
    trained = train_heads(z, neighbors, 10, n_heads=8, epochs=30, batch_size=100)
    model.cluster_head = trained.heads
    model.select(trained.best)

    def largest(prior):
        changed = copy.deepcopy(model)
        train_selflabel(
            changed, images, neighbors, lambda x, _: x, threshold=0.0, balance=False, prior=prior,
            ema_decay=None, lr=0.1, batch_size=100, tolerance=1e9,
        )  # fmt: skip
        return logits_of(changed, images).softmax(-1).mean(0).max().item()

    assert largest(None) < 0.2
    assert largest(torch.tensor([1.0] * 9 + [10.0])) == pytest.approx(10 / 19, abs=0.1)
    with pytest.raises(UserError, match='class sizes above 0'):
        largest(torch.ones(3))


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
