# SPDX-License-Identifier: BSD-3-Clause
"""The late verdict: what a GPU finds wrong with a call reaches the host without a wait.

``cuda/normalize.cu`` reads the counters of the reduced wire. Where they forbid the call it makes y NaN, leaves the
running statistics alone and stores the counters in host memory. The next call of any layer looks there.
"""

from __future__ import annotations

import ctypes
from typing import final

import torch
from torch import Tensor

from syncbn.moments import DTYPES, STATUS_SLOTS, Status

REMEMBERED = 256
"""Calls whose input is still known when the verdict comes."""


@final
class Mailbox:
    """Host memory that the device writes to: [call, count, status...], float64; call is 0 while it is empty.

    Args:
        memory: float64 (SIZE,), zeros, pinned.
    """

    SIZE = 2 + len(STATUS_SLOTS)

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.address = memory.data_ptr()
        self._slots = (ctypes.c_double * self.SIZE).from_address(self.address)
        self._calls: list[tuple[int, str, int]] = [(0, "", 1)] * REMEMBERED
        self._count = 0

    def number(self, x: Tensor, ranks: int) -> float:
        """Numbers a call and remembers what it was about."""
        self._count += 1
        self._calls[self._count % REMEMBERED] = (self._count, f"{x.dtype} {tuple(x.shape)}", ranks)
        return float(self._count)

    def look(self) -> None:
        """Raises what the device has found, once. Waits for nothing: what is not there yet is found later.

        Raises:
            ValueError, TypeError: on every rank of the group, but not at the same call on all.
        """
        if self._slots[0]:
            call, count, *status = self._slots
            self._slots[0] = 0.0
            number, what, ranks = self._calls[int(call) % REMEMBERED]
            what = what.removeprefix("torch.") if number == call else "an earlier input"
            raise late_error(count, Status(*status), what, ranks, _LATE)


_LATE = (
    "Found late, as a GPU is not waited for: the output of that call was NaN, and its running statistics were left "
    "alone. End all processes; World.check() after a step tells at once."
)


def late_error(count: float, status: Status, what: str, ranks: int, remark: str) -> Exception:
    """Words a verdict for which nobody is asked any more."""
    late = f"This rank's input was {what}. {remark}"
    if status.faults:
        return ValueError(
            f"SyncBatchNorm needs a right input on every rank; {status.faults:g} of {ranks} ranks had a wrong one, and "
            f"said so there. {late}"
        )
    if status.dtypes > 1:
        votes = zip(DTYPES, status[3:], strict=True)
        received = ", ".join(f"{str(d).removeprefix('torch.')} on {n:g}" for d, n in votes if n)
        return TypeError(
            f"SyncBatchNorm needs input of one dtype on every rank; received {received} of {ranks} ranks. Cast the "
            f"input, or use the same autocast settings on every rank. {late}"
        )
    if 0 < status.grad_enabled < ranks:
        return ValueError(
            "SyncBatchNorm needs torch.is_grad_enabled() to be equal on every rank, or backward would wait forever; "
            f"received True on {status.grad_enabled:g} of {ranks} ranks. Use torch.no_grad() on all ranks or on none, "
            f"or model.eval(). {late}"
        )
    return ValueError(
        "SyncBatchNorm needs at least 2 values per channel in the group to estimate a variance; received "
        f"{count:g} over {ranks} rank{'s' if ranks > 1 else ''}. Give each rank more samples or call model.eval(). "
        f"{late}"
    )


def check(device: torch.device) -> None:
    """Waits for a device and raises what it has found. For the end of a step, not for its middle."""
    from syncbn import kernels

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        kernels.look(device)
