# SPDX-License-Identifier: BSD-3-Clause
"""What a training step of the layer sends: shapes and bytes on three ranks with 2, 1 and 0 images."""

from __future__ import annotations

import math

from benchmarks.pictures.svg import SMALL, WIDTH, Canvas
from syncbn import moments

SHAPES = ((2, 64, 56, 56), (1, 64, 56, 56), (0, 64, 56, 56))
FLOAT32, FLOAT64 = 4, 8
C = SHAPES[0][1]
LANE, GAP = 162, 16
TITLE = (
    f"Forward: every rank sums its local batch, one all-reduce adds {moments.wire_length(C)} float64 values over the "
    f"ranks, every rank normalises. Backward: the same with {moments.sums_length(C)} values."
)


def draw(theme: str) -> Canvas:
    """Draws forward above backward, a lane for each rank."""
    canvas = Canvas(562, theme, TITLE)
    for rank, shape in enumerate(SHAPES):
        images = {0: "no image", 1: "1 image"}.get(shape[0], f"{shape[0]} images")
        canvas.text(_left(rank) + LANE / 2, 16, f"rank {rank}: {images}", anchor="middle", bold=True)
    _pass(canvas, 28, "Forward", ("x", "local_moments", "normalize", "y"), moments.wire_length(C))
    names = ("grad_y, x", "backward_sums", "backward_input", "grad_x")
    _pass(canvas, 306, "Backward", names, moments.sums_length(C))
    return canvas


def _left(rank: int) -> float:
    return 1 + rank * (LANE + GAP)


def _pass(canvas: Canvas, top: float, title: str, names: tuple[str, ...], values: int) -> None:
    """Draws one direction: a box of input, the step, the wire, the all-reduce, the step, a box of output."""
    first, before, after, last = names
    for rank, shape in enumerate(SHAPES):
        left, lane = _left(rank), _left(rank) + 18
        _tensor(canvas, left, top, first, shape)
        canvas.arrow(lane, top + 44, lane, top + 92)
        canvas.text(lane + 10, top + 63, before, size=SMALL, colour="muted")
        canvas.text(lane + 10, top + 80, f"{values * FLOAT64:,} bytes", size=SMALL, colour="blue", bold=True)
        canvas.arrow(lane, top + 144, lane, top + 182)
        canvas.text(lane + 10, top + 167, after, size=SMALL, colour="muted")
        _tensor(canvas, left, top + 184, last, shape)
    canvas.box(1, top + 94, WIDTH - 2, 48, "blue", round_=5)
    words = f"{title}: all_reduce adds {values} float64 over all ranks"
    canvas.text(WIDTH / 2, top + 114, words, colour="on_blue", anchor="middle", bold=True)
    more = f"2C + {values - 2 * C} values, C = {C}: as many from every rank, for any batch"
    canvas.text(WIDTH / 2, top + 132, more, colour="on_blue", anchor="middle", size=SMALL)


def _tensor(canvas: Canvas, left: float, top: float, name: str, shape: tuple[int, ...]) -> None:
    canvas.box(left, top, LANE, 42, "fill", edge="gray", round_=4)
    size = math.prod(shape) * FLOAT32 * (1 + name.count(", "))
    text = f"{size / 1e6:.1f} MB" if size else "0 bytes"
    canvas.text(left + LANE / 2, top + 17, f"{name}: {text}", anchor="middle", size=SMALL, bold=True)
    canvas.text(left + LANE / 2, top + 34, f"({', '.join(map(str, shape))})", anchor="middle", size=SMALL)
