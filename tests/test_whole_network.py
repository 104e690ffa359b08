"The stage that trains the whole network, and the watch over it."
import copy
import pytest
import torch
from scan_nb.views import SimCLRAugment
from scan_nb.data import UserError, digits
from scan_nb.models import ClusteringModel, small_resnet
from scan_nb.neighbors import embed
from scan_nb.neighbors_fast import mine_neighbors
from scan_nb.scan import logits_of, train_heads, validate_scan
from scan_nb.training import Checkpoint, CosineSchedule
from scan_nb.whole_network import got_worse, train_scan


def test_got_worse():
    before = dict(effective_clusters=10.0, balance=1.0, agreement=0.9)
    assert got_worse(before, before) == ''
    fewer = before | dict(effective_clusters=9.0)
    assert got_worse(before, fewer) == ''  # as uneven as the prior says
    assert 'effective clusters fell' in got_worse(before, fewer | dict(balance=0.9))
    assert 'agreement of neighbors fell' in got_worse(before, before | dict(agreement=0.8))


@pytest.fixture(scope='module')
def small():
    "A few digits, a tiny network, pixel neighbors."
    ds = digits()[:200]
    torch.manual_seed(0)
    model = ClusteringModel(small_resnet(1, (8, 16)), 10)
    views = SimCLRAugment(8, scale=(0.8, 1.2), flip_p=0.0)
    return ds.images, mine_neighbors(ds.images.flatten(1).float(), 5), model, views


def test_stage_is_deterministic_and_resumes_to_the_bit(small, tmp_path):
    images, neighbors, model, views = small
    options = dict(batch_size=50, lr=1e-3, seed=1)
    whole, first = copy.deepcopy(model), copy.deepcopy(model)
    a = train_scan(whole, images, neighbors, views, epochs=3, **options)

    class Killed(Exception):
        pass

    def kill(epoch):
        if epoch == 3:
            raise Killed
        return {}

    with pytest.raises(Killed):
        train_scan(
            first,
            images,
            neighbors,
            views,
            epochs=3,
            checkpoint=Checkpoint(tmp_path / 'scan.pt'),
            monitor=kill,
            **options,
        )
    again = copy.deepcopy(model)
    b = train_scan(
        again, images, neighbors, views, epochs=3, checkpoint=Checkpoint(tmp_path / 'scan.pt'), **options
    )
    for x, y in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(x, y)
    assert a.history == b.history and a.kept == b.kept and not whole.training


def test_stage_that_ruins_the_clusters_gives_them_back(small):
    images, neighbors, model, views = small
    z, ruined = embed(model, images), copy.deepcopy(model)
    trained = train_heads(z, mine_neighbors(z, 5), 10, n_heads=4, epochs=20, batch_size=100)
    ruined.cluster_head = trained.heads
    old = copy.deepcopy(ruined.select(trained.best).state_dict())
    result = train_scan(
        ruined, images, mine_neighbors(z, 5), views, epochs=2, batch_size=50, lr=1.0, entropy_weight=0.0
    )
    assert not result.kept
    for x, y in zip(old.values(), ruined.state_dict().values()):
        assert torch.equal(x, y)


def test_large_images_are_judged_in_the_size_of_their_views(small):
    images, neighbors, model, views = small
    large, trained, sizes = torch.nn.functional.pad(images, (3, 3, 2, 2)), copy.deepcopy(model), set()
    trained.register_forward_pre_hook(lambda module, x: sizes.add(tuple(x[0].shape[2:])))
    options = dict(epochs=1, batch_size=50, lr=0., prior='estimate', remine_every=1)
    train_scan(trained, large, neighbors, views, **options)
    assert sizes == {(8, 8)}


def test_stage_refuses_foreign_neighbors(small):
    images, neighbors, model, views = small
    with pytest.raises(UserError, match='do not belong to 100 images'):
        train_scan(copy.deepcopy(model), images[:100], neighbors, views, epochs=1)


def several(model, n_heads=3):
    torch.manual_seed(1)
    many = ClusteringModel(copy.deepcopy(model.backbone), 10, n_heads)
    return many


def test_head_only_leaves_the_backbone_alone(small):
    images, neighbors, model, views = small
    trained = several(model, 1)
    before = copy.deepcopy(trained.state_dict())
    train_scan(trained, images, neighbors, views, epochs=2, batch_size=50, lr=1e-2, head_only=True)
    for name, x in trained.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith('backbone'), name
    assert all(p.grad is None and p.requires_grad for p in trained.backbone.parameters())
    sgd = torch.optim.SGD(trained.parameters(), lr=0.1, weight_decay=0.1)
    train_scan(trained, images, neighbors, views, epochs=1, batch_size=50, head_only=True, optimizer=sgd)
    assert all(torch.equal(x, before[n]) for n, x in trained.state_dict().items() if n.startswith('backbone'))


def test_of_several_heads_the_best_stays(small):
    images, neighbors, model, views = small
    trained, seen = several(model), []
    def look(epoch):
        seen.append(validate_scan(logits_of(trained, images, head=None), neighbors).total)
    result = train_scan(trained, images, neighbors, views, epochs=2, batch_size=50, lr=1e-2, monitor=look,
                        tolerance=2.0)
    assert result.kept and trained.cluster_head.weight.shape[0] == 1 and not trained.training
    assert result.history[-1]['head'] == seen[-1].argmin()
    assert result.history[-1]['val_loss'] == pytest.approx(seen[-1].min().item(), abs=1e-4)
    left = validate_scan(logits_of(trained, images), neighbors).total
    assert left.item() == pytest.approx(seen[-1].min().item(), abs=1e-4)


def test_several_heads_that_were_ruined_give_the_best_of_before(small):
    images, neighbors, model, views = small
    trained, start = several(model), several(model)
    losses = validate_scan(logits_of(start, images, head=None), neighbors).total
    result = train_scan(trained, images, neighbors, views, epochs=1, batch_size=50, tolerance=-9.0)
    assert not result.kept
    assert torch.equal(trained.cluster_head.weight[0], start.cluster_head.weight[losses.argmin()])


def test_ready_made_optimizer_and_schedule(small):
    images, neighbors, model, views = small
    options = dict(epochs=2, batch_size=50, seed=1)
    ours, theirs = several(model, 1), several(model, 1)
    train_scan(ours, images, neighbors, views, lr=1e-3, **options)
    adam = torch.optim.Adam(theirs.parameters(), 1e-3, weight_decay=1e-4)
    train_scan(theirs, images, neighbors, views, optimizer=adam, **options)
    assert all(torch.equal(x, y) for x, y in zip(ours.state_dict().values(), theirs.state_dict().values()))
    sgd = torch.optim.SGD(theirs.parameters(), 0.01)
    constant = CosineSchedule(sgd, 8, final=1.0)
    rows = train_scan(theirs, images, neighbors, views, optimizer=sgd, schedule=constant, **options).history
    assert [row['lr'] for row in rows] == [0.01, 0.01] and constant.t == 8
    for wrong in (None, adam):
        with pytest.raises(UserError, match='belongs to another optimizer'):
            train_scan(theirs, images, neighbors, views, optimizer=wrong, schedule=constant, **options)


def test_neighbors_are_mined_anew_when_due(small):
    images, neighbors, model, views = small
    calls = []

    def mine(z, k):
        calls.append(z)
        return mine_neighbors(z, k)

    trained, states = several(model, 1), []
    train_scan(trained, images, neighbors, views, epochs=5, batch_size=50, lr=1e-3, remine_every=2, mine=mine,
               monitor=lambda epoch: states.append(embed(trained, images)), tolerance=2.0)
    assert len(calls) == 2
    torch.testing.assert_close(calls[0], states[1])
    torch.testing.assert_close(calls[1], states[3])
    plain, later = several(model, 1), several(model, 1)
    options = dict(batch_size=50, lr=1e-3, tolerance=2.0)
    a = train_scan(plain, images, neighbors, views, epochs=3, **options).history
    b = train_scan(later, images, neighbors, views, epochs=3, remine_every=2, **options).history
    assert a[:2] == b[:2] and a[2] != b[2]
    with pytest.raises(UserError, match='remine_every is -1'):
        train_scan(plain, images, neighbors, views, remine_every=-1)
    with pytest.raises(UserError, match='do not belong'):
        wrong = dict(epochs=1, remine_every=1, mine=lambda z, k: z[:, :k].long() - 9)
        train_scan(plain, images, neighbors, views, **wrong)


def test_mined_neighbors_and_heads_resume_to_the_bit(small, tmp_path):
    images, neighbors, model, views = small
    options = dict(epochs=4, batch_size=50, lr=1e-2, seed=1, remine_every=2, prior='estimate', tolerance=2.0)
    whole, first, again = several(model), several(model), several(model)
    a = train_scan(whole, images, neighbors, views, **options)
    checkpoint = dict(checkpoint=Checkpoint(tmp_path / 'scan.pt'))

    def kill(epoch):
        if epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_scan(first, images, neighbors, views, monitor=kill, **checkpoint, **options)
    b = train_scan(again, images, neighbors, views, **checkpoint, **options)
    finished = several(model)
    c = train_scan(finished, images, neighbors, views, **checkpoint, **options)
    for trained, result in ((again, b), (finished, c)):
        assert result.history == a.history
        for x, y in zip(whole.state_dict().values(), trained.state_dict().values(), strict=True):
            assert torch.equal(x, y)
