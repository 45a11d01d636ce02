# SPDX-License-Identifier: BSD-3-Clause
"""What mean_drift and var_drift would be if all samples of all ranks were independent and of one distribution.

n samples per channel on a rank, N on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_TAIL = 0.1
"""The least factor by which light tails may lower the variance's noise: to first order, two values have none at all."""


def of_mean(n: Tensor, N: Tensor) -> Tensor:
    """Returns E[((mean_rank - mean_global) / std_global)^2] = 1 / n - 1 / N.

    With std_global from the unbiased variance this is exact for samples of any distribution, and for any counts: it is
    the variance of the mean of n values that are drawn from N without replacement.

    Args:
        n: float64 (W,), above 0.
        N: float64 ().
    """
    return 1.0 / n - 1.0 / N


def of_variance(n: Tensor, N: Tensor) -> Tensor:
    """Returns E[log(var_rank / var_global)^2] for normal samples, about 2 / n - 2 / N; exact for any counts.

    The rank's part of the sum of squares follows Beta(a, b - a) with a = (n - 1) / 2 and b = (N - 1) / 2, so its
    logarithm has the mean digamma(a) - digamma(b) and the variance trigamma(a) - trigamma(b). Samples with an excess
    kurtosis of k have 1 + k / 2 times as much, to first order in 1 / n.

    Args:
        n: float64 (W,), at least 2.
        N: float64 ().
    """
    a, b = (n - 1.0) / 2.0, (N - 1.0) / 2.0
    spread = torch.polygamma(1, a) - torch.polygamma(1, b)
    bias = torch.digamma(a) - torch.log(a) - (torch.digamma(b) - torch.log(b))
    return spread.clamp(min=0.0) + bias.square()


def samples_per_unit(ratio2: float, N: float) -> float:
    """Returns how many samples vary as one, for a mean whose squared drift is ``ratio2`` times the expected one.

    If each value stood k times in the batch, ratio2 would be k * (N - 1) / (N - k). This is solved for k.
    """
    return ratio2 * N / (N - 1.0 + ratio2)
