# SPDX-License-Identifier: BSD-3-Clause
"""A GPU that the host does not wait for says which all-reduces have ended, and so where a rank waits."""

from collections import deque

import pytest
import torch

from syncbn import moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda.errors import REMEMBERED, DeferredErrors
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import Message, Status
from syncbn.transports.single import SingleTransport
from syncbn.waits.status import Reader
from tests.cuda_on_cpu import EmulatedLauncher

NUMBERS = moments.numbers(3, (5, 7), 0)


def message(serial, direction=0):
    return Message(NUMBERS, 1, "'bn1'", direction, serial)


def launched(captured=False):
    """Kernels, their launcher, and a batch with its reduced wire."""
    launcher = EmulatedLauncher()
    if captured:
        launcher.errors = DeferredErrors(launcher.errors.memory, lambda: True)
    x = torch.randn(4, 5, dtype=torch.float64)
    k = CupyKernels(launcher)
    return k, launcher, x, k.local_moments(x, None, NUMBERS, Status(0, 1.0, 1.0, float64=1.0))


def test_both_kernels_that_read_a_wire_mark_their_launch():
    k, launcher, x, wire = launched()
    first, second = message(0), message(0, 1)
    _, stats = k.normalize(x, wire, Parameters(eps=1e-5), first)
    assert launcher.errors.unfinished() == []
    sums = k.backward_sums(x, x, stats, NUMBERS)[0]
    launcher.launch = lambda *args: None  # the device has not come so far
    k.backward_input(x, x, None, sums, None, stats, second)
    assert [one is second for one in launcher.errors.unfinished()] == [True]
    del launcher.launch
    k.backward_input(x, x, None, sums, None, stats, second)
    assert launcher.errors.unfinished() == []  # what was launched before it has run too


def test_marks_go_round_and_launches_of_two_streams_may_end_in_any_order():
    errors = DeferredErrors(torch.zeros(DeferredErrors.SIZE, dtype=torch.float64))
    for serial in range(2 * REMEMBERED + 3):
        errors.number(message(serial), torch.float32, torch.Size((3,)))
    assert len(errors.unfinished()) == REMEMBERED
    for number in (2 * REMEMBERED + 3, 2 * REMEMBERED + 1):
        errors.memory[DeferredErrors.ERROR + number % REMEMBERED] = number
    assert errors.unfinished() == []
    errors.number(message(9), torch.float32, torch.Size((3,)))
    assert [one.serial for one in errors.unfinished()] == [9]


def test_a_launch_in_a_cuda_graph_marks_nothing_and_its_error_is_found():
    k, launcher, x, wire = launched(captured=True)
    k.normalize(x, wire, Parameters(eps=1e-5), message(0))
    assert not launcher.errors.memory.any()
    assert launcher.errors.unfinished() == []
    wire[moments.CALL + 1 + 2 * 5] = 1.0  # a refused input
    k.normalize(x, wire, Parameters(eps=1e-5), message(1))
    with pytest.raises(ValueError, match="a right input on every rank"):
        launcher.errors.look()


def test_a_rank_is_in_the_first_call_that_its_gpu_has_not_done():
    errors = DeferredErrors(torch.zeros(DeferredErrors.SIZE, dtype=torch.float64))
    group, reader = SingleTransport(), Reader(0)
    group.recent = deque(maxlen=8)
    reader.add(group)
    for serial in range(4):
        one = message(serial)
        group.reduce(torch.zeros(3), one)
        number = errors.number(one, torch.float32, torch.Size((3,)))
        if serial < 2:
            errors.memory[DeferredErrors.ERROR + number] = number
    (wait,) = reader.read(0.5, 300.0).waits
    assert (wait.begun, wait.current, wait.done) == (3, "forward of 'bn1' (call 2)", 2)
    assert wait.waited == 0.0
    assert reader.read(0.5, 300.0).waits[0].waited == 0.5
    errors.memory[DeferredErrors.ERROR + 4] = 4
    (wait,) = reader.read(0.5, 300.0).waits
    assert (wait.begun, wait.current, wait.done) == (4, None, 4)
