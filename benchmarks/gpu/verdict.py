# SPDX-License-Identifier: BSD-3-Clause
"""Computes bandwidth, ratios to torch's times, and the targets of `python -m benchmarks.gpu`. Needs no GPU.

N batch, C channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.gpu.contenders import COPY, OURS, PARTNERS
from syncbn.cli.bench import report

Shape = tuple[int, ...]
TWO_IMAGES: frozenset[Shape] = frozenset(report.SHAPES[1:])
LARGE = 2**24
"""The least number of elements of a large shape: those of segmentation and of 32 images are large."""


@dataclass(frozen=True)
class Measured:
    """One step at one shape: microseconds and counts.

    ``graph_us`` is None where the step cannot be captured; the last three are None until the profiler has run.
    """

    shape: Shape
    dtype: str
    layout: str
    contender: str
    itemsize: int
    eager_us: float
    graph_us: float | None = None
    gpu_us: float | None = None
    launches: float | None = None
    host_waits: float | None = None

    @property
    def device_us(self) -> float | None:
        """The time of a step without the host: that of a replay with its gaps between launches, else the GPU time."""
        return self.gpu_us if self.graph_us is None else self.graph_us


@dataclass(frozen=True)
class Row:
    """A measurement and numbers derived from it. Ratios are torch's time over ours: 2 is twice as fast."""

    measured: Measured
    must_move: int
    gb_per_s: float | None
    of_copy: float | None
    eager_ratio: float | None
    graph_ratio: float | None
    gpu_ratio: float | None

    def as_dict(self) -> dict[str, object]:
        """Returns measurement and ratios as one flat dict."""
        derived = asdict(self)
        measured: dict[str, object] = derived.pop("measured")
        return measured | derived


@dataclass(frozen=True)
class Verdict:
    """One target: the number of its rows, how many of them miss it, and the worst row."""

    bar: str
    needed: str
    rows: int
    short: int
    worst: float | None
    median: float | None
    where: str

    @property
    def met(self) -> str:
        """Returns "met", "missed" or "not measured"."""
        return ("missed" if self.short else "met") if self.rows else "not measured"


def must_move(shape: Shape, itemsize: int, cache: int) -> int:
    """Returns a lower bound on the bytes moved per step, for B bytes in x and an L2 cache of L bytes.

    5 B + max(0, B - L) + max(0, 2 B - L)

    Forward reads x and writes y: 2 B. The sums need all of x before the first y, so the part of x that the cache does
    not hold is read twice. Backward reads grad_y and x and writes grad_x: 3 B, and reads twice what the cache does not
    hold of both. The bound assumes that the cache is empty at the start of each, as with other layers between, and then
    holds nothing else. Here steps run back to back, so a small shape may seem to beat it.
    """
    B = math.prod(shape) * itemsize
    return 5 * B + max(0, B - cache) + max(0, 2 * B - cache)


def derive(cell: Sequence[Measured], cache: int) -> list[Row]:
    """Returns the rows of one shape, dtype and layout.

    Args:
        cell: their measurements.
        cache: bytes of the L2 cache.
    """
    by_name = {m.contender: m for m in cell}
    copy = by_name.get(COPY)
    copied = None if copy is None else _rate(5 * math.prod(copy.shape) * copy.itemsize, copy.device_us)
    rows = []
    for m in cell:
        moved = must_move(m.shape, m.itemsize, 0 if m.contender == COPY else cache)
        moved = 5 * math.prod(m.shape) * m.itemsize if m.contender == COPY else moved
        rate = _rate(moved, m.device_us)
        share = None if rate is None or copied is None else rate / copied
        partner = by_name.get(PARTNERS.get(m.contender, ""))
        eager = None if partner is None else partner.eager_us / m.eager_us
        graph = None if partner is None else _ratio(partner.graph_us, m.graph_us, missing=0.0)
        gpu = None if partner is None else _ratio(partner.gpu_us, m.gpu_us, missing=None)
        rows.append(Row(m, moved, rate, share, eager, graph, gpu))
    return rows


def _rate(moved: int, us: float | None) -> float | None:
    return None if us is None else moved / us / 1e3


def _ratio(torchs: float | None, ours: float | None, missing: float | None) -> float | None:
    """Returns torch's time over ours; ``missing`` if only ours is missing, so that it does not count as a win."""
    if torchs is None:
        return None
    return missing if ours is None else torchs / ours


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Compares our synchronised rows with the targets. A row without the number does not count.

    Eager and graph: 2 images of a ResNet-50. Bandwidth: large shapes, ``of_copy``. GPU time and host waits: every row.
    """
    rows = [row for row in rows if row.measured.contender in OURS]
    two = [row for row in rows if row.measured.shape in TWO_IMAGES]
    large = [row for row in rows if math.prod(row.measured.shape) >= LARGE]
    return [
        _at_least(3.0, "2 images, eager: torch's / ours", two, lambda row: row.eager_ratio),
        _at_least(1.5, "2 images, graph replay: torch's / ours", two, lambda row: row.graph_ratio),
        _at_least(0.85, "large shapes: share of the copy's bandwidth", large, lambda row: row.of_copy),
        _at_least(1.0, "every row, GPU time: torch's / ours", rows, lambda row: row.gpu_ratio),
        _none("every row: host waits a step", rows, lambda row: row.measured.host_waits),
    ]


def _at_least(least: float, bar: str, rows: list[Row], number: Callable[[Row], float | None]) -> Verdict:
    found = sorted((value, _where(row)) for row in rows if (value := number(row)) is not None)
    short = sum(value < least for value, _ in found)
    return _verdict(bar, f">= {least:g}", found, short)


def _none(bar: str, rows: list[Row], number: Callable[[Row], float | None]) -> Verdict:
    found = sorted(((value, _where(row)) for row in rows if (value := number(row)) is not None), reverse=True)
    return _verdict(bar, "0", found, sum(value > 0 for value, _ in found))


def _verdict(bar: str, needed: str, found: list[tuple[float, str]], short: int) -> Verdict:
    if not found:
        return Verdict(bar, needed, 0, 0, None, None, "")
    median = statistics.median(value for value, _ in found)
    return Verdict(bar, needed, len(found), short, found[0][0], median, found[0][1])


def _where(row: Row) -> str:
    m = row.measured
    return f"{_name(m.shape)} {m.dtype} {m.layout}, {m.contender}"


def _name(shape: Shape) -> str:
    return ",".join(map(str, shape))
