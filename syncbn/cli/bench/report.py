# SPDX-License-Identifier: BSD-3-Clause
"""Shapes, options and rows of `syncbn bench`, and their output as table, CSV or JSON.

N batch, C channels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tabulate import tabulate

Shape = tuple[int, int, int, int]

# The first is the smallest case of interest; the others are the distinct inputs of the 53 batch norms of a
# ResNet-50 (stride on the 3x3 convolution) for 2 images of 224 x 224.
SHAPES: tuple[Shape, ...] = (
    (2, 64, 8, 8),
    (2, 64, 112, 112),
    (2, 64, 56, 56),
    (2, 128, 56, 56),
    (2, 256, 56, 56),
    (2, 128, 28, 28),
    (2, 256, 28, 28),
    (2, 512, 28, 28),
    (2, 256, 14, 14),
    (2, 512, 14, 14),
    (2, 1024, 14, 14),
    (2, 512, 7, 7),
    (2, 2048, 7, 7),
)
DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Options:
    """What to measure. ``shapes`` are those of local batches."""

    shapes: tuple[Shape, ...] = SHAPES
    dtype: str = "float32"
    channels_last: bool = False
    repeats: int = 30
    warmup: int = 5
    baseline: bool = True


@dataclass(frozen=True)
class Machine:
    """The machine and the versions."""

    cpu: str
    cores: int
    processes: int
    threads: int
    torch: str
    syncbn: str
    transport: str
    kernels: str
    malloc: str


@dataclass(frozen=True)
class Row:
    """Medians of one shape in microseconds: torch's layer, ours, the baseline."""

    shape: Shape
    torch_us: float
    syncbn_us: float
    baseline_us: float | None = None
    node_us: float | None = None
    """Ours with group_size="node", if the ranks are on several hosts, as many on each."""

    @property
    def baseline_ratio(self) -> float | None:
        """The time of the baseline over ours."""
        return None if self.baseline_us is None else self.baseline_us / self.syncbn_us

    @property
    def torch_ratio(self) -> float:
        """Our time over that of torch's unsynchronised layer."""
        return self.syncbn_us / self.torch_us


def geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """Returns the geometric mean, or None if a ratio is missing."""
    found = [ratio for ratio in ratios if ratio is not None]
    return math.exp(statistics.fmean(map(math.log, found))) if found and len(found) == len(ratios) else None


def render(rows: Sequence[Row], options: Options, machine: Machine, *, form: str) -> str:
    """Renders the rows as "table", "csv" or "json"."""
    if form == "json":
        return as_json(rows, options, machine)
    return as_csv(rows) if form == "csv" else f"{as_table(rows)}\n\n{explanation(rows)}"


def as_table(rows: Sequence[Row]) -> str:
    """Renders the rows, with the geometric means of the ratios below; a column for one node on several hosts."""
    node = ["node us"] if _has_node(rows) else []
    headers = ["N,C,H,W", "torch us", "syncbn us", *node, "baseline us", "baseline / syncbn", "syncbn / torch"]
    body = [
        [",".join(map(str, row.shape))]
        + [_number(us, 0) for us in (row.torch_us, row.syncbn_us, *([row.node_us] if node else []), row.baseline_us)]
        + [_number(ratio, 2) for ratio in (row.baseline_ratio, row.torch_ratio)]
        for row in rows
    ]
    means = [_number(mean, 2) for mean in _means(rows).values()]
    return tabulate(
        [*body, ["geometric mean", *[""] * len(headers[1:-2]), *means]],
        headers,
        disable_numparse=True,
        colalign=("left", *["right"] * len(headers[1:])),
    )


def explanation(rows: Sequence[Row]) -> str:
    """Says what the columns of ``as_table`` mean, a line for each ratio."""
    lines = ["us: microseconds of a forward and backward on the slowest rank, the median over rounds."]
    if any(row.baseline_us is not None for row in rows):
        lines.append(
            "baseline / syncbn: above 1, syncbn is faster than synchronised batch norm from torch operators over gloo."
        )
    lines.append("syncbn / torch: below 1, syncbn is faster than torch.nn.BatchNorm2d, which does not synchronise.")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """Renders the rows as comma-separated values; the field is empty without the baseline."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    node = _has_node(rows)
    writer.writerow(["N", "C", "H", "W", "torch_us", "syncbn_us", "baseline_us", *["node_us"] * node])
    for row in rows:
        writer.writerow([*row.shape, row.torch_us, row.syncbn_us, row.baseline_us, *[row.node_us] * node])
    return text.getvalue().rstrip("\n")


def as_json(rows: Sequence[Row], options: Options, machine: Machine) -> str:
    """Renders everything as one JSON document."""
    described = [asdict(r) | {"baseline_ratio": r.baseline_ratio, "torch_ratio": r.torch_ratio} for r in rows]
    document = {"machine": asdict(machine), "options": asdict(options), "rows": described}
    return json.dumps(document | {"geometric_mean": _means(rows)}, indent=2)


def _has_node(rows: Sequence[Row]) -> bool:
    return any(row.node_us is not None for row in rows)


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    return {
        "baseline_ratio": geometric_mean([row.baseline_ratio for row in rows]),
        "torch_ratio": geometric_mean([row.torch_ratio for row in rows]),
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
