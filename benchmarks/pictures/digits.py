# SPDX-License-Identifier: BSD-3-Clause
"""The curves of the demo, from what `examples/digits.py --json` prints."""

from __future__ import annotations

from benchmarks.pictures import results
from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale, axes

LOOKS = {
    "one process": ("band", 7.0, ""),
    "BatchNorm2d": ("orange", 2.2, ""),
    "SyncBatchNorm": ("blue", 2.2, "7 4"),
}
TITLE = (
    "Test accuracy over the steps of training: SyncBatchNorm follows the run in one process, BatchNorm2d does not. "
    "Below, the largest difference of a parameter to that run: about 1e-7 against 0.3."
)
LEFT, RIGHT = 52, WIDTH - 16


def draw(theme: str) -> Canvas:
    """Draws the accuracy above the difference to the run in one process."""
    document = results.read("digits")
    curves, steps = document["curves"], document["steps"]
    canvas = Canvas(462, theme, TITLE)
    names = [(name, LOOKS[name][0], room) for name, room in zip(LOOKS, (118, 122, 100), strict=True)]
    canvas.legend(LEFT, 14, names)
    x = Scale(0, steps, LEFT, RIGHT), [(step, f"{step}") for step in range(0, steps + 1, 100)]
    accuracy = Scale(0, 1, 216, 48)
    axes(canvas, (LEFT, RIGHT, 216), x, (accuracy, [(k / 5, f"{k / 5:g}") for k in range(6)]))
    canvas.text(2, 38, "test accuracy", size=SMALL, colour="muted")
    difference = Scale(1e-8, 1, 416, 276, log=True)
    axes(canvas, (LEFT, RIGHT, 416), x, (difference, [(10.0**k, f"1e{k}" if k else "1") for k in range(-8, 1, 2)]))
    canvas.text(2, 266, "largest difference of a parameter to the run in one process", size=SMALL, colour="muted")
    canvas.text((LEFT + RIGHT) / 2, 454, "step of SGD", size=SMALL, colour="muted", anchor="middle")
    for name, (colour, width, dash) in LOOKS.items():
        points = {int(step): value for step, value in curves[name]["accuracy"].items()}
        canvas.line([(x[0](s), accuracy(v)) for s, v in points.items()], colour, width=width, dash=dash)
        apart = {int(step): value for step, value in curves[name]["difference"].items() if value > 0}
        if apart:
            canvas.line([(x[0](s), difference(v)) for s, v in apart.items()], colour, width=2.2)
    canvas.text(x[0](150), difference(3e-2), "BatchNorm2d", colour="orange")
    canvas.text(x[0](150), difference(6e-6), "SyncBatchNorm: rounding", colour="blue")
    return canvas
