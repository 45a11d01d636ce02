# SPDX-License-Identifier: BSD-3-Clause
"""freeze and unfreeze, no_sync, and groups of k ranks from one argument."""

import copy
import io
import pickle
import socket

import pytest
import torch
from torch import nn

import syncbn
from syncbn.waits import processes
from syncbn.waits.ranks import named
from tests.multiprocess import batches
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C, counting, settled  # noqa: F401
from tests.multiprocess.test_groups import check_group

pytestmark = pytest.mark.ranks(1)


def trained(ranks):
    model = nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4), nn.Dropout(0.5))
    model(torch.randn(4, 3) + ranks.rank)
    return model


def test_a_frozen_layer_keeps_its_statistics_and_is_silent_also_after_train(ranks, counting):  # noqa: F811
    layer = settled(counting)
    model = nn.Sequential(layer, nn.Dropout(0.5))
    syncbn.freeze(model)
    model.train()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, C, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    ranks.check(counting.sent == [], f"{counting.sent}")
    ranks.check(model[1].training and not layer.training, "only the layer stays in eval")
    for key, value in before.items():
        ranks.check_equal(layer.state_dict()[key], value, key)
    expected = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    ranks.check_close(y, expected, 1e-6)
    ranks.check_close(x.grad, ((layer.running_var + layer.eps).rsqrt()).expand(4, -1), 1e-6, "statistics are constants")


@pytest.mark.parametrize("affine", [True, False])
def test_freezing_takes_weight_and_bias_along_if_asked(ranks, affine):
    model = trained(ranks)
    ranks.check(syncbn.freeze(model, affine=affine) is model)
    ranks.check(model[1].weight.requires_grad != affine, "weight")
    ranks.check(model[1].bias.requires_grad != affine, "bias")
    ranks.check(model[0].weight.requires_grad, "other modules learn on")


def test_unfreeze_follows_the_mode_of_the_model(ranks):
    for training in (True, False):
        model = trained(ranks)
        syncbn.freeze(model)
        model.train(training)
        ranks.check(syncbn.unfreeze(model) is model)
        ranks.check(model[1].training == training and model[1].weight.requires_grad)
    model.train()
    tracked = int(model[1].num_batches_tracked)
    model(torch.randn(4, 3)).sum().backward()
    ranks.check(int(model[1].num_batches_tracked) == tracked + 1, "it trains again")


def test_unfreeze_leaves_other_layers_alone(ranks):
    model = trained(ranks).eval()
    model[1].weight.requires_grad_(False)
    model[1].train()
    syncbn.unfreeze(model)
    ranks.check(model[1].training and not model[1].weight.requires_grad)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_frozen_layer_is_frozen_and_the_state_dict_does_not_say(ranks, copier):
    model = trained(ranks)
    keys = model.state_dict().keys()
    twin = copier(syncbn.freeze(model))
    ranks.check(not twin.train()[1].training, "still frozen")
    ranks.check(twin.state_dict().keys() == keys)
    syncbn.unfreeze(twin)
    ranks.check(twin[1].training and not model.train()[1].training, "one without the other")


def test_reverting_a_frozen_layer_leaves_nothing_behind(ranks):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
    attributes = set(nn.BatchNorm1d(4).__dict__)
    syncbn.revert_sync_batchnorm(syncbn.freeze(model))
    ranks.check(set(model[0].__dict__) == attributes, f"{set(model[0].__dict__) ^ attributes}")


def test_no_sync_uses_the_own_share_and_says_nothing(ranks, counting):  # noqa: F811
    layer, local = settled(counting), nn.BatchNorm1d(C)
    local.load_state_dict(layer.state_dict())
    x = torch.randn(4, C, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    with syncbn.no_sync(nn.Sequential(layer)):
        y = layer(x)
        y.square().sum().backward()
    ranks.check(counting.sent == [], f"{counting.sent}")
    expected = local(twin)
    expected.square().sum().backward()
    ranks.check_close(y, expected, 1e-5, "y")
    ranks.check_close(x.grad, twin.grad, 1e-5, "grad_x")
    ranks.check_close(layer.running_var, local.running_var, 1e-6, "running_var")
    layer(x)
    ranks.check(counting.sent == [FORWARD], "synchronised again, without comparing settings again")


def test_a_backward_does_what_its_forward_did(ranks, counting):  # noqa: F811
    layer = settled(counting)
    x = torch.randn(3, C, requires_grad=True)
    with syncbn.no_sync(layer):
        y = layer(x)
    y.sum().backward()
    ranks.check(counting.sent == [], f"a local forward, and after the block its backward: {counting.sent}")
    y = layer(x)
    with syncbn.no_sync(layer):
        y.sum().backward()
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"a synchronised one: {counting.sent}")


def test_ranks_need_not_enter_no_sync_alike(ranks, rng):
    """Nobody waits for anybody inside, and the next synchronised step is exact."""
    batch = batches.make((2 * ranks.size, 5, 3), rng)
    layer = batches.ours(batch)
    layer(torch.randn(4, 5))
    for _ in range(ranks.rank):
        with syncbn.no_sync(layer):
            layer(torch.randn(4, 5)).sum().backward()
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
    ranks.check_close(got.grad_x, batches.exact(batch).grad_x[mine], 1e-5)


def test_no_sync_nests_and_ends_with_an_exception(ranks):
    layer = syncbn.SyncBatchNorm(3, group_size=ranks.size)
    before = layer.process_group
    text = ""
    try:
        with syncbn.no_sync(layer):
            with syncbn.no_sync(layer):
                pass
            layer(torch.randn(1, 3))
            ranks.world.check()  # a GPU tells late
    except ValueError as error:
        text = str(error)
    ranks.check("at least 2 values" in text, f"one value is refused at once, on its rank alone: {text}")
    ranks.check(layer.process_group == before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_no_sync_is_synchronised(ranks, rng, copier):
    layer = syncbn.SyncBatchNorm(4).double()
    with syncbn.no_sync(layer), syncbn.no_sync(layer):
        again = copier(layer)
    x = torch.randn(ranks.size * 3, 4, dtype=torch.float64, generator=rng)
    expected = nn.BatchNorm1d(4).double()(x)
    own = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    ranks.check_close(again(x[own]), expected[own], 1e-12)
    ranks.check_close(layer(x[own]), expected[own], 1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_groups_of_k_ranks_from_one_argument(ranks, rng, k):
    if ranks.size % k:
        pytest.skip("does not divide")
    first = ranks.rank // k * k
    group = syncbn.SyncBatchNorm(5, group_size=k).process_group
    check_group(ranks, group, list(range(first, first + k)), rng)


def test_conversion_and_lazy_layers_take_it_too(ranks, rng):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(5)), group_size=1)
    lazy = syncbn.LazySyncBatchNorm(group_size=1)
    x = torch.randn(4, 5) + ranks.rank
    for layer in (model, lazy):
        ranks.check_close(layer(x), nn.BatchNorm1d(5)(x), 1e-5)


@pytest.mark.ranks(2)
def test_the_specification_is_the_same_on_every_rank(ranks):
    """So one rank may save the layer for all."""
    layer = syncbn.SyncBatchNorm(3, group_size=1)
    layer(torch.randn(4, 3))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([syncbn.SyncBatchNorm, syncbn.GroupSpec]):
        loaded = torch.load(buffer, weights_only=True)
    ranks.check(f"{loaded.process_group}" == "group of 1 consecutive ranks", f"{loaded.process_group}")
    ranks.check(loaded.process_group.ranks == (), "names no rank")
    loaded(torch.randn(4, 3))


@pytest.mark.ranks(2)
def test_a_group_size_that_does_not_divide_is_one_error(ranks):
    k = ranks.size + 1
    layer = syncbn.SyncBatchNorm(3, group_size=k)
    ranks.raises(
        ValueError, lambda: layer(torch.randn(4, 3)), f"divides {ranks.size} ranks", f"received {k}", "one of 1"
    )


@pytest.mark.ranks(2)
def test_another_group_size_on_one_rank_is_one_error(ranks, monkeypatch):
    """At the first use of either size, that is; later each rank would find its own group."""
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    layer = syncbn.SyncBatchNorm(3, group_size=1 if ranks.rank == 1 else ranks.size)
    parts = ["same group_size on every rank", f"{ranks.size} on rank", "1 on rank 1"]
    ranks.raises(ValueError, lambda: layer(torch.randn(4, 3)), *parts)


@pytest.fixture
def on_hosts(ranks, monkeypatch):
    """Makes the ranks believe that each is on the host of a given number, and forget the groups that they have made."""

    def place(hosts):
        own = processes.own()._replace(host=7 + hosts[ranks.rank])
        monkeypatch.setattr("syncbn.waits.processes.own", lambda: own)
        monkeypatch.setattr("syncbn.transports.dispatch.made", {})

    return place


@pytest.mark.ranks(2)
@pytest.mark.parametrize("hosts", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 0, 1], [5, 5, 3, 3]], ids=str)
def test_a_group_of_one_node_is_that_of_the_ranks_of_a_host(ranks, rng, on_hosts, hosts):
    hosts = hosts[: ranks.size]
    if len({hosts.count(host) for host in hosts}) > 1:
        pytest.skip("hosts of unequal size")
    on_hosts(hosts)
    group = syncbn.SyncBatchNorm(5, group_size="node").process_group
    check_group(ranks, group, [r for r in range(ranks.size) if hosts[r] == hosts[ranks.rank]], rng)


@pytest.mark.ranks(2)
def test_a_saved_layer_of_a_node_names_no_host(ranks, rng, on_hosts):
    on_hosts([0] * ranks.size)
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(5), group_size="node")
    layer(torch.randn(4, 5))
    saved = pickle.dumps(layer)
    on_hosts(list(range(ranks.size)))  # another job, with as many hosts as ranks
    group = pickle.loads(saved).process_group
    ranks.check(f"{group}" == "group of the ranks of one host", f"{group}")
    check_group(ranks, group, [ranks.rank], rng)


@pytest.mark.ranks(3)
def test_hosts_of_unequal_size_are_one_error(ranks, on_hosts):
    on_hosts([0, 1] + [1] * (ranks.size - 2))
    layer, name = syncbn.SyncBatchNorm(3, group_size="node"), socket.gethostname()
    others = named(range(1, ranks.size))
    parts = [f"1 on {name} (rank 0), {ranks.size - 1} on {name} ({others})", "on every host"]
    ranks.raises(ValueError, lambda: layer(torch.randn(4, 3)), *parts)


@pytest.mark.ranks(2)
def test_a_node_on_one_rank_and_a_number_on_another_is_one_error(ranks, monkeypatch):
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    layer = syncbn.SyncBatchNorm(3, group_size="node" if ranks.rank == 1 else 1)
    parts = ["same group_size on every rank", "1 on rank", "'node' on rank 1"]
    ranks.raises(ValueError, lambda: layer(torch.randn(4, 3)), *parts)


@pytest.mark.parametrize("bad", [0, -2, 1.5, "host"])
def test_a_group_size_that_is_none_is_refused(ranks, bad):
    ranks.raises(ValueError, lambda: syncbn.SyncBatchNorm(3, group_size=bad), "integer >= 1 or 'node'", f"{bad}")


def test_group_size_and_process_group_exclude_each_other(ranks):
    group = ranks.world.subgroup(1) or syncbn.GroupSpec("mpi", (0,))
    ranks.raises(
        ValueError, lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), group, group_size=1), "exclude each other"
    )
