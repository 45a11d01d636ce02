# SPDX-License-Identifier: BSD-3-Clause
"""Shared memory, as far as one process can see it. On every rank: tests/multiprocess/test_shared_memory.py."""

import os
from types import SimpleNamespace

import pytest
import torch

from syncbn.transports import memory_file, shared_memory
from syncbn.transports.memory_file import LEAST_SLOT, PAGE, SLOT, TOTAL, slot_bytes

pytestmark = pytest.mark.skipif(bool(shared_memory.problem()), reason=shared_memory.problem())


def test_a_slot_is_whole_pages_and_all_together_are_bounded():
    for ranks in range(2, 2000):
        slot = slot_bytes(ranks)
        assert slot % PAGE == 0, ranks
        assert LEAST_SLOT <= slot <= SLOT, ranks
        assert 2 * ranks * slot <= TOTAL or slot == LEAST_SLOT, ranks


@pytest.fixture
def alone():
    """A segment of one rank."""
    segment = shared_memory.segment
    file = memory_file.create(segment.size(1, LEAST_SLOT))
    yield segment.map(file, 0, 1, LEAST_SLOT)
    os.close(file)


def test_a_farewell_is_cut_where_it_does_not_fit(alone):
    segment = shared_memory.segment
    assert segment.farewell(alone, 0) == ""
    segment.say_farewell(alone, 0, "ended with ValueError: " + "é" * 1000)
    said = segment.farewell(alone, 0)
    assert said.startswith("ended with ValueError: éé")
    assert 1000 < len(said.encode()) <= 1020


def test_a_farewell_of_a_text_that_is_none(alone):
    """As of an error with the name of a file: what it raised would end the farewell to the watchdog, too."""
    host = SimpleNamespace(rank=0, size=1, ranks=(0,), group_id=1, spec=None)
    transport = shared_memory.SharedMemoryTransport(host, alone, [])
    transport.say_farewell("ended with OSError: \udcff")
    assert shared_memory.segment.farewell(alone, 0) == "ended with OSError: \\udcff"


WRONG = {
    "a rank that is not there": (ValueError, lambda s, one: s.begin(one, torch.zeros(2), 1, (0, 0, 0, 0))),
    "a farewell of such a rank": (ValueError, lambda s, one: s.say_farewell(one, 1, "")),
    "three numbers": (TypeError, lambda s, one: s.begin(one, torch.zeros(2), -1, (0, 0, 0))),
    "a text for a number": (TypeError, lambda s, one: s.begin(one, torch.zeros(2), -1, (0, 0, 0, "4"))),
    "no tensor": (TypeError, lambda s, one: s.begin(one, [1.0], -1, (0, 0, 0, 0))),
    "a sum of integers": (TypeError, lambda s, one: s.begin(one, torch.zeros(2, dtype=torch.int64), -1, (0, 0, 0, 0))),
    "a slice": (ValueError, lambda s, one: s.begin(one, torch.zeros(4)[::2], -1, (0, 0, 0, 0))),
    "no segment": (ValueError, lambda s, one: s.begin("segment", torch.zeros(2), -1, (0, 0, 0, 0))),
    "a slot of half a line": (ValueError, lambda s, one: s.map(0, 0, 1, 32)),
    "a file that is closed": (OSError, lambda s, one: s.map(10_000, 0, 1, 64)),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_compiled_part_checks_what_it_gets(alone, what):
    kind, call = WRONG[what]
    with pytest.raises(kind):
        call(shared_memory.segment, alone)
    wire = torch.ones(2, dtype=torch.float64)
    assert shared_memory.segment.begin(alone, wire, -1, (0, 0, 0, 0)) == shared_memory.DONE


def test_empty_tensors_and_scalars_are_calls_too(alone):
    for tensor in (torch.zeros(0), torch.zeros((), dtype=torch.float64), torch.zeros(3, 0)):
        assert shared_memory.segment.begin(alone, tensor, -1, (0, 0, 0, 0)) == shared_memory.DONE
    assert shared_memory.segment.begin(alone, torch.zeros(3, dtype=torch.bool), 0, (0, 0, 0, 0)) == shared_memory.DONE
