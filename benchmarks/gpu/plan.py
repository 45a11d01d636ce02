# SPDX-License-Identifier: BSD-3-Clause
"""What `python -m benchmarks.gpu` measures, and in which order.

N batch, C channels, S product of the spatial dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.methods import METHODS
from benchmarks.gpu.targets import MANY, TWO_IMAGES, Shape
from benchmarks.gpu.timing import TURN
from syncbn.cli.bench import report

EAGER_TURN = 0.02
"""Seconds of an eager turn at 2 images, where the host sets the time, which is noisy."""
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "channels_last")
SHAPES: tuple[Shape, ...] = (
    *report.SHAPES[1:],
    *[(N, C, 512, 512) for N in (1, 2) for C in (64, 128, 256)],
    (32, 256, 56, 56),
    (32, 64, 112, 112),
    (64, 2048),
)


@dataclass(frozen=True)
class Options:
    """What to measure. ``repeats`` is the number of turns of each step; the median counts."""

    shapes: Sequence[Shape] = SHAPES
    dtypes: Sequence[str] = DTYPES
    layouts: Sequence[str] = LAYOUTS
    repeats: int = 7
    time_limit: float = math.inf
    output: str | None = None


@dataclass(frozen=True)
class Case:
    """One case: the shape, dtype and layout of steps that take turns."""

    shape: Shape
    dtype: str
    layout: str

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Makes an input and a gradient, from a generator that no CUDA graph uses."""
        generator = torch.Generator("cuda").manual_seed(0)
        layout = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        dtype: torch.dtype = getattr(torch, self.dtype)
        x, grad_y = (
            torch.randn(self.shape, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
            for _ in range(2)
        )
        return x.requires_grad_(), grad_y


def plan(options: Options) -> list[Case]:
    """Returns the cases, the most important first: in each dtype 2 images and then large shapes; at last the rest."""

    def rank(case: Case) -> int:
        if case.shape not in TWO_IMAGES and math.prod(case.shape) < MANY:
            return 2 * len(DTYPES)
        return (case.shape not in TWO_IMAGES) + 2 * DTYPES.index(case.dtype)

    cases = [Case(s, d, each) for d in options.dtypes for each in options.layouts for s in options.shapes]
    return sorted((c for c in cases if len(c.shape) == 4 or c.layout == "contiguous"), key=rank)


def eager_turn(case: Case) -> float:
    """Returns the seconds of an eager turn."""
    return EAGER_TURN if case.shape in TWO_IMAGES else TURN


def seconds_of_turns(cases: Sequence[Case], repeats: int) -> float:
    """Returns how long the turns of all cases take at least, eager and replayed. A turn has at most 500 steps."""
    return len(METHODS) * repeats * sum(eager_turn(case) + TURN for case in cases)
