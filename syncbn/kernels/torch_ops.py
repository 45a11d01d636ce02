# SPDX-License-Identifier: BSD-3-Clause
"""The four steps in plain torch operators: right on every device, and written to be read.

Per-channel numbers are float64 and are rounded once, to float32 (or float64 for float64 input), before they
meet the elements. The elementwise work is single multiplications and additions, never a fused operator:
vector and tail code then round alike, so an element's bits do not depend on where in the tensor it stands.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, BatchStats
from syncbn.moments import Running, Status


@final
class TorchKernels(AbstractKernels):
    """The readable kernels."""

    name = "torch"

    def local_moments(self, x: Tensor, status: Status) -> Tensor:
        """See :meth:`AbstractKernels.local_moments`."""
        dims = _reduced_dims(x)
        x64 = x.to(torch.float64, copy=True)
        sum_x = x64.sum(dims)
        sum_x2 = x64.square_().sum(dims)  # in place: one temporary of the input's size, not two
        return moments.pack(x.numel() // x.size(1), sum_x, sum_x2, status)

    def normalize(
        self,
        x: Tensor,
        wire: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        count_global: float,
    ) -> tuple[Tensor, BatchStats]:
        """See :meth:`AbstractKernels.normalize`."""
        mean, var, invstd = moments.finalize(wire, eps)
        if running is not None:
            moments.update_running(running, mean, var, count_global)
        scale = invstd if weight is None else invstd * weight.double()
        y = _centered(x, mean).mul_(_channels(scale, x))
        if bias is not None:
            y.add_(_channels(bias, x))
        return y.to(x.dtype), BatchStats(torch.cat((mean, invstd)), count_global)

    def backward_sums(self, grad_y: Tensor, x: Tensor, stats: BatchStats) -> Tensor:
        """See :meth:`AbstractKernels.backward_sums`."""
        dims = _reduced_dims(x)
        xhat = x.to(torch.float64, copy=True).sub_(_broadcast(stats.mean, x)).mul_(_broadcast(stats.invstd, x))
        sum_grad_y = grad_y.sum(dims, dtype=torch.float64)
        sum_grad_y_xhat = xhat.mul_(grad_y).sum(dims)
        return torch.cat((sum_grad_y, sum_grad_y_xhat))

    def backward_input(
        self, grad_y: Tensor, x: Tensor, wire: Tensor, weight: Tensor | None, stats: BatchStats
    ) -> Tensor:
        """See :meth:`AbstractKernels.backward_input`."""
        sum_grad_y, sum_grad_y_xhat = wire.chunk(2)
        count = max(stats.count_global, 1.0)
        scale = stats.invstd if weight is None else stats.invstd * weight.double()
        slope = stats.invstd * sum_grad_y_xhat / count
        grad_x = _centered(x, stats.mean).mul_(_channels(-slope, x))
        grad_x.add_(grad_y).sub_(_channels(sum_grad_y / count, x)).mul_(_channels(scale, x))
        return grad_x.to(x.dtype)


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    """Returns x - mean in the dtype that elementwise arithmetic runs in and in the layout of x."""
    return torch.sub(x, _channels(mean, x), out=torch.empty_like(x, dtype=_compute_dtype(x)))


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Views (C,) values as (1, C, 1, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Rounds (C,) values once to the dtype of elementwise arithmetic and broadcasts them over x."""
    return _broadcast(values.to(_compute_dtype(x)), x)
