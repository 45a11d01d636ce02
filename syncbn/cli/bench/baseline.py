# SPDX-License-Identifier: BSD-3-Clause
"""The baseline of `syncbn bench`: what people use on CPU without this package.

N batch, C channels, W ranks.
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn


@final
class BaselineBatchNorm(nn.BatchNorm2d):
    """Synchronised batch norm from torch operators: the means of x and x * x, averaged over the ranks by gloo.

    mean = sum_W(mean(x)) / W;  var = sum_W(mean(x * x)) / W - mean^2;  y = x * scale + shift

    Local batches must be equal. It computes in the dtype of the input, as is common.

    Communication:
        One all-reduce of 2C values in forward and one in backward.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C, H, W); in float32 for half precision."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        x = input.to(self.weight.dtype)
        means = torch.cat((x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))))
        summed: Tensor = _SumOverRanks.apply(means)  # type: ignore[no-untyped-call]
        mean, mean_x2 = (summed / dist.get_world_size()).chunk(2)
        var = mean_x2 - mean * mean
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach(), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        del ctx
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
