# SPDX-License-Identifier: BSD-3-Clause
"""What one rank sends of one call of a layer: its own statistics, before any synchronisation.

C channels, M of them measured, W ranks.

    row    [count, seconds, kurtosis, mean (M), var (M), running_mean (M), running_var (M)]     float64, 3 + 4M values
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

HEAD = 3
LIMIT = 2**15
"""W * M above which only some channels are measured, so that a message stays at 1 MB whatever W and C are."""
LEAST = 64
"""Channels that are measured in any case."""
CONSTANT = 1e-10
"""A channel is constant if its std is below this part of its mean: rounding of float64, and no step of float32."""
_BLOCK = 2**20
"""Values that are converted to float64 at a time."""


def channels(C: int, W: int) -> Tensor | None:
    """Returns the channels to measure, evenly spaced; None for all of them. The same on every rank."""
    M = max(LEAST, LIMIT // W)
    return None if M >= C else torch.arange(M, device="cpu") * C // M


def row(layer: _BatchNorm, x: Tensor, mask: Tensor | None, chosen: Tensor | None, seconds: float) -> Tensor:
    """Returns the row of a rank. An input that the layer refuses counts as no samples: the layer raises its error.

    Args:
        layer: it is about to be called.
        x: its input, (N, C, *spatial).
        mask: (N, *spatial) or (N, 1, *spatial), or None.
        chosen: what ``channels`` returned.
        seconds: spent in the collectives of the layer so far.
    """
    M = layer.num_features if chosen is None else len(chosen)
    row = torch.zeros(HEAD + 4 * M, dtype=torch.float64, device="cpu")
    row[1] = seconds
    parts = row[HEAD:].view(4, M)
    for part, buffer in zip(parts[2:], (layer.running_mean, layer.running_var), strict=True):
        if buffer is not None:
            part.copy_(_picked(buffer.detach().double(), chosen, 0))
    try:
        count, kurtosis, mean, var = moments(_picked(x.detach(), chosen, 1), mask, M)
    except Exception:  # of any kind: on this rank alone, it would leave the others waiting
        return row
    row[0], row[2] = count, kurtosis
    parts[0], parts[1] = mean.cpu(), var.cpu()
    return row


def _picked(tensor: Tensor, chosen: Tensor | None, dim: int) -> Tensor:
    return tensor if chosen is None else tensor.index_select(dim, chosen.to(tensor.device))


def moments(x: Tensor, mask: Tensor | None, C: int) -> tuple[float, float, Tensor, Tensor]:
    """Returns count, the sum of the excess kurtosis over channels that vary, and mean and biased variance, (C,).

    Two passes in float64, so nothing is lost where the mean is large. The kurtosis is Fisher's estimate G2, which has
    no bias for normal samples; 0 for fewer than 4 of them.
    """
    if x.dim() < 2 or x.size(1) != C or not x.is_floating_point():
        raise ValueError("The layer refuses this input.")
    dims = [0, *range(2, x.dim())]
    weights = None if mask is None else mask.detach().reshape(x.size(0), 1, *x.shape[2:]).double()
    count = float(x.numel() // C) if weights is None else float(weights.sum())
    zeros = torch.zeros(C, dtype=torch.float64, device=x.device)
    if not count > 0:
        return 0.0, 0.0, zeros, zeros
    blocks = [_of_block(block, weights, count, dims) for block in torch.split(x, max(1, _BLOCK * C // x.numel()), 1)]
    mean, var, fourth = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    var = torch.where(var > (CONSTANT * mean).square(), var, 0.0)
    if count < 4:
        return count, 0.0, mean, var
    g2 = fourth / var.square() - 3.0
    kurtosis = (count - 1.0) / ((count - 2.0) * (count - 3.0)) * ((count + 1.0) * g2 + 6.0)
    return count, float(kurtosis[var > 0].nansum()), mean, var


def _of_block(x: Tensor, weights: Tensor | None, count: float, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    x = x.double()
    if weights is not None:
        x = torch.where(weights > 0, x, 0.0)
    mean = (x if weights is None else x * weights).sum(dims, keepdim=True) / count
    square = (x - mean).square()
    weighted = square if weights is None else square * weights
    return mean.flatten(), weighted.sum(dims) / count, (weighted * square).sum(dims) / count
