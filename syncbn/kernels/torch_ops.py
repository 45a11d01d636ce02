# SPDX-License-Identifier: BSD-3-Clause
"""The four steps in plain torch operators. They run on every device and are written to be read.

N batch, C channels, S product of the spatial dims.

This is the only implementation that takes a mask, that a compiler traces and that autograd differentiates. So only the
running statistics are changed in place. Per-channel numbers are float64 and are rounded once, to float32 (float64 for
float64 input), before they are applied to the elements. Elementwise work uses single multiplications and additions,
never a fused operator: vector and tail code then round alike, so an element's bits do not depend on its place in the
tensor.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, Parameters, split_stats
from syncbn.moments import Counters, Message, Numbers, Status


@final
class TorchKernels(AbstractKernels):
    """The readable kernels."""

    name = "torch"

    def local_moments(self, x: Tensor, mask: Tensor | None, numbers: Numbers, status: Status) -> Tensor:
        """See ``AbstractKernels.local_moments``. Wrong values in a mask travel as a fault."""
        x = x.detach()
        sum_x, sum_x2 = local_sums(x, mask).chunk(2)
        if mask is None:
            return moments.pack(numbers, x.numel() // x.size(1), sum_x, sum_x2, status)
        weights = mask.double()
        usable = ((weights >= 0) & (weights < torch.inf)).all()
        status = Status((~usable).double(), *status[1:])  # type: ignore[arg-type]
        return moments.pack(numbers, weights.sum(), sum_x, sum_x2, status)

    def read_counters(self, wire: Tensor, message: Message) -> Counters:
        """See ``AbstractKernels.read_counters``."""
        return moments.read_counters(wire, message.numbers)

    def normalize(self, x: Tensor, wire: Tensor, parameters: Parameters, message: Message) -> tuple[Tensor, Tensor]:
        """See ``AbstractKernels.normalize``."""
        del message
        weight, bias, eps, running = parameters
        mean, _, invstd = moments.finalize(wire, eps)
        if running is not None:
            moments.update_running(running, wire)
        stats = torch.cat((mean, invstd, moments.count(wire).view(1)))
        return affine(x, mean, invstd, weight, bias), stats

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
        dims = _reduced_dims(x)
        mean, invstd, _ = split_stats(stats)
        xhat = (x.double() - _broadcast(mean, x)) * _broadcast(invstd, x)
        sum_grad_y = grad_y.sum(dims, dtype=torch.float64)
        sum_grad_y_xhat = (xhat * grad_y).sum(dims)
        head = stats.new_tensor(moments.head(numbers))
        return (
            torch.cat((head, sum_grad_y, sum_grad_y_xhat)),
            None if weight is None else sum_grad_y_xhat.to(weight),
            None if bias is None else sum_grad_y.to(bias),
        )

    def check_sums(self, wire: Tensor, message: Message) -> bool:
        """See ``AbstractKernels.check_sums``."""
        return moments.same_call(wire[: moments.CALL].tolist(), message.numbers)

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
        del message
        mean, invstd, count = split_stats(stats)
        sum_grad_y, sum_grad_y_xhat = wire[moments.CALL :].chunk(2)
        count = count.clamp(min=1.0)
        through_statistics = _centered(x, mean) * _channels(-(invstd * sum_grad_y_xhat / count), x)
        offset = _channels(sum_grad_y / count, x)
        if mask is None:
            grad_x = through_statistics + grad_y - offset
        else:  # torch.where, since a masked value may be NaN
            grad_x = torch.where(mask > 0, (through_statistics - offset) * mask, 0.0) + grad_y
        return _laid_out(grad_x * _channels(_scale(invstd, weight), x), x)


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sums x and x * x over N and S: float64 (2C,). A masked value may be NaN."""
    dims = _reduced_dims(x)
    x = x.double()
    if mask is None:
        return torch.cat((x.sum(dims), (x * x).sum(dims)))
    x = torch.where(mask > 0, x, 0.0)
    weighted = x * mask
    return torch.cat((weighted.sum(dims), (weighted * x).sum(dims)))


def affine(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns (x - mean) * (invstd * weight) + bias in the dtype and layout of x; mean and invstd are float64 (C,)."""
    y = _centered(x, mean) * _channels(_scale(invstd, weight), x)
    if bias is not None:
        y = y + _channels(bias, x)
    return _laid_out(y, x)


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight.double()


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _centered(x: Tensor, mean: Tensor) -> Tensor:
    """Returns x - mean in the dtype of elementwise arithmetic."""
    return x - _channels(mean, x)


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Returns values in the dtype and layout of x. Operators may choose another layout if a dim has size 1."""
    fixed = (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    )  # no copy into new memory there
    if not fixed and values.stride() != x.stride():
        like = torch.empty_like(x)
        if values.stride() != like.stride():
            return like.copy_(values)
    # No `to` that would return y itself: torch 2.11 then compiles a backward that gets no gradient.
    return values if values.dtype == x.dtype else values.to(x.dtype)


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Views (C,) values as (1, C, 1, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Rounds (C,) values once to the dtype of elementwise arithmetic and broadcasts them over x."""
    return _broadcast(values.to(torch.float64 if x.dtype == torch.float64 else torch.float32), x)
