# SPDX-License-Identifier: BSD-3-Clause
"""What the four launches need and what depends on shape, strides, dtype and device of x alone. Computed once for each.

N batch, C channels, S product of the spatial dims.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.cuda import geometry
from syncbn.kernels.cuda.errors import DeferredErrors
from syncbn.kernels.cuda.geometry import Geometry
from syncbn.kernels.cuda.launch import AbstractLauncher
from syncbn.moments import DTYPES

NAMES = dict(zip(DTYPES, ("Float16", "BFloat16", "float", "double"), strict=True))
WIDTHS = {0: 16, 8: 8}
"""The access width by the last 4 bits of an address; 0 for all others, which are read one value at a time."""
REDUCTIONS = ("local_moments", "backward_sums")


class Kernel(NamedTuple):
    """One launch, without its addresses and numbers."""

    name: str
    """Step and template arguments, as the launcher compiles it."""
    grid: int
    block: tuple[int, int]
    shapes: tuple[tuple[int, ...], ...]
    """The fields of Shape in ``walk.cuh``, at index i for addresses of packs whose last 4 bits, or-ed, are i."""


class Prepared(NamedTuple):
    """The four launches for inputs of one kind, and what the calls around them ask for."""

    C: int
    per_channel: torch.Size
    """(C,)"""
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    empty: bool
    """Whether N * C * S == 0."""
    samples: float
    """N * S."""
    wire_length: int
    sums_length: int
    local_moments: Kernel
    normalize: Kernel
    backward_sums: Kernel
    backward_input: Kernel
    stats_blocks: int
    """How many blocks of normalize write the numbers per channel. They come before those of its grid."""
    groups: int
    """Groups of channels whose sums are added up by tickets."""
    partials: int
    """How many float64 the blocks of a sum leave for the last one; 0 if a group has one block."""
    errors: DeferredErrors | None
    """Where the device leaves errors; None if the host compares the calls."""


def prepare(x: Tensor, launcher: AbstractLauncher, threads: int, *, deferred: bool) -> Prepared | None:
    """Prepares the launches for inputs like x. None if x needs a copy, see ``geometry.plan``."""
    like = x.shape, x.stride(), x.element_size(), threads
    sums, elements = geometry.plan(*like, sums=True), geometry.plan(*like, sums=False)
    if sums is None or elements is None:
        return None
    C, empty, slow = sums.C, not x.numel(), launcher.slow_float64(x)
    shapes = {sums: _shapes(sums), elements: _shapes(elements)}

    def kernel(step: str, plan: Geometry) -> Kernel:
        grid = 0 if empty and step not in REDUCTIONS else plan.grid
        return Kernel(kernel_name(step, x.dtype, plan.layout, slow), grid, plan.block, shapes[plan])

    return Prepared(
        C=C,
        per_channel=torch.Size((C,)),
        shape=x.shape,
        strides=x.stride(),
        dtype=x.dtype,
        device=x.device,
        empty=empty,
        samples=float(sums.N * sums.S),
        wire_length=moments.wire_length(C),
        sums_length=moments.sums_length(C),
        local_moments=kernel("local_moments", sums),
        normalize=kernel("normalize", elements),
        backward_sums=kernel("backward_sums", sums),
        backward_input=kernel("backward_input", elements),
        stats_blocks=max(1, -(-C // (elements.block[0] * elements.block[1]))),
        groups=sums.groups,
        partials=2 * sums.blocks * C if sums.blocks > 1 else 0,
        errors=launcher.deferred_errors(x) if deferred else None,
    )


def _shapes(plan: Geometry) -> tuple[tuple[int, ...], ...]:
    """Returns ``Kernel.shapes``. The access width is the largest that divides all addresses of packs."""
    fields = plan.N, plan.C, plan.S, plan.groups, plan.blocks, plan.per_block
    return tuple((*fields, WIDTHS.get((bits | plan.unit) & 15, 0)) for bits in range(16))


@cache
def kernel_name(step: str, dtype: torch.dtype, layout: str, slow_float64: bool) -> str:
    """Returns the name of a template instance, as the launcher compiles it."""
    if step not in REDUCTIONS:
        return f"{step}<{NAMES[dtype]}, {layout}>"
    arithmetic = "Expansion" if slow_float64 and dtype != torch.float64 else "Float64"
    return f"{step}<{NAMES[dtype]}, {layout}, {arithmetic}>"
