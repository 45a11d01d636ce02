# SPDX-License-Identifier: BSD-3-Clause
"""The kernel contract: the steps on one process's data, as four signatures.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

An implementation is stateless, accepts any strides and an empty share (N * S == 0), and is checked by
``tests/test_kernels.py`` against ``reference.py`` in float64. ``torch_ops.py`` is the readable one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn import moments
from syncbn.moments import Running, Status


class BatchStats(NamedTuple):
    """Statistics of the global batch that backward needs."""

    values: Tensor
    """float64 ``[mean (C), invstd (C)]``, and the count where only the device has it. One tensor, since an allocation
    costs as much as a small step."""
    count_global: float
    """Samples per channel in the global batch."""

    @property
    def mean(self) -> Tensor:
        """A view, float64 (C,)."""
        return self.values[: self.values.numel() // 2]

    @property
    def invstd(self) -> Tensor:
        """A view, float64 (C,)."""
        C = self.values.numel() // 2
        return self.values[C : 2 * C]


class AbstractKernels(ABC):
    """Four steps on one process's data. Nothing here communicates."""

    name: str

    @abstractmethod
    def local_moments(self, x: Tensor, status: Status) -> Tensor:
        """Sums x and x * x over N and S into a new forward wire.

        Args:
            x: (N, C, *spatial), float16, bfloat16, float32 or float64; N or S may be 0.
            status: counters that ride in the wire's tail.

        Returns:
            float64 (2C + 8,), laid out as in :mod:`syncbn.moments`. The sums are accumulated in float64.
        """

    def read_status(self, wire: Tensor) -> tuple[float, Status]:
        """Reads ``(count_global, status)`` of an all-reduced wire on the host."""
        return moments.read_status(wire)

    @abstractmethod
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
        """Finalises the statistics, moves the running ones, and normalises x.

        y = (x - mean) * (invstd * weight) + bias

        The mean is subtracted first: a channel of one value everywhere gives exactly the bias.

        Args:
            x: (N, C, *spatial), as given to :meth:`local_moments`.
            wire: float64 (2C + 8,), summed over the ranks.
            weight: (C,) or None for 1; any floating dtype.
            bias: (C,) or None for 0; any floating dtype.
            running: updated in place, or None to leave them alone.
            eps: added to the variance.
            count_global: samples per channel in the global batch, read from the wire by the caller.

        Returns:
            y, of x's shape, dtype and layout, and the statistics that backward needs.
        """

    @abstractmethod
    def backward_sums(self, grad_y: Tensor, x: Tensor, stats: BatchStats) -> Tensor:
        """Sums grad_y and grad_y * xhat over N and S, xhat = (x - mean) * invstd.

        Args:
            grad_y: (N, C, *spatial), in any layout, also another one than x.
            x: (N, C, *spatial).
            stats: as :meth:`normalize` returned them.

        Returns:
            float64 (2C,): ``[sum_grad_y (C), sum_grad_y_xhat (C)]``. Before the all-reduce these are also the
            local gradients of bias and weight.
        """

    def parameter_gradients(
        self, wire: Tensor, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Makes the local gradients of weight and bias of a wire that has not been reduced yet.

        Args:
            wire: float64 (2C,), as :meth:`backward_sums` returned it.
            weight: the dtype of weight, or None where it needs no gradient.
            bias: the dtype of bias, or None where it needs no gradient.

        Returns:
            ``grad_weight (C,)`` and ``grad_bias (C,)``, new tensors, or None.
        """
        grad_bias, grad_weight = wire.chunk(2)
        return (
            None if weight is None else grad_weight.to(weight, copy=True),
            None if bias is None else grad_bias.to(bias, copy=True),
        )

    def backward_sums_and_gradients(
        self, grad_y: Tensor, x: Tensor, stats: BatchStats, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs :meth:`backward_sums` and :meth:`parameter_gradients`; one kernel where that saves a launch."""
        wire = self.backward_sums(grad_y, x, stats)
        return wire, *self.parameter_gradients(wire, weight, bias)

    @abstractmethod
    def backward_input(
        self, grad_y: Tensor, x: Tensor, wire: Tensor, weight: Tensor | None, stats: BatchStats
    ) -> Tensor:
        """Forms the gradient of the input from the global sums.

        grad_x = (grad_y - sum_grad_y / count - xhat * sum_grad_y_xhat / count) * invstd * weight

        Args:
            grad_y: (N, C, *spatial).
            x: (N, C, *spatial).
            wire: float64 (2C,), :meth:`backward_sums` summed over the ranks.
            weight: (C,) or None for 1.
            stats: as :meth:`normalize` returned them.

        Returns:
            grad_x, of x's shape, dtype and layout.
        """
