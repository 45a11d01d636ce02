# SPDX-License-Identifier: BSD-3-Clause
"""The limit of waits, World.barrier, and the record that the watchdog reads, on several ranks."""

import contextlib
import os

import psutil
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.transports import gather, launchers, watched
from syncbn.waits import watchdog
from tests.conftest import DEVICE
from tests.multiprocess.test_collectives import CountingTransport

pytestmark = pytest.mark.ranks(2)


def last(ranks):
    return ranks.rank == ranks.size - 1


def counts(ranks):
    """How many calls each rank has begun, before this one."""
    return gather.gather(
        torch.tensor([float(ranks.transport.begun)], dtype=torch.float64, device="cpu"), ranks.transport
    )


def begun_in(ranks, action):
    """Runs an action and returns how many calls it has begun: the same number on every rank, and none left open."""
    syncbn.init(device=DEVICE)  # an earlier test may have ended torch.distributed: connects anew, before it counts
    before = ranks.transport.begun
    action()
    transport = ranks.transport
    mine, open_call = transport.begun - before, transport.current
    table = counts(ranks)
    ranks.check(bool((table == table[0]).all()), f"ranks have begun {table.flatten().tolist()} calls")
    ranks.check(open_call is None, f"left in {open_call}")
    return mine


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4), nn.Tanh(), nn.Linear(4, 4), syncbn.SyncBatchNorm(4))


def test_a_step_counts_as_many_calls_as_collectives(ranks):
    model, x = network(), torch.randn(2 + ranks.rank, 3)
    step = lambda: model(x).square().sum().backward()  # noqa: E731
    first = begun_in(ranks, step)
    ranks.check(first == 6, f"2 forwards, 2 backwards, 2 comparisons; counted {first}")
    again = begun_in(ranks, step)
    ranks.check(again == 4, f"2 forwards, 2 backwards; counted {again}")
    averaged = [begun_in(ranks, lambda: ranks.world.average_gradients(model)) for _ in range(2)]
    # Three where the group has agreed on another model before: one call of zeros says so.
    ranks.check(averaged in ([2, 1], [3, 1]), f"the layout is compared once; counted {averaged}")
    ranks.check(begun_in(ranks, lambda: model.eval()(x)) == 0, "eval sends nothing")


def test_the_record_names_the_call_that_a_rank_is_in(ranks, monkeypatch):
    seen, actual = [], type(ranks.transport).all_reduce

    def all_reduce(self, wire):
        seen.append((str(self.current), self.begun))
        return actual(self, wire)

    model = syncbn.name_layers(network())
    model(torch.randn(4, 3)).sum().backward()
    monkeypatch.setattr(type(ranks.transport), "all_reduce", all_reduce)
    model(torch.randn(4, 3)).sum().backward()
    monkeypatch.undo()
    calls = [what.partition(" (")[0] for what, _ in seen]
    expected = ["forward of '1'", "forward of '4'", "backward of '4'", "backward of '1'"]
    ranks.check(calls == expected, f"{calls}")
    ranks.check([n for _, n in seen] == list(range(seen[0][1], seen[0][1] + 4)), f"{seen}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_checkpointing_repeats_does_not_count(ranks, reentrant):
    model = network()
    x = torch.randn(4, 3, requires_grad=True)
    step = lambda: checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()  # noqa: E731
    begun_in(ranks, step)
    again = begun_in(ranks, step)
    ranks.check(again == 4, f"{again}")


@pytest.mark.immediate_errors
@pytest.mark.parametrize("kind", ["input", "calls", "order"])
def test_after_an_error_no_rank_is_left_in_a_call(ranks, kind):
    one, two = syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3)
    for layer in (one, two):
        layer(x)

    def fail():
        if kind == "input":
            one(x[0] if last(ranks) else x)
        elif kind == "calls":  # messages of one length: of others, MPI and gloo promise nothing
            (one if last(ranks) else two)(x)
        else:
            y = one(x.requires_grad_()), two(x)
            for each in y if last(ranks) else y[::-1]:
                each.sum().backward(retain_graph=True)

    def failing():
        with contextlib.suppress(ValueError):
            fail()

    ranks.raises(ValueError, lambda: gather.raise_together(ValueError("as it is for all"), ranks.transport))
    begun_in(ranks, failing)
    x.requires_grad_()
    ranks.check(begun_in(ranks, lambda: one(x).sum().backward()) == 2, "the next step works")


def test_recalibrate_and_join_are_on_record(ranks):
    model, x = network(), torch.randn(4, 3)
    model(x)
    ranks.check(begun_in(ranks, lambda: syncbn.recalibrate(model, [x] * (1 + ranks.rank))) > 0, "recalibrate")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with syncbn.join(model, optimizer):
            for _ in range(1 + ranks.rank):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                ranks.world.average_gradients(model)
                optimizer.step()

    ranks.check(begun_in(ranks, train) >= 4 * ranks.size, "join")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_are_on_record(ranks):
    torch._dynamo.reset()
    model, x = network(), torch.randn(4, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = lambda: compiled(x).square().sum().backward()  # noqa: E731
    begun_in(ranks, step)
    again = begun_in(ranks, step)
    ranks.check(again == 4, f"2 forwards, 2 backwards; counted {again}")
    ranks.check(str(ranks.transport.completed) != "None")


def watches(transport):
    """Whether the watchdog of this process reads a group."""
    return any(group is transport for dog in watchdog._running for group in dog.reader.groups())


def test_every_group_is_watched(ranks):
    ranks.check(watches(ranks.transport), "all ranks")
    channels = len(watchdog._running[0].channels)
    whole = ranks.world.subgroup(ranks.size)
    ranks.check(watches(ranks.world.within(whole).transport), "a subgroup")
    ranks.check(len(watchdog._running[0].channels) == channels, "its ranks have a channel already")
    alone = ranks.world.subgroup(1)
    ranks.check(not watches(ranks.world.within(alone).transport), "who is alone waits for nobody")
    for group in (whole, alone):
        ranks.world.free(group)


@pytest.mark.ranks(3)
def test_a_group_of_some_ranks_is_watched(ranks):
    made = ranks.transport.split(int(last(ranks)))
    watched.watch(made)
    ranks.check(watches(made) != last(ranks))
    made.close()


def test_one_thread_sleeps_and_all_sockets_are_on_loopback(ranks):
    dogs = [dog for dog in watchdog._running if dog.pid == os.getpid()]
    ranks.check(len(dogs) == 1 and dogs[0].is_alive() and dogs[0].daemon, f"{dogs}")
    hubs = [channel.hub.listener.getsockname()[0] for channel in dogs[0].channels if channel.hub is not None]
    links = [link.connection.getpeername()[0] for channel in dogs[0].channels for link in channel.links]
    ranks.check(set(hubs + links) == {"127.0.0.1"}, f"{hubs} {links}")
    ranks.check(bool(hubs) == (ranks.rank < 2), "the first two ranks listen")
    if launchers.detect().speaks_mpi:  # torchrun's own store listens everywhere
        found = psutil.Process(os.getpid()).net_connections("inet")
        wide = [c.laddr for c in found if c.status == "LISTEN" and c.laddr.port in _ports(dogs[0])]
        ranks.check(all(address.ip == "127.0.0.1" for address in wide), f"{wide}")


def _ports(dog):
    return {channel.hub.listener.getsockname()[1] for channel in dog.channels if channel.hub is not None}


def test_a_wrapper_of_a_transport_keeps_the_record(ranks):
    """The counting transport of other tests goes through the same method."""
    counting = CountingTransport(ranks.transport)
    world = syncbn.World(ranks.rank, ranks.size, 0, DEVICE, "test", counting)
    world.average(1.0)
    ranks.check(counting.begun == 1 and counting.current is None, f"{counting.begun}")


def test_a_group_whose_ranks_reach_no_channel_is_watched_too(ranks, monkeypatch):
    """Its ranks end by themselves at the limit: test_watchdog.py has that."""
    monkeypatch.setattr(watchdog, "covers", lambda of: False)
    monkeypatch.setattr(watched, "_meet", lambda transport, members: None)
    group = ranks.transport.split(0)
    watched.watch(group)
    ranks.check(watchdog.watches(group))
    if group.size > 1:
        group.close()
