# SPDX-License-Identifier: BSD-3-Clause
"""What a GPU tells the host without a wait: deferred errors, and which all-reduces have ended.

``cuda/normalize.cu`` and ``cuda/backward_input.cu`` compare the call in a reduced wire with this rank's call, and
``normalize.cu`` also reads the counters. If they show an error, y or grad_x is NaN, the running statistics stay, and
the kernel writes a few numbers to host memory. The next call of any layer reads that memory, and raises.

Both kernels also mark their launch there. The watchdog reads the marks, so it knows of an all-reduce that does not end,
although the host does not wait for it.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from syncbn.checks import problems
from syncbn.moments import STATUS_SLOTS, Counters, Message, Status
from syncbn.waits import status as waits_status

REMEMBERED = 512
"""How many launches are remembered, so that an error can name call and input. MARKS in wire.cuh."""
FORGOTTEN = "something else in a call too long ago to be named, as in the replay of a CUDA graph"
REMARK = (
    "Found at a later call, as a GPU is not waited for: what that call returned was NaN, and its running statistics "
    "were left alone. End all processes. World.check() at the end of a step finds such an error there."
)


@final
class DeferredErrors:
    """Host memory that the device writes to: ``[number, ranks, same_call, count, status (7), marks]``.

    The number is 0 while there is no error. Mark i is the last launch with number % REMEMBERED == i that has run.

    Args:
        memory: float64 (SIZE,), zeros, pinned.
        capturing: whether the current launch goes to a CUDA graph, which does not run it now.
    """

    ERROR = 4 + len(STATUS_SLOTS)
    SIZE = ERROR + REMEMBERED

    def __init__(self, memory: Tensor, capturing: Callable[[], bool] = lambda: False) -> None:
        self.memory, self._capturing = memory, capturing
        self.address = memory.data_ptr()
        waits_status.pending.append(weakref.WeakMethod(self.unfinished))
        self._slots = (ctypes.c_double * self.SIZE).from_address(self.address)
        self._numbers = itertools.count(1)  # thread-safe: forward and backward run in different threads
        self._calls: list[tuple[int, Message, torch.dtype, torch.Size, bool] | None] = [None] * REMEMBERED

    def number(self, message: Message, dtype: torch.dtype, shape: torch.Size) -> int:
        """Numbers a launch and remembers its call, and dtype and shape of its input. Below 0 in a CUDA graph."""
        number = next(self._numbers)
        captured = self._capturing()
        self._calls[number % REMEMBERED] = number, message, dtype, shape, captured
        return -number if captured else number

    def unfinished(self) -> list[Message]:
        """Returns the calls whose launches have not begun, nor any launch after them, oldest first."""
        last = max(self._slots[self.ERROR :])
        launched = sorted((call for call in self._calls if call is not None and call[0] > last), key=lambda c: c[0])
        return [message for _, message, _, _, captured in launched if not captured]

    def look(self) -> None:
        """Raises the error that the device has found, once. Does not wait: an error not written yet is raised later.

        Raises:
            ValueError, TypeError: on every rank of the group, but not at the same call on all.
        """
        if not self._slots[0]:
            return
        number, ranks, same, count, *status = self._slots[: self.ERROR]
        self._slots[0] = 0.0
        counters = Counters(bool(same), count, Status._make(status))
        problem, found = counters.problem(int(ranks)), self._calls[int(number) % REMEMBERED]
        if found is None or found[0] != number:
            raise problems.problem_error(problem, FORGOTTEN, f" {REMARK}")
        _, message, dtype, shape, _ = found
        what = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        raise problems.deferred_error(problem, counters, message, what, REMARK)
