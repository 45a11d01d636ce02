# SPDX-License-Identifier: BSD-3-Clause
"""The four steps in compiled C++, for CPU tensors: ``host/*.cpp``, one file a step.

This module only allocates outputs. ``_host`` checks every tensor before it uses a pointer. It reads contiguous and
channels_last inputs, and slices and transpositions of them, without a copy. If the tensors of a step have no layout in
common, it does nothing and returns False. Then they are copied, once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, Parameters
from syncbn.kernels.host import _host as compiled
from syncbn.moments import Counters, Message, Numbers, Running, Status

sound = compiled.sound
"""Whether the steps can take x, weight, bias, running mean and var, and an int64 counter, for C channels."""
compiled.learn_torch(Tensor.__dlpack_c_exchange_api__, Tensor)

# torch.empty would obey torch.set_default_device; new_empty of this tensor does not.
_FLOAT64 = torch.empty(0, dtype=torch.float64, device="cpu")
_FORWARD = moments.wire_length(0)
_ABSENT = Running(None, None, None, None)  # type: ignore[arg-type]


@final
class HostKernels(AbstractKernels):
    """The compiled kernels. Every instruction set and number of threads gives the same bits. They take no mask."""

    name = "host"

    def local_moments(self, x: Tensor, mask: Tensor | None, numbers: Numbers, status: Status) -> Tensor:
        """See ``AbstractKernels.local_moments``."""
        assert mask is None
        wire = _FLOAT64.new_empty(2 * x.size(1) + _FORWARD)
        threads = torch.get_num_threads()
        if not compiled.local_moments(x, wire, numbers, status, threads):
            compiled.local_moments(x.contiguous(), wire, numbers, status, threads)
        return wire

    def read_counters(self, wire: Tensor, message: Message) -> Counters:
        """See ``AbstractKernels.read_counters``."""
        return Counters._make(compiled.read_counters(wire, message.numbers))

    def agreement(self, wire: Tensor, message: Message) -> int:
        """See ``AbstractKernels.agreement``."""
        return compiled.agreement(wire, message.numbers, message.ranks)

    def normalize(self, x: Tensor, wire: Tensor, parameters: Parameters, message: Message) -> tuple[Tensor, Tensor]:
        """See ``AbstractKernels.normalize``."""
        weight, bias, eps, running = parameters
        if running is not None and not moments.is_plain_count(running.num_batches_tracked):
            running = moments.counted(running)
        y, stats = torch.empty_like(x), _FLOAT64.new_empty(2 * x.size(1) + 1)
        rest = (wire, weight, bias, stats, *(running or _ABSENT), eps, torch.get_num_threads())
        if not compiled.normalize(x, y, *rest):
            dense = x.contiguous()
            result = torch.empty_like(dense)
            compiled.normalize(dense, result, *rest)
            y.copy_(result)
        if running is not None:
            moments.tell_autograd(running)
        return y, stats

    def backward_sums(
        self,
        grad_y: Tensor,
        x: Tensor,
        stats: Tensor,
        numbers: Numbers,
        weight: torch.dtype | None = None,
        bias: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ``AbstractKernels.backward_sums``."""
        C = x.size(1)
        wire = _FLOAT64.new_empty(2 * C + moments.CALL)
        rest = (stats, wire, numbers, torch.get_num_threads())
        if grad_y.dtype != x.dtype or grad_y.is_neg() or not compiled.backward_sums(grad_y, x, *rest):
            any(compiled.backward_sums(g, dense, *rest) for dense, g in _copies(x, grad_y))
        grad_weight = None if weight is None else _FLOAT64.new_empty(C, dtype=weight)
        grad_bias = None if bias is None else _FLOAT64.new_empty(C, dtype=bias)
        compiled.parameter_gradients(wire, grad_weight, grad_bias)
        return wire, grad_weight, grad_bias

    def check_sums(self, wire: Tensor, message: Message) -> bool:
        """See ``AbstractKernels.check_sums``."""
        return compiled.check_sums(wire, message.numbers)

    def backward_input(
        self,
        grad_y: Tensor,
        x: Tensor,
        mask: Tensor | None,
        wire: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        message: Message,
    ) -> Tensor:
        """See ``AbstractKernels.backward_input``."""
        grad_x = torch.empty_like(x)
        rest = (wire, weight, stats, torch.get_num_threads())
        if grad_y.dtype == x.dtype and not grad_y.is_neg() and compiled.backward_input(grad_y, x, grad_x, *rest):
            return grad_x
        for dense, g in _copies(x, grad_y):
            result = torch.empty_like(dense)
            if compiled.backward_input(g, dense, result, *rest):
                break
        return grad_x.copy_(result)


def _copies(x: Tensor, grad_y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pair with one tensor copied, then with both. The last pair always has a layout in common."""
    yield x, torch.empty_like(x).copy_(grad_y)
    yield x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad_y)
