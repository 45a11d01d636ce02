# SPDX-License-Identifier: BSD-3-Clause
"""What batch norm makes of a small batch: eight numbers on four ranks, normalised by rank and over all."""

from __future__ import annotations

import torch

from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale
from syncbn import reference

RANKS, EACH = 4, 2
COLOURS = ("blue", "orange", "green", "gray")
TITLE = (
    "Eight numbers on four ranks. Normalised by each rank alone, every pair becomes -1 and +1; "
    "over all ranks, the distances between the eight stay."
)


def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the batch, and the outputs of batch norm by rank and over all ranks; the first two of rank 0."""
    x = torch.randn(RANKS * EACH, 1, generator=torch.Generator().manual_seed(282), dtype=torch.float64)

    def normalised(part: torch.Tensor) -> torch.Tensor:
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return reference.batch_norm(part, one, zero, zero.clone(), one.clone()).y

    local = torch.cat([normalised(part) for part in x.split(EACH)])
    return x[:, 0], local[:, 0], normalised(x)[:, 0]


def draw(theme: str) -> Canvas:
    """Draws three lines of numbers, from above: by rank, the batch, over all."""
    canvas = Canvas(282, theme, TITLE)
    left = 158
    scale = Scale(-2.4, 2.4, left, WIDTH - 14)
    x, local, together = numbers()
    rows = (
        (66, local, ("Each rank alone:", "torch's BatchNorm")),
        (146, x, ("The batch:", "one channel, two", "samples a rank")),
        (226, together, ("Over all ranks:", "SyncBatchNorm")),
    )
    for value in (-2, -1, 0, 1, 2):
        canvas.line([(scale(value), 42), (scale(value), 250)], "grid")
        canvas.text(scale(value), 270, f"{value}", size=SMALL, colour="muted", anchor="middle")
    for end in (rows[0], rows[2]):
        for i in range(len(x)):
            points = [(scale(float(row[1][i])), row[0]) for row in (rows[1], end)]
            canvas.line(points, COLOURS[i // EACH], width=1.2)
    for y, values, words in rows:
        canvas.line([(scale(-2.4), y), (scale(2.4), y)], "gray", width=1.5)
        for i, value in enumerate(values):
            if i // EACH % 2:
                canvas.square(scale(float(value)), y, 5, COLOURS[i // EACH])
            else:
                canvas.dot(scale(float(value)), y, 5.5, COLOURS[i // EACH])
        for line, text in enumerate(words):
            canvas.text(2, y + 18 * line - 9 * (len(words) - 2) - 4, text, bold=line == 0)
    for rank, colour in enumerate(COLOURS):
        at = left + 90 * rank
        (canvas.square if rank % 2 else canvas.dot)(at + 6, 13, 5.5, colour)
        canvas.text(at + 17, 18, f"rank {rank}", size=SMALL)
    return canvas
