# SPDX-License-Identifier: BSD-3-Clause
"""The additive wire form: what travels between ranks, and what is made of it. No devices, no MPI.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    [count, sum_x (C), sum_x2 (C), status (len(STATUS_SLOTS))]     float64, 2C + 1 + 7 values
    backward   [sum_grad_y (C), sum_grad_y_xhat (C)]                          float64, 2C values

Every value is a plain sum over samples or over ranks, so one SUM all-reduce combines any partition of the
batch, and neither size nor dtype of the wire depends on the data of a rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The input dtypes of the layer, in the order of their status slots."""


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
    """1 for the dtype of a share that is not empty. An empty share votes for none."""

    @property
    def dtypes(self) -> int:
        """How many different dtypes the non-empty shares have."""
        return (self[3] > 0) + (self[4] > 0) + (self[5] > 0) + (self[6] > 0)


STATUS_SLOTS = Status._fields
DTYPE_VOTES = {d: tuple(float(d == other) for other in DTYPES) for d in DTYPES}
NO_VOTE = (0.0,) * len(DTYPES)


class Running(NamedTuple):
    """The running statistics of a layer and how they move."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None


def pack(count: float, sum_x: Tensor, sum_x2: Tensor, status: Status) -> Tensor:
    """Packs local moments into the forward wire.

    Args:
        count: samples per channel on this rank, N * S.
        sum_x: float64 (C,), sum of x over N and S.
        sum_x2: float64 (C,), sum of x * x over N and S.
        status: this rank's counters.

    Returns:
        float64 (2C + 8,), on the device of ``sum_x``.
    """
    ends = torch.tensor((count, *status), dtype=torch.float64, device=sum_x.device)
    return torch.cat((ends[:1], sum_x, sum_x2, ends[1:]))


def read_status(wire: Tensor) -> tuple[float, Status]:
    """Reads ``(count_global, status)`` of an all-reduced wire on the host."""
    tail = len(STATUS_SLOTS)
    count, *status = torch.cat((wire[:1], wire[-tail:])).tolist()
    return count, Status(*status)


def unpack(wire: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a forward wire into views ``count ()``, ``sum_x (C,)``, ``sum_x2 (C,)``."""
    C = (wire.numel() - 1 - len(STATUS_SLOTS)) // 2
    return wire[0], wire[1 : C + 1], wire[C + 1 : 2 * C + 1]


def finalize(wire: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turns an all-reduced forward wire into ``mean``, ``var`` (biased) and ``invstd``.

    mean = sum_x / count;  var = sum_x2 / count - mean^2, not below 0;  invstd = 1 / sqrt(var + eps)

    In float64 the subtraction loses about 1e-16 * (mean / std)^2 of the variance: 1e-8 at mean/std = 1e4.
    With no samples at all the results are 0, 0 and 1 / sqrt(eps), never NaN.

    Args:
        wire: float64 (2C + 8,), as :func:`pack` makes it, summed over the ranks.
        eps: added to the variance.

    Returns:
        Three float64 (C,) tensors.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1.
    """
    count, sum_x, sum_x2 = unpack(wire)
    count = count.clamp(min=1.0)
    mean = sum_x / count
    var = (sum_x2 / count).sub_(mean * mean).clamp_(min=0.0)
    return mean, var, (var + eps).rsqrt_()


def update_running(running: Running, mean: Tensor, var: Tensor, count_global: float) -> None:
    """Moves the running statistics, in place, towards this batch.

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance var * count / (count - 1).
    ``momentum=None`` averages over all batches seen. Computed in float64, rounded once to the buffers' dtype.
    """
    momentum = running.momentum
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(running.num_batches_tracked)
    if momentum is None:  # torch, too, leaves the buffers alone where nothing counts the batches
        momentum = 0.0
    unbiased = var * (count_global / (count_global - 1.0))
    for buffer, batch in ((running.mean, mean), (running.var, unbiased)):
        buffer.copy_(buffer.double().mul_(1.0 - momentum).add_(batch * momentum))
