# SPDX-License-Identifier: BSD-3-Clause
"""Deferred errors: how an error that a GPU finds reaches the host, without a wait.

``cuda/normalize.cu`` and ``cuda/backward_input.cu`` compare the call in a reduced wire with this rank's call, and
``normalize.cu`` also reads the counters. If they show an error, y or grad_x is NaN, the running statistics stay, and
the kernel writes a few numbers to host memory. The next call of any layer reads that memory, and raises.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import final

import torch
from torch import Tensor

from syncbn.checks import problems
from syncbn.moments import STATUS_SLOTS, Counters, Message, Status

REMEMBERED = 512
"""How many launches are remembered, so that an error can name call and input."""
FORGOTTEN = "something else in a call too long ago to be named, as in the replay of a CUDA graph"
REMARK = (
    "Found at a later call, as a GPU is not waited for: what that call returned was NaN, and its running statistics "
    "were left alone. End all processes. World.check() at the end of a step finds such an error there."
)


@final
class DeferredErrors:
    """Host memory that the device writes to: ``[number, ranks, same_call, count, status (7)]``; number 0 means empty.

    Args:
        memory: float64 (SIZE,), zeros, pinned.
    """

    SIZE = 4 + len(STATUS_SLOTS)

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self._slots = (ctypes.c_double * self.SIZE).from_address(self.address)
        self._numbers = itertools.count(1)  # thread-safe: forward and backward run in different threads
        self._calls: list[tuple[int, Message, torch.dtype, torch.Size] | None] = [None] * REMEMBERED

    def number(self, message: Message, dtype: torch.dtype, shape: torch.Size) -> int:
        """Numbers a launch and remembers its call, and dtype and shape of its input."""
        number = next(self._numbers)
        self._calls[number % REMEMBERED] = number, message, dtype, shape
        return number

    def look(self) -> None:
        """Raises the error that the device has found, once. Does not wait: an error not written yet is raised later.

        Raises:
            ValueError, TypeError: on every rank of the group, but not at the same call on all.
        """
        if not self._slots[0]:
            return
        number, ranks, same, count, *status = self._slots
        self._slots[0] = 0.0
        counters = Counters(bool(same), count, Status._make(status))
        problem, found = counters.problem(int(ranks)), self._calls[int(number) % REMEMBERED]
        if found is None or found[0] != number:
            raise problems.problem_error(problem, FORGOTTEN, f" {REMARK}")
        _, message, dtype, shape = found
        what = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        raise problems.deferred_error(problem, counters, message, what, REMARK)
