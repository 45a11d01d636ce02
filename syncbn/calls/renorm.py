# SPDX-License-Identifier: BSD-3-Clause
"""Batch renormalization: training normalises by the batch, corrected towards the running statistics.

N batch, C channels, S product of the spatial dims.

    r = std / running_std, within [1 / r_max, r_max]
    d = (mean - running_mean) / running_std, within [-d_max, d_max]
    y = (xhat * r + d) * weight + bias = xhat * (r * weight) + (d * weight + bias)

r and d are constants in backward. So this is batch normalization with another weight and bias, and needs no kernel
of its own.
"""

from __future__ import annotations

from typing import NamedTuple, final

from torch import Tensor

from syncbn import moments
from syncbn.checks import inputs
from syncbn.moments import Running
from syncbn.waits.limits import shown


class RenormLimits(NamedTuple):
    """How far a batch may be corrected towards the running statistics.

    Source:
        Ioffe 2017 (arXiv 1702.03275), algorithm 1. The paper starts with (1, 0) and relaxes to (3, 5).
    """

    r_max: float = 1.0
    """At least 1. 1 does not correct the scale."""
    d_max: float = 0.0
    """At least 0. 0 does not correct the shift."""


RenormLimits.__module__ = "syncbn"
OFF = RenormLimits()


def checked(limits: tuple[float, float] | None, track_running_stats: bool) -> RenormLimits | None:
    """Returns checked limits, or None if there are none.

    Raises:
        TypeError: if they are no pair.
        ValueError: if a limit is no number or out of range, or the layer has no running statistics.
    """
    if limits is None:
        return None
    need = "renorm_limits needs a pair of numbers, r_max >= 1 and d_max >= 0, or None for batch normalization"
    if not isinstance(limits, (tuple, list)) or len(limits) != 2:
        raise TypeError(f"{need}; received {shown(limits)}. Pass syncbn.RenormLimits(3, 5), for example.")
    r_max, d_max = map(inputs.number, limits)
    if not (inputs.is_number(r_max) and inputs.is_number(d_max)):
        raise ValueError(f"{need}; received {shown(limits)}. Pass syncbn.RenormLimits(3, 5), for example.")
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(
            f"renorm_limits needs (r_max, d_max) with r_max >= 1 and d_max >= 0; received ({r_max:g}, {d_max:g}). "
            "(1, 0) is batch normalization; the paper relaxes it to (3, 5)."
        )
    if not track_running_stats:
        raise ValueError(
            "renorm_limits needs track_running_stats=True, since it corrects towards the running statistics; "
            "received False. Set it to True, or pass renorm_limits=None."
        )
    return RenormLimits(r_max, d_max)


def correction(
    wire: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, limits: RenormLimits
) -> tuple[Tensor, Tensor]:
    """Returns r and d, float64 (C,), for a batch and the running statistics before it.

    Args:
        wire: float64 (2C + 15,), summed over the ranks.
        running_mean: (C,), before this batch moves it.
        running_var: (C,), before this batch moves it.
        eps: added to both variances.
        limits: of r and d.
    """
    mean, _, invstd = moments.finalize(wire, eps)
    running_invstd = (running_var.double() + eps).rsqrt()
    r = (running_invstd / invstd).clamp(1.0 / limits.r_max, limits.r_max)
    d = ((mean - running_mean) * running_invstd).clamp(-limits.d_max, limits.d_max)
    return r, d


def corrected(r: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias, float64 (C,), that make batch normalization renormalize. Differentiable."""
    if weight is not None:
        weight = weight.double()  # its gradient, d * sum_grad_y + r * sum_grad_y_xhat, is then rounded only once
    shift = d if weight is None else d * weight
    return r if weight is None else r * weight, shift if bias is None else shift + bias.double()


@final
class Renormalize:
    """Adjusts weight and bias so that the layer does batch renormalization.

    Args:
        limits: of r and d.
    """

    def __init__(self, limits: RenormLimits) -> None:
        self.limits = limits

    def correction(self, wire: Tensor, running: Running | None, eps: float) -> tuple[Tensor, Tensor] | None:
        """Returns r and d, or None without running statistics, which is batch normalization."""
        return None if running is None else correction(wire, running.mean, running.var, eps, self.limits)

    def __call__(
        self, wire: Tensor, running: Running | None, eps: float, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns the weight and bias to normalise with."""
        found = self.correction(wire, running, eps)
        return (weight, bias) if found is None else corrected(*found, weight, bias)
