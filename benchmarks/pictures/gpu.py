# SPDX-License-Identifier: BSD-3-Clause
"""The run of docs/benchmarks.md on a GPU: torch's time over ours at 2 images, and the bandwidth of large shapes."""

from __future__ import annotations

from benchmarks.pictures import results
from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale, axes

COLOURS = {"float32": "blue", "bfloat16": "orange", "float16": "green"}
TARGETS = (3.0, 3.0, 1.5, 1.5)
"""Of the four groups of ratios, as docs/benchmarks.md has them."""
LEFT, RIGHT = 46, WIDTH - 16
TITLE = (
    "On one H200, SyncBatchNorm is 1.7 to 3.5 times as fast as torch.nn.SyncBatchNorm in eager mode at 2 images, and "
    "1.3 to 2.8 times in a CUDA graph; from 256 MB it has 86 to 92 % of a copy's bandwidth."
)


def draw(theme: str) -> Canvas:
    """Draws the ratios above the bandwidth."""
    document = results.read("gpu")
    canvas = Canvas(664, theme, TITLE)
    for k, (name, colour) in enumerate(COLOURS.items()):
        canvas.box(LEFT + 92 * k, 6, 11, 11, colour)
        canvas.text(LEFT + 92 * k + 16, 16, name, size=SMALL)
    for k, (mark, name) in enumerate(((canvas.dot, "contiguous"), (canvas.square, "channels_last"))):
        mark(LEFT + 6 + 116 * k, 34, 5, "gray")
        canvas.text(LEFT + 16 + 116 * k, 39, name, size=SMALL)
    _ratios(canvas, document["ratios"], 76, 320)
    _bandwidth(canvas, document["bandwidth"], 410, 620)
    return canvas


def _ratios(canvas: Canvas, groups: dict[str, list[tuple[str, str, float]]], top: float, bottom: float) -> None:
    canvas.text(2, top - 12, "time of torch.nn.SyncBatchNorm / ours, 2 images; bar: target", size=SMALL, colour="muted")
    y, width = Scale(0, 4, bottom, top), (RIGHT - LEFT) / len(groups)
    axes(canvas, (LEFT, RIGHT, bottom), (y, []), (y, [(k, f"{k}") for k in range(5)]))
    for i, ((name, found), target) in enumerate(zip(groups.items(), TARGETS, strict=True)):
        left = LEFT + i * width
        for j, (dtype, layout, ratio) in enumerate(found):
            mark = canvas.dot if layout == "contiguous" else canvas.square
            mark(left + 10 + (width - 20) * j / (len(found) - 1), y(ratio), 2.2, COLOURS[dtype])
        canvas.line([(left + 6, y(target)), (left + width - 6, y(target))], "ink", width=2)
        for line, words in enumerate(name.split(", ")):
            canvas.text(left + width / 2, bottom + 18 + 16 * line, words, size=SMALL, colour="muted", anchor="middle")


def _bandwidth(canvas: Canvas, found: list[tuple[float, float, str, str]], top: float, bottom: float) -> None:
    canvas.text(2, top - 12, "share of a copy's bandwidth, in a CUDA graph; bar: target", size=SMALL, colour="muted")
    x, y = Scale(30, 600, LEFT, RIGHT, log=True), Scale(0, 1, bottom, top)
    sizes = [(float(size), f"{size}") for size in (32, 64, 128, 256, 512)]
    axes(canvas, (LEFT, RIGHT, bottom), (x, sizes), (y, [(k / 5, f"{k / 5:g}") for k in range(6)]))
    canvas.line([(x(256), y(0.85)), (x(600), y(0.85))], "ink", width=2)
    for size, share, dtype, layout in found:
        mark = canvas.dot if layout == "contiguous" else canvas.square
        mark(x(size), y(share), 3.2, COLOURS[dtype])
    canvas.text((LEFT + RIGHT) / 2, bottom + 38, "megabytes of x", size=SMALL, colour="muted", anchor="middle")
