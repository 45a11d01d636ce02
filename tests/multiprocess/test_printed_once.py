# SPDX-License-Identifier: BSD-3-Clause
"""What all ranks know to be wrong is printed by one of them, and names the ranks by ranges."""

import warnings

import pytest

from syncbn.transports import memory_file, shared_memory, watched
from syncbn.waits import processes
from syncbn.waits.processes import Process

pytestmark = pytest.mark.ranks(3)


def said_of(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in said]


def refuses(*_):
    raise PermissionError(13, "Permission denied")


def test_that_the_side_channel_is_not_reached(ranks, monkeypatch):
    if ranks.rank:
        monkeypatch.setattr(watched, "Link", refuses)
    members = [Process(*processes.own())] * ranks.size
    made, said = said_of(lambda: watched._meet(ranks.transport, members))
    ranks.check(made is None, "no rank has a channel, since some do not reach it")
    who = f"ranks 1-{ranks.size - 1}" if ranks.size > 3 else "ranks 1, 2"
    text = f"{who} do not reach the side channel (rank 1: "
    ranks.check(len(said) == (ranks.rank == 1) and all(text in each for each in said), f"{said}")


@pytest.mark.skipif(bool(shared_memory.problem()), reason="shared memory is not there")
def test_that_no_rank_opens_the_memory_of_the_first(ranks, monkeypatch):
    monkeypatch.setattr(memory_file, "open_of", refuses)
    made, said = said_of(lambda: shared_memory.on_one_host(ranks.transport, "auto"))
    ranks.check(made is ranks.transport)
    text = "rank 1 cannot open the memory of the first one"
    ranks.check(len(said) == (ranks.rank == 1) and all(text in each for each in said), f"{said}")
