# SPDX-License-Identifier: BSD-3-Clause
"""Every rank has one limit for its waits, and a barrier may have its own."""

import datetime
import math
import time
import types

import pytest
import torch

import syncbn
from syncbn.transports import watched
from syncbn.waits import limits, watchdog
from tests.conftest import DEVICE

pytestmark = pytest.mark.ranks(2)


@pytest.fixture
def limit(monkeypatch):
    """The limit of this test, which may give another one. The thread that watches this run keeps its own."""
    monkeypatch.setattr(watchdog, "limits", types.SimpleNamespace(**{**vars(limits), "limit": lambda: 60.0}))
    monkeypatch.setattr(limits, "_given", [])
    monkeypatch.delenv(limits.TIMEOUT, raising=False)


def last(ranks):
    return ranks.rank == ranks.size - 1


WRONG = [0, -1, math.nan, True, "5", 10**400]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:5])
def test_a_wrong_timeout_of_init_on_one_rank_is_one_error(ranks, limit, wrong):
    parts = [f"rank {ranks.size - 1}: syncbn.init(timeout) must be a number of seconds above 0", "received"]
    ranks.raises(ValueError, lambda: syncbn.init(device=DEVICE, timeout=wrong if last(ranks) else 50.0), *parts)
    ranks.check(not limits._given, f"the limit stays: {limits._given}")
    syncbn.init(device=DEVICE, timeout=50.0)
    ranks.check(limits.limit() == 50.0)


def test_timeouts_that_differ_are_one_error(ranks, limit):
    mine = 50.0 if last(ranks) else math.inf
    parts = ["same timeout on every rank", f"50 on rank {ranks.size - 1}", "inf on rank", "SYNCBN_TIMEOUT"]
    ranks.raises(ValueError, lambda: syncbn.init(device=DEVICE, timeout=mine), *parts)
    ranks.check(not limits._given, f"the limit stays: {limits._given}")


@pytest.mark.parametrize("wrong", ["0", "-1", "abc", "nan"])
def test_a_wrong_variable_on_one_rank_is_one_error(ranks, limit, monkeypatch, wrong):
    if last(ranks):
        monkeypatch.setenv(limits.TIMEOUT, wrong)
    parts = [f"rank {ranks.size - 1}: SYNCBN_TIMEOUT must be a number of seconds", f"received '{wrong}'"]
    ranks.raises(ValueError, lambda: syncbn.init(device=DEVICE), *parts)
    ranks.check(not limits._given, "nothing is set by a call that raised")
    group = ranks.transport.split(0)
    ranks.raises(ValueError, lambda: watched.watch(group), *parts)  # as the first use of a group does
    group.close()


def test_the_first_group_fixes_the_limit_of_the_variable(ranks, limit, monkeypatch):
    monkeypatch.setenv(limits.TIMEOUT, "77")
    ranks.world.free(ranks.world.subgroup(ranks.size))
    monkeypatch.setenv(limits.TIMEOUT, "no number any more")
    ranks.check(limits.limit() == 77.0)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:5])
def test_a_wrong_timeout_of_a_barrier_on_one_rank_is_one_error(ranks, wrong):
    part = f"rank {ranks.size - 1}: World.barrier(timeout) must be a number of seconds above 0"
    ranks.raises(ValueError, lambda: ranks.world.barrier(timeout=wrong if last(ranks) else None), part)
    ranks.check(ranks.transport.current is None)


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_barrier_waits_for_the_last_rank(ranks, timeout):
    if last(ranks):
        time.sleep(1.0)
    began = time.monotonic()
    ranks.world.barrier(timeout)
    waited = time.monotonic() - began
    ranks.check(last(ranks) or waited > 0.8, f"waited {waited:.2f} s")
    ranks.check(ranks.transport.current is None and "World.barrier" not in str(ranks.transport.completed), "on record")


def test_a_barrier_is_on_record_with_its_own_limit(ranks, monkeypatch):
    seen, transport = [], ranks.transport
    actual = type(transport).barrier

    def barrier(self):
        seen.append((str(self.current), self.patience))
        actual(self)

    monkeypatch.setattr(type(transport), "barrier", barrier)
    ranks.world.barrier()
    ranks.world.barrier(timeout=12)
    ranks.check([patience for _, patience in seen] == [math.inf, 12.0], f"{seen}")
    ranks.check(all("World.barrier" in what for what, _ in seen), f"{seen}")
    ranks.check(transport.patience is None)


@pytest.mark.cpu("gloo on the CPU")
def test_a_barrier_over_torch_waits_beyond_the_groups_own_limit(ranks, torch_world, monkeypatch):
    """Evaluation on one rank may take longer than a collective of gloo may."""
    monkeypatch.setenv("SYNCBN_TRANSPORT", "torch")
    second = datetime.timedelta(seconds=1)
    group = torch.distributed.new_group(list(range(ranks.size)), timeout=second)
    world = ranks.world.within(group)
    ranks.check(world.transport.name == "torch")
    if last(ranks):
        time.sleep(2.0)
    began = time.monotonic()
    error = None
    try:
        world.barrier()
    except Exception as raised:
        error = raised
    waited = time.monotonic() - began
    ranks.check(error is None, f"{error}")
    ranks.check(last(ranks) or waited > 1.5, f"waited {waited:.2f} s")
