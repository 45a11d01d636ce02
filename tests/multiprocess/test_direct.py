# SPDX-License-Identifier: BSD-3-Clause
"""The direct exchange over gloo: exact and the same on every rank, and an error where ranks are in different calls."""

import gc
import random
import time
import weakref

import pytest
import torch

from syncbn.transports import direct, gather, torch_dist
from syncbn.transports.nodes import NodesTransport, by_nodes
from syncbn.transports.torch_dist import TorchTransport
from syncbn.waits import processes

pytestmark = [pytest.mark.ranks(2), pytest.mark.cpu("gloo sums CPU tensors")]


@pytest.fixture
def over_gloo(torch_world):
    group = torch.distributed.new_group()
    yield TorchTransport(group)
    torch_world.barrier()
    torch.distributed.destroy_process_group(group)


@pytest.fixture(params=["first", "last"])
def over_nodes(request, ranks, over_gloo, monkeypatch):
    """Two hosts, of which one has a single rank."""
    if ranks.size < 3:
        pytest.skip("needs two ranks on one of two hosts")
    alone = 0 if request.param == "first" else ranks.size - 1
    own = processes.own()._replace(host=7 + (ranks.rank == alone))
    monkeypatch.setattr("syncbn.waits.processes.own", lambda: own)
    made = by_nodes(over_gloo, "auto")
    ranks.check(isinstance(made, NodesTransport), f"{made}")
    return made


@pytest.fixture
def gloo_sums(monkeypatch):
    """The lengths of the wires that gloo's own all-reduce sums."""
    sums, actual = [], torch_dist.sum_in_place
    monkeypatch.setattr(
        torch_dist, "sum_in_place", lambda wire, group: (sums.append(wire.numel()), actual(wire, group))
    )
    return sums


def parts(ranks, length, dtype):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(length, generator=generator, dtype=dtype) * 10.0**r for r in range(ranks.size)]


def test_a_group_may_be_used_in_inference_mode_first(ranks, torch_world):
    group = torch.distributed.new_group()
    with torch.inference_mode():
        transport = TorchTransport(group)
    for _ in range(2):
        ranks.check_equal(transport.all_reduce(torch.ones(3)), torch.full((3,), float(ranks.size)))
    torch_world.barrier()
    torch.distributed.destroy_process_group(group)


def test_a_sum_of_what_is_recorded_leaves_no_graph_behind(ranks, over_gloo):
    x = torch.ones(3, requires_grad=True)
    y, leaf = 2 * x, weakref.ref(x)
    over_gloo.all_reduce(y)
    del x, y
    gc.collect()
    ranks.check(leaf() is None, "the memory for messages holds the graph")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_are_those_in_rank_order_on_every_rank(ranks, over_gloo, gloo_sums, dtype):
    most = direct.LONGEST // dtype.itemsize
    common, own, wrong = random.Random(3), random.Random(ranks.rank), []
    lengths = [0, 1, 2, 3, most - 1, most] + [int(10 ** common.uniform(0, 3.9)) for _ in range(40)]
    for length in lengths:
        if own.random() < 0.3:  # no rank waits for the others between two calls
            time.sleep(own.random() * 0.01)
        each = parts(ranks, length, dtype)
        expected = each[0].double()
        for part in each[1:]:
            expected = expected + part
        got = over_gloo.all_reduce(each[ranks.rank].clone())
        wrong += [length] * (not torch.equal(got, expected.to(dtype)))
    ranks.check(not wrong, f"wrong sums of {wrong} values")
    ranks.check(gloo_sums == [], f"gloo summed {gloo_sums}")


def test_a_long_wire_goes_through_gloos_all_reduce(ranks, over_gloo, gloo_sums):
    length = direct.LONGEST // 8 + 1
    wire = over_gloo.all_reduce(torch.full((length,), 1.0 + ranks.rank, dtype=torch.float64))
    ranks.check_equal(wire, torch.full((length,), ranks.size * (ranks.size + 1) / 2, dtype=torch.float64))
    ranks.check(gloo_sums == [length], f"gloo summed {gloo_sums}")


LENGTHS = pytest.mark.parametrize(("first", "second"), [(5, 9), (5, 20000), (20000, 30000), (5, 5)], ids=str)


@LENGTHS
def test_different_calls_are_one_error_that_names_them_and_the_group_goes_on(ranks, over_gloo, first, second):
    """gloo's all-reduce ends the process that gets the longer message."""
    check_different_calls(ranks, over_gloo, first, second)


@LENGTHS
def test_different_calls_on_several_hosts_are_one_error(ranks, over_nodes, first, second):
    """Between hosts, or inside one: then the other host gets a wire of its own length, and must not use it."""
    check_different_calls(ranks, over_nodes, first, second)


def check_different_calls(ranks, transport, first, second):
    mine = ranks.rank == ranks.size - 1

    def call():
        values = torch.zeros(second if mine else first, dtype=torch.float64)
        gather.exchange(values, transport, "the second call" if mine else "the first call")

    for _ in range(2):
        others = ", ".join(map(str, range(ranks.size - 1)))
        named = "the first call (call 0) on rank", others, f"the second call (call 0) on rank {ranks.size - 1}"
        ranks.raises(ValueError, call, "All ranks must be in one call", *named)
    total = transport.all_reduce(torch.ones(3, dtype=torch.float64))
    ranks.check_equal(total, torch.full((3,), float(ranks.size), dtype=torch.float64), "the next call")


def test_sums_over_several_hosts_are_the_same_on_every_rank(ranks, over_nodes):
    common, own = random.Random(3), random.Random(ranks.rank)
    for length in [0, 1, direct.LONGEST // 8 + 1] + [int(10 ** common.uniform(0, 3.9)) for _ in range(20)]:
        if own.random() < 0.3:
            time.sleep(own.random() * 0.01)
        each = parts(ranks, length, torch.float64)
        got = over_nodes.all_reduce(each[ranks.rank].clone())
        table = gather.gather(got[:50].clone(), ranks.transport)
        ranks.check((table == table[0]).all().item(), f"{length}: other bits on other ranks")
        ranks.check_close(got, sum(each), 1e-12 * 10.0**ranks.size, f"{length}")


def test_two_transports_of_one_group_take_turns(ranks, over_gloo):
    again = TorchTransport(over_gloo.group)
    for transport in (over_gloo, again, over_gloo):
        total = transport.all_reduce(torch.ones(3, dtype=torch.float64))
        ranks.check_equal(total, torch.full((3,), float(ranks.size), dtype=torch.float64))
