# SPDX-License-Identifier: BSD-3-Clause
"""The wire: what ranks send, and the statistics computed from it. No devices, no MPI.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    [call (7), count, sum_x (C), sum_x2 (C), status (7)]     float64, 2C + 15 values
    backward   [call (7), sum_grad_y (C), sum_grad_y_xhat (C)]          float64, 2C + 7 values

Every value is a plain sum over samples or over ranks, so one SUM all-reduce combines any partition of the
batch. Size and dtype of the wire never depend on the data of a rank. The call comes first, so that it can still be
read if ranks send wires of different length and a library truncates the longer one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record", bound=NamedTuple)
record = cast("Callable[[type[Record], tuple[Any, ...]], Record]", tuple.__new__)
"""Makes a NamedTuple without its Python constructor, which is slow: each step makes five."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The input dtypes of the layer, in the order of their status slots."""

FORWARD, BACKWARD = 0, 1
"""Directions of a message. The derivative of a message of direction d has direction d + 2."""
Numbers = tuple[int, int, int, int]
"""What identifies a call: 1, and three integers below ``LIMIT``, see ``numbers``; or ``ABSTAINS``."""
ABSTAINS: Numbers = (0, 0, 0, 0)
"""The numbers of a rank that does not know which of several calls it repeats. They add nothing to the sums."""
LIMIT = 2**18
"""Sums of squares of integers below it are exact in float64 for up to 65,536 ranks: 2^16 * (2^18)^2 < 2^53."""


class Message(NamedTuple):
    """The identity of a message."""

    numbers: Numbers
    ranks: int
    """W, the ranks of the group."""
    label: str
    """The layer."""
    direction: int
    """0 forward, 1 backward; the derivative of a message of direction d has direction d + 2. Below 0: not a layer's."""
    serial: int
    """The number of forwards that the group made before the one that this message belongs to."""

    def __str__(self) -> str:
        if self.direction < 0:
            return f"{self.label} (call {self.serial})"
        text = "backward" if self.direction % 2 else "forward"
        if self.direction >= 2:
            text = f"derivative {self.direction // 2 + 1} through the {text}"
        return f"{text} of {self.label} (call {self.serial})"


class Status(NamedTuple):
    """What a rank says about its call, as counters: after the all-reduce each is a number of ranks."""

    faults: float = 0.0
    """1 where the input was refused; such a rank has no samples."""
    grad_enabled: float = 0.0
    """1 where autograd records."""
    needs_grad: float = 0.0
    """1 where autograd records and input, weight or bias requires a gradient."""
    float16: float = 0.0
    bfloat16: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    """1 for the dtype of a local batch that is not empty. An empty local batch sets none of the four."""


STATUS_SLOTS = Status._fields
DTYPE_VOTES = {d: tuple(float(d == other) for other in DTYPES) for d in DTYPES}
CALL = 1 + 2 * 3
"""Slots of the call: 1, three integers and their squares."""
_increment_version = torch._C._increment_version  # torch.autograd.graph.increment_version without its Python wrapper
_COUNT, _TAIL = CALL, len(STATUS_SLOTS)


class Counters(NamedTuple):
    """What an all-reduced forward wire says of the call, read on the host."""

    same_call: bool
    """Whether every rank sent the numbers of this rank's call."""
    samples: float
    """Per channel in the global batch; with masks a sum of weights."""
    status: Sequence[float]
    """As ``Status`` names them."""

    def problem(self, ranks: int) -> str:
        """Returns the first problem that applies: call, input, dtype, grad_enabled or count; or an empty string."""
        count, status = self.samples, self.status
        if not self.same_call:
            return "call"
        if status[0]:
            return "input"
        if (status[3] > 0) + (status[4] > 0) + (status[5] > 0) + (status[6] > 0) > 1:
            return "dtype"
        if 0 < status[1] < ranks:
            return "grad_enabled"
        return "count" if 0 < count <= 1 else ""


class Running(NamedTuple):
    """The running statistics of a layer and how they move."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None


def wire_length(C: int) -> int:
    """Returns the length of a forward wire."""
    return CALL + 1 + 2 * C + _TAIL


def sums_length(C: int) -> int:
    """Returns the length of a backward wire."""
    return CALL + 2 * C


def channels(wire: Tensor) -> int:
    """Returns C of a forward wire."""
    return (wire.numel() - wire_length(0)) // 2


def count(wire: Tensor) -> Tensor:
    """Views the count of a forward wire, float64 ()."""
    return wire[_COUNT]


def sums(wire: Tensor) -> Tensor:
    """Views ``[sum_x (C), sum_x2 (C)]`` of a forward wire, float64 (2C,)."""
    return wire[_COUNT + 1 : _COUNT + 1 + 2 * channels(wire)]


def head(numbers: Numbers) -> tuple[int, ...]:
    """Returns the call slots of a rank: its numbers and their squares."""
    speaks, a, b, c = numbers
    return speaks, a, b, c, a * a, b * b, c * c


def numbers(serial: int, hash: tuple[int, int], direction: int) -> Numbers:
    """Returns the numbers of a message."""
    return 1, serial % LIMIT, (hash[0] + direction) % LIMIT, hash[1]


def text_hash(text: str) -> tuple[int, int]:
    """Returns a 36-bit hash of a text. It is the same in every process."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=5).digest(), "big")
    return number % LIMIT, number // LIMIT % LIMIT


def same_call(slots: Sequence[float], numbers: Numbers) -> bool:
    """Whether every rank that does not abstain sent the same numbers. All ranks get the same answer.

    n ranks sent the number v iff the sum is n * v and the sum of squares n * v^2. They sent one number, whichever it
    is, iff n * sum(v^2) = (sum v)^2. Every sum is exact, see ``LIMIT``.

    Args:
        slots: the call slots, summed over the ranks.
        numbers: of this rank's call.
    """
    if not all(math.isfinite(s) and s == int(s) for s in slots):  # these are no call slots
        return False
    n, *sums = map(int, slots)
    integers, squares = sums[:3], sums[3:]
    if numbers[0] == 0:
        return all(n * square == integer * integer for integer, square in zip(integers, squares, strict=True))
    return [*integers, *squares] == [n * v for v in head(numbers)[1:]]


def pack(numbers: Numbers, count: float | Tensor, sum_x: Tensor, sum_x2: Tensor, status: Status) -> Tensor:
    """Packs local moments into the forward wire.

    Args:
        numbers: of this rank's call.
        count: samples per channel on this rank, N * S; or float64 ().
        sum_x: float64 (C,), sum of x over N and S.
        sum_x2: float64 (C,), sum of x * x over N and S.
        status: this rank's counters. ``faults`` may be a float64 () tensor.

    Returns:
        float64 (2C + 15,), on the device of ``sum_x``.
    """
    if torch.compiler.is_compiling() and not isinstance(count, Tensor):
        # Before torch 2.13, new_tensor with a symbolic count would compile a graph for each number of samples.
        count, faults = sum_x.new_full((), count), sum_x.new_full((), status[0])
        status = Status(faults, *status[1:])  # type: ignore[arg-type]
    if isinstance(count, Tensor):
        rest = sum_x.new_tensor((*head(numbers), *status[1:]))
        return torch.cat((rest[:CALL], count.view(1), sum_x, sum_x2, status[0].view(1), rest[CALL:]))  # type: ignore[attr-defined]
    ends = sum_x.new_tensor((*head(numbers), count, *status))
    return torch.cat((ends[: CALL + 1], sum_x, sum_x2, ends[CALL + 1 :]))


def read_counters(wire: Tensor, numbers: Numbers) -> Counters:
    """Reads an all-reduced forward wire on the host, in one copy from its device."""
    ends = torch.cat((wire[: CALL + 1], wire[-_TAIL:])).tolist()
    return Counters(same_call(ends[:CALL], numbers), ends[CALL], Status._make(ends[CALL + 1 :]))


def finalize(wire: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turns an all-reduced forward wire into ``mean``, ``var`` (biased) and ``invstd``.

    mean = sum_x / count;  var = sum_x2 / count - mean^2, not below 0;  invstd = 1 / sqrt(var + eps)

    In float64 the subtraction loses about 1e-16 * (mean / std)^2 of the variance: 1e-8 at mean/std = 1e4.
    With no samples at all the results are 0, 0 and 1 / sqrt(eps), never NaN.

    Args:
        wire: float64 (2C + 15,), as ``pack`` makes it, summed over the ranks.
        eps: added to the variance.

    Returns:
        Three float64 (C,) tensors.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
    """
    return finalize_sums(count(wire), sums(wire), eps)


def finalize_sums(count: Tensor, sums: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Does what ``finalize`` does, from the parts of a wire; differentiable with respect to ``sums``."""
    sum_x, sum_x2 = sums.chunk(2)
    count = count.clamp(min=1.0)
    mean = sum_x / count
    var = (sum_x2 / count - mean * mean).clamp(min=0.0)
    return mean, var, (var + eps).rsqrt()


def update_running(running: Running, wire: Tensor, moves: Tensor | None = None) -> None:
    """Moves the running statistics, in place, towards this batch. Waits for no device.

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance var * count / (count - 1).
    ``momentum=None`` averages over all batches seen. Computed in float64, rounded once to the buffers' dtype.
    A batch without samples is counted in num_batches_tracked, as torch does, and moves nothing else.

    Args:
        running: the statistics to move.
        wire: float64 (2C + 15,), summed over the ranks.
        moves: bool (), False to leave the statistics alone; None is True.
    """
    mean, var, _ = finalize(wire, 0.0)
    n, tracked = count(wire), running.num_batches_tracked
    any_sample = n > 0 if moves is None else (n > 0) & moves
    momentum: float | Tensor = 0.0 if running.momentum is None else running.momentum
    if tracked is not None:
        tracked.add_(1 if moves is None else moves.to(tracked.device, torch.uint8))
        if running.momentum is None:  # without num_batches_tracked torch, too, leaves the buffers alone
            momentum = 1.0 / tracked.to(wire.device, torch.float64).clamp(min=1.0)
    unbiased = var * (n / (n - 1.0))
    for buffer, batch in ((running.mean, mean), (running.var, unbiased)):
        before = buffer.double()
        buffer.copy_(torch.where(any_sample, before * (1.0 - momentum) + batch * momentum, before))


def is_plain_count(tracked: Tensor | None) -> bool:
    """Whether kernels of the CPU can count in num_batches_tracked themselves."""
    return tracked is None or (tracked.dtype is torch.int64 and tracked.is_cpu)


def counted(running: Running) -> Running:
    """Counts the batch in a num_batches_tracked of any dtype, in its own dtype as torch does.

    Returns:
        The same statistics with the momentum that follows, and without num_batches_tracked.
    """
    tracked, momentum = running.num_batches_tracked, running.momentum
    assert tracked is not None
    tracked.add_(1)
    return running._replace(
        num_batches_tracked=None, momentum=1.0 / max(float(tracked), 1.0) if momentum is None else momentum
    )


def status_of(fault: bool, grad_enabled: bool, needs_grad: bool, dtype: torch.dtype | None) -> Status:
    """Returns the status of a call. ``dtype`` is None if there are no samples."""
    votes = (0.0,) * len(DTYPES) if dtype is None else DTYPE_VOTES[dtype]
    return Status(float(fault), float(grad_enabled), float(grad_enabled and needs_grad), *votes)


def tell_autograd(running: Running) -> None:
    """Tells autograd that a kernel has changed the running statistics in place.

    A graph that has saved a buffer then raises in backward instead of using the changed values.
    """
    mean, var, tracked, _ = running
    if not mean.is_inference():
        _increment_version((mean, var) if tracked is None else (mean, var, tracked))
