# SPDX-License-Identifier: BSD-3-Clause
"""What the calls of one layer add up to. Every rank adds the same tables, so every rank has the same sums.

M channels that are measured, W ranks, K calls. P stands for the pairs of a rank and a channel that count.
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from syncbn.training.drift import noise
from syncbn.training.drift.local import CONSTANT, HEAD


class Layer(NamedTuple):
    """Which layer it is."""

    name: str
    kind: str
    C: int
    synchronised: bool
    """Whether its statistics are those of several ranks."""
    tracks: bool
    """Whether it has running statistics."""


@final
class Sums:
    """The sums of one layer.

    Args:
        layer: the layer.
        M: how many of its channels are measured.
        W: the number of ranks.
    """

    def __init__(self, layer: Layer, M: int, W: int) -> None:
        self.layer, self.M = layer, M
        self.calls = 0
        self.count_local = self.count_global = self.constant = self.seconds = self.running = 0.0
        self.mean = self.mean_noise = self.pairs = 0.0
        self.var = self.var_noise = self.var_pairs = 0.0
        self.shift = torch.zeros(W, M, dtype=torch.float64, device="cpu")
        """Of each rank and channel, the sum of (mean_rank - mean_global) / std_global."""
        self.shift2, self.shifts = torch.zeros_like(self.shift), torch.zeros_like(self.shift)

    def add(self, table: Tensor) -> None:
        """Adds a call.

        Args:
            table: float64 (W, 3 + 4M), the rows of all ranks, see ``local.py``.
        """
        n, seconds, kurtosis = table[:, :HEAD].unbind(1)
        mean, var, running_mean, running_var = table[:, HEAD:].view(len(table), 4, self.M).unbind(1)
        N = n.sum()
        if N == 0:  # syncbn.join tries a model on no samples
            return
        self.calls += 1
        self.seconds = float(seconds.mean())
        self.running = _spread(running_mean, running_var) if self.layer.tracks else 0.0
        self.count_local += float(n.mean())
        self.count_global += float(N)
        if N <= 1:
            self.constant += self.M
            return
        present, share = (n > 0)[:, None], (n / N)[:, None]
        mean_global = (share * mean).sum(0)
        var_global = (share * (var + (mean - mean_global).square())).sum(0)
        varies = var_global > (CONSTANT * mean_global).square()  # False for NaN
        self.constant += float((~varies).sum())
        unbiased = var_global * N / (N - 1.0)
        counts = present & varies
        shift = torch.where(counts, (mean - mean_global) * unbiased.rsqrt(), 0.0)
        self.shift += shift
        self.shift2 += shift.square()
        self.shifts += counts
        self.mean += float(shift.square().sum())
        self.mean_noise += float(varies.sum() * noise.of_mean(n[n > 0], N).sum())
        self.pairs += float(counts.sum())

        several = n >= 2
        counts = several[:, None] & (var > 0) & varies
        own = var * (n / (n - 1.0).clamp(min=1.0))[:, None]
        self.var += float(torch.where(counts, (own / unbiased).log(), 0.0).square().sum())
        pairs = counts.sum(1).double()
        tails = torch.maximum(pairs + kurtosis / 2.0, noise.LEAST_TAIL * pairs)
        self.var_noise += float((tails[several] * noise.of_variance(n[several], N)).sum())
        self.var_pairs += float(pairs.sum())

    def steady(self) -> tuple[Tensor, float]:
        """Returns each rank's shift, averaged over the calls, (W, M), and the mean square of what noise leaves in it.

        Noise is judged by how much the shift changes from call to call. With one call it cannot be told apart.
        """
        K = self.shifts.clamp(min=1.0)
        shift = self.shift / K
        scatter = (self.shift2 / K - shift.square()).clamp(min=0.0) / (K - 1.0).clamp(min=1.0)
        known = self.shifts > 1
        return shift, float(scatter[known].mean()) if known.any() else math.inf


def _spread(mean: Tensor, var: Tensor) -> float:
    """Returns how far the ranks' running statistics move an output apart: sqrt(d_mean^2 + (d_log_var / 2)^2), rms."""
    middle = var.mean(0)
    good = middle > 0
    d_mean2 = (mean - mean.mean(0)).square() / middle
    d_var = (var / middle).clamp(min=1e-30).log() / 2.0
    squares = (d_mean2 + d_var.square())[:, good]
    return math.sqrt(float(squares.mean())) if squares.numel() else 0.0
