# SPDX-License-Identifier: BSD-3-Clause
"""Two models train in two threads, each over a group of its own, as if each trained alone."""

import copy
import pickle
import threading
import time

import pytest
import torch
from torch import nn

import syncbn
from syncbn import transports
from syncbn.transports import launchers
from tests.multiprocess.test_groups import forget_this_job

pytestmark = [pytest.mark.ranks(2), pytest.mark.cpu("autograd runs the backward passes of a GPU on one thread")]

STEPS = 20
TIME_LIMIT = 60
"""Seconds for both threads; a group that two threads share makes them wait for ever."""


def two_library_groups(ranks):
    """Two communicators, or two torch groups, that the user made of all ranks."""
    if launchers.detect().speaks_mpi:
        from mpi4py import MPI

        return [MPI.COMM_WORLD.Dup() for _ in range(2)]
    return [torch.distributed.new_group(list(range(ranks.size))) for _ in range(2)]


def two_subgroups(ranks):
    return [ranks.world.subgroup(ranks.size) for _ in range(2)]


def everyone_and_a_library_group(ranks):
    return [None, two_library_groups(ranks)[0]]


MAKERS = [two_library_groups, two_subgroups, everyone_and_a_library_group]


def models(pair):
    """Two models of the same shape and of different weights, so that mixed sums have the right length."""
    made = []
    for seed, group in enumerate(pair):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
        made.append(syncbn.convert_sync_batchnorm(model, group))
    return made


def train(model, seed, rank):
    """Takes STEPS steps of SGD on this rank's batches; returns the state and the last loss."""
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        x, target = torch.randn(2 + rank, 6, generator=rng), torch.randn(2 + rank, 8, generator=rng)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return torch.cat([t.detach().double().reshape(-1) for t in [*model.state_dict().values(), loss]])


def in_two_threads(ranks, run):
    """Calls ``run(0)`` and ``run(1)`` in threads that start in another order on every other rank.

    A thread that hangs ends the run on all ranks: nothing else can end it.
    """
    results, errors = [None, None], ["", ""]

    def body(i):
        time.sleep(0.2 * ((i + ranks.rank) % 2))
        try:
            results[i] = run(i)
        except Exception as error:  # of any kind: it is reported on every rank
            errors[i] = f"thread {i}: {type(error).__name__}: {error}"

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIME_LIMIT)
    if any(thread.is_alive() for thread in threads):
        pytest.fail(f"a thread waits for ever; the other said {errors}")
    return results, " ".join(errors).strip()


def check_as_if_alone(ranks, together):
    """Trains in two threads, then copies of the same models one after the other."""
    alone = copy.deepcopy(together)
    states, error = in_two_threads(ranks, lambda i: train(together[i], i, ranks.rank))
    ranks.check(not error, error)
    for i in range(2):
        ranks.check_close(states[i], train(alone[i], i, ranks.rank), 1e-6, f"model {i}")


@pytest.mark.parametrize("make", MAKERS)
def test_two_models_train_in_two_threads(ranks, make):
    check_as_if_alone(ranks, models(make(ranks)))


def test_two_models_of_another_job_train_in_two_threads(ranks, monkeypatch):
    """MPI makes each group under a tag of its own. torch cannot: there they are first used on one thread."""
    used = models(two_library_groups(ranks))
    for model in used:
        model(torch.randn(3, 6))
    stored = pickle.dumps(used)
    forget_this_job(monkeypatch)
    loaded = pickle.loads(stored)
    if not launchers.detect().speaks_mpi:
        for model in loaded:
            model(torch.randn(3, 6))
    check_as_if_alone(ranks, loaded)


def test_torch_groups_of_another_job_that_ranks_use_in_another_order_are_refused(ranks, torch_world, monkeypatch):
    """torch would connect the group of one model with that of the other."""
    del torch_world
    pair = [syncbn.GroupSpec("torch", tuple(range(ranks.size)), label) for label in ("a", "b")]
    forget_this_job(monkeypatch)
    mine = pair[ranks.rank % 2]
    ranks.raises(ValueError, lambda: transports.choose(mine), "process_group's label", "in one order on every rank")
