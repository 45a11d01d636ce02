# SPDX-License-Identifier: BSD-3-Clause
"""The definition of the layer: batch norm over the global batch, in one process, in plain torch.

N batch, C channels, S product of the spatial dims. Everything else in this package computes the same, faster or over
several ranks. Autograd differentiates it, also twice. The tests use it in float64 as their oracle.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reference(NamedTuple):
    """The output for a global batch, and the running statistics after it."""

    y: Tensor
    running_mean: Tensor
    running_var: Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Reference:
    """Normalises the global batch and moves copies of the running statistics.

    y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        x: (N, C, *spatial), the local batches of all ranks, concatenated.
        weight: (C,).
        bias: (C,).
        running_mean: (C,).
        running_var: (C,).
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1; the unbiased running variance is their section 3.1.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    per_channel = [1, -1, *[1] * (x.dim() - 2)]
    count = x.numel() // x.size(1)

    mean = x.mean(dims)
    centered = x - mean.view(per_channel)
    var = centered.square().mean(dims)
    y = centered / (var + eps).sqrt().view(per_channel) * weight.view(per_channel) + bias.view(per_channel)

    new_mean = (1 - momentum) * running_mean + momentum * mean.detach()
    new_var = (1 - momentum) * running_var + momentum * var.detach() * count / (count - 1)
    return Reference(y, new_mean, new_var)
