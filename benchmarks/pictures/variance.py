# SPDX-License-Identifier: BSD-3-Clause
"""The error of the variance against mean / std: sums in float32, torch's BatchNorm, and the layer's float64 sums."""

from __future__ import annotations

import functools

import torch

from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale, axes
from syncbn import kernels, moments

n, C = 512, 64
RATIOS = tuple(10 ** (k / 2) for k in range(0, 11))
"""Of mean to standard deviation."""
LINES = (("float32 sums", "gray"), ("torch.nn.BatchNorm1d", "orange"), ("SyncBatchNorm", "blue"))
TITLE = (
    "The relative error of the variance grows with (mean / std) squared where sums are float32, and reaches 1 at a "
    "mean of 5,000 standard deviations. Sums in float64 keep seven digits there."
)


@functools.cache
def errors() -> list[tuple[float, float, float]]:
    """Returns the median relative error of each line, for each ratio, as docs/concepts/numerics.md computes it."""
    noise = torch.randn(n, C, generator=torch.Generator().manual_seed(0))
    rows = []
    for ratio in RATIOS:
        x = noise + ratio
        wire = kernels.choose(x).local_moments(x, None, moments.ABSTAINS, moments.Status())
        layer = torch.nn.BatchNorm1d(C, momentum=1.0)
        layer(x)
        assert layer.running_var is not None
        variances = (
            (x * x).sum(0) / n - (x.sum(0) / n).square(),
            layer.running_var.double() * (n - 1) / n,
            moments.finalize(wire, 0.0)[1],
        )
        exact = x.double().var(0, unbiased=False)
        medians = [(var.double() / exact - 1).abs().median().item() for var in variances]
        rows.append((medians[0], medians[1], medians[2]))
    return rows


def draw(theme: str) -> Canvas:
    """Draws the three lines on logarithmic scales."""
    canvas = Canvas(352, theme, TITLE)
    left, top, right, bottom = 58, 36, WIDTH - 16, 298
    x, y = Scale(1, 1e5, left, right, log=True), Scale(1e-17, 1, bottom, top, log=True)
    powers = [(10.0**k, "1" if k == 0 else f"1e{k}") for k in range(-16, 1, 4)]
    axes(canvas, (left, right, bottom), (x, [(10.0**k, f"1e{k}" if k else "1") for k in range(6)]), (y, powers))
    for k, (_, colour) in enumerate(LINES):
        points = [(x(ratio), y(row[k])) for ratio, row in zip(RATIOS, errors(), strict=True)]
        canvas.line(points, colour, width=2.5)
        for point in points:
            canvas.dot(*point, 3, colour)
    canvas.text(2, 16, "relative error of the variance: 1 means that no digit is right", size=SMALL, colour="muted")
    canvas.text((left + right) / 2, 338, "mean / std of the data", size=SMALL, colour="muted", anchor="middle")
    canvas.text(x(3), y(1e-3), LINES[0][0])
    canvas.text(x(1.5), y(1.6e-8), f"{LINES[1][0]}, float32", colour="orange")
    canvas.text(x(60), y(1e-14), f"{LINES[2][0]}: float64 sums", colour="blue")
    return canvas
