# SPDX-License-Identifier: BSD-3-Clause
"""Batch renormalization: training normalises by the batch, corrected towards the running statistics.

N batch, C channels, S product of the spatial dims.

    r = std / running_std, within [1 / r_max, r_max]
    d = (mean - running_mean) / running_std, within [-d_max, d_max]
    y = (xhat * r + d) * weight + bias = xhat * (r * weight) + (d * weight + bias)

r and d are constants in backward. So it is batch normalization with another weight and bias, and every kernel does it.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, BatchStats
from syncbn.moments import Running, Status


class RenormLimits(NamedTuple):
    """How far a batch may be corrected towards the running statistics.

    Source:
        Ioffe 2017 (arXiv 1702.03275), algorithm 1. The paper starts with (1, 0) and relaxes to (3, 5).
    """

    r_max: float = 1.0
    """At least 1. 1 leaves the scale of a batch alone."""
    d_max: float = 0.0
    """At least 0. 0 leaves the shift of a batch alone."""


OFF = RenormLimits()


def checked(limits: tuple[float, float] | None, track_running_stats: bool) -> RenormLimits | None:
    """Returns the limits, or None for none.

    Raises:
        ValueError: for limits out of range, or where there are no running statistics to go towards.
    """
    if limits is None:
        return None
    r_max, d_max = map(float, limits)
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(
            f"renorm_limits needs (r_max, d_max) with r_max >= 1 and d_max >= 0; received ({r_max:g}, {d_max:g}). "
            "(1, 0) is batch normalization; the paper relaxes it to (3, 5)."
        )
    if not track_running_stats:
        raise ValueError(
            "renorm_limits needs track_running_stats=True, since it corrects towards the running statistics; "
            "received False. Track them, or pass renorm_limits=None."
        )
    return RenormLimits(r_max, d_max)


def correction(wire: Tensor, running: Running, eps: float, limits: RenormLimits) -> tuple[Tensor, Tensor]:
    """Returns r and d, float64 (C,), of a batch and the running statistics that earlier batches made.

    Args:
        wire: float64 (2C + 8,), summed over the ranks.
        running: before this batch moves it.
        eps: added to both variances.
        limits: of r and d.
    """
    mean, _, invstd = moments.finalize(wire, eps)
    running_invstd = (running.var.double() + eps).rsqrt()
    r = (running_invstd / invstd).clamp(1.0 / limits.r_max, limits.r_max)
    d = ((mean - running.mean) * running_invstd).clamp(-limits.d_max, limits.d_max)
    return r, d


def corrected(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias, float64 (C,), of the batch normalization that is equal."""
    shift = d if weight is None else d * weight
    return r if weight is None else r * weight, shift if bias is None else shift + bias


@final
class RenormKernels(AbstractKernels):
    """Other kernels with the weight and bias of batch renormalization. One for each call: it keeps r and d.

    Args:
        inner: the kernels that do the work.
        limits: of r and d.
    """

    name = "renorm"

    def __init__(self, inner: AbstractKernels, limits: RenormLimits) -> None:
        self.inner, self.limits = inner, limits
        self.correction: tuple[Tensor, Tensor] | None = None

    def local_moments(self, x: Tensor, status: Status) -> Tensor:
        """See :meth:`AbstractKernels.local_moments`."""
        return self.inner.local_moments(x, status)

    def read_status(self, wire: Tensor) -> tuple[float, Status]:
        """See :meth:`AbstractKernels.read_status`."""
        return self.inner.read_status(wire)

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
        """See :meth:`AbstractKernels.normalize`.

        Without ``running`` it is that of batch normalization, or, where activation checkpointing repeats a forward,
        that of the first time.
        """
        if running is not None:
            self.correction = correction(wire, running, eps, self.limits)
        if self.correction is not None:
            weight, bias = corrected(*self.correction, weight, bias)
        return self.inner.normalize(x, wire, weight, bias, running, eps, count_global)

    def backward_sums(self, grad_y: Tensor, x: Tensor, stats: BatchStats) -> Tensor:
        """See :meth:`AbstractKernels.backward_sums`."""
        return self.inner.backward_sums(grad_y, x, stats)

    def parameter_gradients(
        self, wire: Tensor, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`AbstractKernels.parameter_gradients`. grad_weight = r * sum_grad_y_xhat + d * sum_grad_y."""
        if self.correction is not None:
            r, d = self.correction
            sum_grad_y, sum_grad_y_xhat = wire.chunk(2)
            wire = torch.cat((sum_grad_y, r * sum_grad_y_xhat + d * sum_grad_y))
        return self.inner.parameter_gradients(wire, weight, bias)

    def backward_input(
        self, grad_y: Tensor, x: Tensor, wire: Tensor, weight: Tensor | None, stats: BatchStats
    ) -> Tensor:
        """See :meth:`AbstractKernels.backward_input`."""
        if self.correction is not None:
            weight, _ = corrected(*self.correction, weight, None)
        return self.inner.backward_input(grad_y, x, wire, weight, stats)
