# SPDX-License-Identifier: BSD-3-Clause
"""The layer by shape, layout and launcher, from what `syncbn bench --json` prints."""

from __future__ import annotations

from typing import Any

from benchmarks.pictures import results
from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale

LAUNCHERS = ("mpirun", "torchrun")
LAYOUTS = {"contiguous": ("", "blue"), "channels_last": ("-channels_last", "pale")}
LEFT, GAP, TOP, ROW = 96, 14, 66, 28
STEPS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e3)


def of_torch(theme: str) -> Canvas:
    """Draws the layer's time over that of torch.nn.BatchNorm2d, which does not synchronise."""
    title = (
        "The time of a forward and backward of SyncBatchNorm over that of torch.nn.BatchNorm2d on 2 processes, "
        f"geometric means {_means('torch_ratio')}."
    )
    return _draw(theme, title, "torch_ratio", "time of SyncBatchNorm / time of torch.nn.BatchNorm2d")


def of_baseline(theme: str) -> Canvas:
    """Draws the time of the usual baseline over the layer's."""
    title = (
        "How many times faster SyncBatchNorm is than synchronised batch norm from torch operators over gloo, "
        f"geometric means {_means('baseline_ratio')}."
    )
    words = "time of torch operators over gloo / time of SyncBatchNorm"
    return _draw(theme, title, "baseline_ratio", words)


def _documents() -> dict[tuple[str, str], Any]:
    return {
        (launcher, layout): results.read(f"bench-{launcher}{suffix}")
        for launcher in LAUNCHERS
        for layout, (suffix, _) in LAYOUTS.items()
    }


def _means(ratio: str) -> str:
    found = {key: document["geometric_mean"][ratio] for key, document in _documents().items()}
    return ", ".join(f"{mean:.2f} ({launcher}, {layout})" for (launcher, layout), mean in found.items())


def _draw(theme: str, title: str, ratio: str, words: str) -> Canvas:
    documents = _documents()
    shapes = [tuple(row["shape"]) for row in documents[LAUNCHERS[0], "contiguous"]["rows"]]
    most = max(row[ratio] for document in documents.values() for row in document["rows"])
    step = next(step for step in STEPS if most <= 3.1 * step)
    ticks = [k * step for k in range(4) if k * step <= max(most, 1.0)]
    rows = [*shapes, None]  # the last one: geometric means
    bottom = TOP + ROW * len(rows) + 6
    canvas = Canvas(bottom + 28, theme, title)
    canvas.text(2, 16, words, size=SMALL, colour="muted")
    canvas.legend(LEFT, 40, [(name, colour, 104) for name, (_, colour) in LAYOUTS.items()])
    width = (WIDTH - LEFT - GAP - 2) / 2
    for k, launcher in enumerate(LAUNCHERS):
        left = LEFT + k * (width + GAP)
        x = Scale(0, max(most, 1.0), left, left + width - 30)
        canvas.text(left, 60, launcher, bold=True)
        for tick in ticks:
            canvas.line([(x(tick), TOP), (x(tick), bottom)], "ink" if tick == 1.0 else "grid")
            canvas.text(x(tick), bottom + 18, f"{tick:g}", size=SMALL, colour="muted", anchor="middle")
        for i, shape in enumerate(rows):
            top = TOP + ROW * i + 4 + (4 if shape is None else 0)
            for j, (layout, (_, colour)) in enumerate(LAYOUTS.items()):
                document = documents[launcher, layout]
                found = {tuple(row["shape"]): row[ratio] for row in document["rows"]}
                value = document["geometric_mean"][ratio] if shape is None else found[shape]
                canvas.box(left, top + 11 * j, max(x(value) - left, 0.5), 10, colour)
                if shape is None:
                    canvas.text(x(value) + 4, top + 11 * j + 10, f"{value:.2f}", size=12, bold=True)
            if k == 0:
                name = "mean" if shape is None else ",".join(map(str, shape))
                canvas.text(LEFT - 8, top + 15, name, size=SMALL, anchor="end", bold=shape is None)
    return canvas
