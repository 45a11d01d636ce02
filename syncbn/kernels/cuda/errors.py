# SPDX-License-Identifier: BSD-3-Clause
"""Deferred errors: what a GPU finds wrong with a call reaches the host without a wait.

``cuda/normalize.cu`` and ``cuda/backward_input.cu`` compare the call in a reduced wire with this rank's, and the first
reads the counters too. Where they forbid the call, y or grad_x is NaN, the running statistics stay, and the kernel
writes a few numbers to host memory. The next call of any layer looks there, and raises.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import final

import torch
from torch import Tensor

from syncbn.checks import verdicts
from syncbn.moments import STATUS_SLOTS, Counters, Message, Status

REMEMBERED = 512
"""Launches of which the call and the input are still known when the error comes."""
FORGOTTEN = "something else in a call too long ago to be named, as in the replay of a CUDA graph"
REMARK = (
    "Found at a later call, as a GPU is not waited for: what that call returned was NaN, and its running statistics "
    "were left alone. End all processes; World.check() after a step finds it there."
)


@final
class DeferredErrors:
    """Host memory that the device writes to: ``[number, ranks, same_call, count, status (7)]``, 0 while it is empty.

    Args:
        memory: float64 (SIZE,), zeros, pinned.
    """

    SIZE = 4 + len(STATUS_SLOTS)

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self._slots = (ctypes.c_double * self.SIZE).from_address(self.address)
        self._numbers = itertools.count(1)  # forward and backward come from threads of their own
        self._calls: list[tuple[int, Message, torch.dtype, torch.Size] | None] = [None] * REMEMBERED

    def number(self, message: Message, x: Tensor) -> float:
        """Numbers a launch and remembers what it was about."""
        number = next(self._numbers)
        self._calls[number % REMEMBERED] = number, message, x.dtype, x.shape
        return float(number)

    def look(self) -> None:
        """Raises what the device has found, once. Waits for nothing: what is not there yet is found later.

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
            raise verdicts.problem_error(problem, FORGOTTEN, f" {REMARK}")
        _, message, dtype, shape = found
        what = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        raise verdicts.deferred_error(problem, counters, message, what, REMARK)
