# SPDX-License-Identifier: BSD-3-Clause
"""Computes bandwidth, ratios to torch's times, and the targets of `python -m benchmarks.gpu`. Needs no GPU.

N batch, C channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.gpu.methods import COPY, OURS, PARTNERS
from syncbn.cli.bench import report

Shape = tuple[int, ...]
TWO_IMAGES: frozenset[Shape] = frozenset(report.SHAPES[1:])
MANY = 2**24
"""The least number of elements of a large shape: those of segmentation and of 32 images are large."""
LARGE = 256e6
"""The least number of bytes in x from which bandwidth is judged. For smaller ones must_move counts on an L2 cache
that keeps x, but the stores of y evict a part of it."""


@dataclass(frozen=True)
class Measured:
    """One method at one shape: microseconds of a step in each turn, and counts.

    ``graph_turns`` is empty where the step cannot be captured; the last three are None until the profiler has run.
    """

    shape: Shape
    dtype: str
    layout: str
    method: str
    itemsize: int
    eager_turns: tuple[float, ...]
    graph_turns: tuple[float, ...] = ()
    gpu_us: float | None = None
    launches: float | None = None
    host_waits: float | None = None

    @property
    def x_bytes(self) -> int:
        """The size of x."""
        return math.prod(self.shape) * self.itemsize

    @property
    def eager_us(self) -> float:
        """The median over the eager turns."""
        return statistics.median(self.eager_turns)

    @property
    def graph_us(self) -> float | None:
        """The median over the turns of replays."""
        return statistics.median(self.graph_turns) if self.graph_turns else None

    @property
    def device_us(self) -> float | None:
        """The time of a step without the host: that of a replay with its gaps between launches, else the GPU time.

        The copy's is the least of all its times: a memcpy node of a graph moves large tensors slower than a launch
        does (H200, 268 MB: 490 us against 316).
        """
        if self.method == COPY:
            return min(us for us in (self.eager_us, self.graph_us, self.gpu_us) if us is not None)
        return self.gpu_us if self.graph_us is None else self.graph_us


@dataclass(frozen=True)
class Row:
    """A measurement and numbers derived from it.

    Ratios are torch's time over ours: 2 is twice as fast. Those of turns are the median of the ratios of neighbouring
    turns.
    """

    measured: Measured
    must_move: int
    gb_per_s: float | None
    of_copy: float | None
    eager_ratio: float | None
    graph_ratio: float | None
    gpu_ratio: float | None

    def as_dict(self) -> dict[str, object]:
        """Returns measurement, medians and ratios as one flat dict."""
        derived = asdict(self)
        measured: dict[str, object] = derived.pop("measured")
        medians = {"eager_us": self.measured.eager_us, "graph_us": self.measured.graph_us}
        return measured | medians | derived


@dataclass(frozen=True)
class Target:
    """One target: the number of its rows, how many of them miss it, and the worst row. ``needed`` may be empty."""

    target: str
    needed: str
    rows: int
    short: int
    worst: float | None
    median: float | None
    where: str

    @property
    def result(self) -> str:
        """Returns "met", "missed", "not judged" or "not measured"."""
        if not self.rows:
            return "not measured"
        return "not judged" if not self.needed else "missed" if self.short else "met"


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


def derive(case: Sequence[Measured], cache: int) -> list[Row]:
    """Returns the rows of one shape, dtype and layout.

    Args:
        case: their measurements.
        cache: bytes of the L2 cache.
    """
    by_name = {m.method: m for m in case}
    copy = by_name.get(COPY)
    copied = None if copy is None else _rate(5 * copy.x_bytes, copy.device_us)
    rows = []
    for m in case:
        moved = 5 * m.x_bytes if m.method == COPY else must_move(m.shape, m.itemsize, cache)
        rate = _rate(moved, m.device_us)
        share = None if rate is None or copied is None else rate / copied
        partner = by_name.get(PARTNERS.get(m.method, ""))
        eager = None if partner is None else median_ratio(partner.eager_turns, m.eager_turns)
        graph = None if partner is None else _graph_ratio(partner.graph_turns, m.graph_turns)
        gpu = None if partner is None else _gpu_ratio(partner.gpu_us, m.gpu_us)
        rows.append(Row(m, moved, rate, share, eager, graph, gpu))
    return rows


def _rate(moved: int, us: float | None) -> float | None:
    return None if us is None else moved / us / 1e3


def median_ratio(torchs: Sequence[float], ours: Sequence[float]) -> float:
    """Returns the median ratio of turns that ran one after the other, so that a slow moment is in both times."""
    return statistics.median(a / b for a, b in zip(torchs, ours, strict=True))


def _graph_ratio(torchs: Sequence[float], ours: Sequence[float]) -> float | None:
    """Returns torch's time over ours; 0 if only ours could not be captured, so that it does not count as a win."""
    if not torchs:
        return None
    return median_ratio(torchs, ours) if ours else 0.0


def _gpu_ratio(torchs: float | None, ours: float | None) -> float | None:
    return None if torchs is None or ours is None else torchs / ours


def judge(rows: Iterable[Row]) -> list[Target]:
    """Compares our synchronised rows with the targets. A row without the number does not count.

    Eager and graph: 2 images of a ResNet-50. Bandwidth, ``of_copy``: x of LARGE bytes; smaller ones of MANY elements
    are reported. GPU time and host waits: every row.
    """
    rows = [row for row in rows if row.measured.method in OURS]
    two = [row for row in rows if row.measured.shape in TWO_IMAGES]
    large = [row for row in rows if row.measured.x_bytes >= LARGE]
    smaller = [row for row in rows if row.measured.x_bytes < LARGE and math.prod(row.measured.shape) >= MANY]
    return [
        _at_least(3.0, "2 images, eager: torch's / ours", two, lambda row: row.eager_ratio),
        _at_least(1.5, "2 images, graph replay: torch's / ours", two, lambda row: row.graph_ratio),
        _at_least(0.85, "x of 256 MB: share of the copy's bandwidth", large, lambda row: row.of_copy),
        _at_least(None, "smaller large shapes: share of the copy's bandwidth", smaller, lambda row: row.of_copy),
        _at_least(1.0, "every row, GPU time: torch's / ours", rows, lambda row: row.gpu_ratio),
        _none("every row: host waits a step", rows, lambda row: row.measured.host_waits),
    ]


def _at_least(least: float | None, target: str, rows: list[Row], number: Callable[[Row], float | None]) -> Target:
    found = sorted((value, _where(row)) for row in rows if (value := number(row)) is not None)
    if least is None:
        return _target(target, "", found, 0)
    return _target(target, f">= {least:g}", found, sum(value < least for value, _ in found))


def _none(target: str, rows: list[Row], number: Callable[[Row], float | None]) -> Target:
    found = sorted(((value, _where(row)) for row in rows if (value := number(row)) is not None), reverse=True)
    return _target(target, "0", found, sum(value > 0 for value, _ in found))


def _target(target: str, needed: str, found: list[tuple[float, str]], short: int) -> Target:
    if not found:
        return Target(target, needed, 0, 0, None, None, "")
    median = statistics.median(value for value, _ in found)
    return Target(target, needed, len(found), short, found[0][0], median, found[0][1])


def _where(row: Row) -> str:
    m = row.measured
    return f"{_name(m.shape)} {m.dtype} {m.layout}, {m.method}"


def _name(shape: Shape) -> str:
    return ",".join(map(str, shape))
