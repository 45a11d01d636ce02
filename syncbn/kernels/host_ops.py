# SPDX-License-Identifier: BSD-3-Clause
"""The four steps in compiled C++, for CPU tensors: ``host/*.cpp``, one file a step.

Nothing is computed here: outputs are allocated, and ``_host`` checks every tensor before it uses a pointer. It reads
contiguous and channels_last inputs, and slices and transpositions of them, where they are. It answers False, having
done nothing, where the tensors of a step have no layout in common; then they are copied, once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from syncbn.kernels import _host
from syncbn.kernels.base import AbstractKernels, BatchStats
from syncbn.moments import STATUS_SLOTS, Running, Status

_host.learn_torch(Tensor.__dlpack_c_exchange_api__, Tensor)

# torch.empty would follow torch.set_default_device; new_empty of this follows nothing but this.
_FLOAT64 = torch.empty(0, dtype=torch.float64, device="cpu")
_ENDS = 1 + len(STATUS_SLOTS)
_ABSENT = Running(None, None, None, None)  # type: ignore[arg-type]


@final
class HostKernels(AbstractKernels):
    """The compiled kernels. The same bits with every instruction set and number of threads."""

    name = "host"

    def local_moments(self, x: Tensor, status: Status) -> Tensor:
        """See :meth:`AbstractKernels.local_moments`."""
        wire = _FLOAT64.new_empty(2 * x.size(1) + _ENDS)
        threads = torch.get_num_threads()
        if not _host.local_moments(x, wire, status, threads):
            _host.local_moments(x.contiguous(), wire, status, threads)
        return wire

    def read_status(self, wire: Tensor) -> tuple[float, Status]:
        """See :meth:`AbstractKernels.read_status`."""
        count, *status = _host.read_status(wire)
        return count, Status._make(status)

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
        y, stats = torch.empty_like(x), _FLOAT64.new_empty(2 * x.size(1))
        rest = (wire, weight, bias, stats, *(running or _ABSENT), eps, count_global, torch.get_num_threads())
        if not _host.normalize(x, y, *rest):
            dense = x.contiguous()
            result = torch.empty_like(dense)
            _host.normalize(dense, result, *rest)
            y.copy_(result)
        return y, BatchStats(stats, count_global)

    def backward_sums(self, grad_y: Tensor, x: Tensor, stats: BatchStats) -> Tensor:
        """See :meth:`AbstractKernels.backward_sums`."""
        wire = _FLOAT64.new_empty(2 * x.size(1))
        rest = (stats.values, wire, torch.get_num_threads())
        if grad_y.dtype != x.dtype or grad_y.is_neg() or not _host.backward_sums(grad_y, x, *rest):
            any(_host.backward_sums(g, dense, *rest) for dense, g in _copies(x, grad_y))
        return wire

    def parameter_gradients(
        self, wire: Tensor, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`AbstractKernels.parameter_gradients`."""
        C = wire.numel() // 2
        grad_weight = None if weight is None else _FLOAT64.new_empty(C, dtype=weight)
        grad_bias = None if bias is None else _FLOAT64.new_empty(C, dtype=bias)
        _host.parameter_gradients(wire, grad_weight, grad_bias)
        return grad_weight, grad_bias

    def backward_input(
        self, grad_y: Tensor, x: Tensor, wire: Tensor, weight: Tensor | None, stats: BatchStats
    ) -> Tensor:
        """See :meth:`AbstractKernels.backward_input`."""
        grad_x = torch.empty_like(x)
        rest = (wire, weight, stats.values, stats.count_global, torch.get_num_threads())
        if grad_y.dtype == x.dtype and not grad_y.is_neg() and _host.backward_input(grad_y, x, grad_x, *rest):
            return grad_x
        for dense, g in _copies(x, grad_y):
            result = torch.empty_like(dense)
            if _host.backward_input(g, dense, result, *rest):
                break
        return grad_x.copy_(result)


def _copies(x: Tensor, grad_y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pair with ever more of it copied; the last one always has a layout in common."""
    yield x, torch.empty_like(x).copy_(grad_y)
    yield x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_y)
