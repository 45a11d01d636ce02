# SPDX-License-Identifier: BSD-3-Clause
"""The CSV files of the study, and what follows from them: milliseconds a step, and where groups pay."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scale import wires
from benchmarks.scale.simulate import GATHERS, SUMS, gathers

Exchange = dict[tuple[str, int, str, str], dict[int, float]]
"""Microseconds by width, of (platform, ranks, message, algorithm)."""
Waiting = dict[tuple[str, int], dict[int, float]]
"""What waiting adds to a step, a fraction, by size of group, of (noise, ranks)."""

COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "syncbn, node by node": (("sum_nodes",), ("sum_nodes",)),
    "syncbn, recursive doubling": (("sum_doubling",), ("sum_doubling",)),
    "syncbn, best": (SUMS, SUMS),
    "torch, ring": (("gather_ring",), SUMS),
    "torch, best": (GATHERS, SUMS),
}
"""The algorithms of forward and backward; of several, the best for each message."""
OURS, TORCHS = "syncbn, best", "torch, best"
THRESHOLD = 0.05
"""Of a step: an exchange below it is called noise, and groups that save it pay."""


@dataclass(frozen=True)
class Check:
    """A shortcut of the study beside what it stands for."""

    shortcut: str
    platform: str
    ranks: int
    unit: str
    taken: float
    checked: float


@dataclass
class Results:
    """Everything that a run has found."""

    exchange: Exchange = field(default_factory=dict)
    waiting: Waiting = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """How the files were made: the lines on top of each."""

    def platforms(self) -> list[str]:
        """Returns the platforms, in the order of the file."""
        return list(dict.fromkeys(platform for platform, *_ in self.exchange))

    def ranks(self) -> list[int]:
        """Returns the numbers of ranks."""
        return sorted({ranks for _, ranks, *_ in self.exchange})

    def ms(self, platform: str, ranks: int, column: str) -> float:
        """Returns the milliseconds of a step's messages; a job of one rank sends none."""
        library = column.partition(",")[0]
        algorithms = dict(zip(("forward", "backward"), COLUMNS[column], strict=True))
        if ranks == 1:
            return 0.0
        return sum(self._of_message(platform, ranks, f"{library} {way}", names) for way, names in algorithms.items())

    def _of_message(self, platform: str, ranks: int, message: str, algorithms: Sequence[str]) -> float:
        names = (
            algorithms if len(algorithms) == 1 else [name for name in algorithms if name in (*SUMS, *gathers(ranks))]
        )
        rows = [self.exchange[platform, ranks, message, name] for name in names]
        return sum(layers * min(row[C] for row in rows) for C, layers in wires.widths().items()) / 1e3

    def saved(self, platform: str, noise: str, ranks: int, group: int, step_ms: float) -> float:
        """Returns the share of a step that groups save, in sending and in waiting."""
        sending = self.ms(platform, ranks, OURS) - self.ms(platform, group, OURS)
        return sending / step_ms + self.waiting[noise, ranks][ranks] - self.waiting[noise, ranks][group]

    def quiet_until(self, platform: str, step_ms: float) -> int:
        """Returns the most ranks up to which the exchange takes less than THRESHOLD of a step."""
        quiet = [n for n in self.ranks() if self.ms(platform, n, OURS) <= THRESHOLD * step_ms]
        loud = [n for n in self.ranks() if n not in quiet]
        return max((n for n in quiet if n < min(loud, default=2 * n)), default=1)

    def pays_from(self, platform: str, noise: str, group: int, step_ms: float) -> int | None:
        """Returns the number of ranks from which on groups save THRESHOLD of a step, or None."""
        larger = [n for n in self.ranks() if n > group]
        paying = [n for n in larger if self.saved(platform, noise, n, group, step_ms) >= THRESHOLD]
        return min((n for n in paying if all(m in paying for m in larger if m > n)), default=None)


def write(results: Results, folder: Path) -> None:
    """Writes exchange.csv, waiting.csv and checks.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    widths = list(wires.widths())
    exchange = [(*key, *(f"{row[C]:.3f}" for C in widths)) for key, row in results.exchange.items()]
    _write(folder / "exchange.csv", results.notes, ("platform", "ranks", "message", "algorithm", *widths), exchange)
    waiting = [(*key, group, f"{value:.5f}") for key, row in results.waiting.items() for group, value in row.items()]
    _write(folder / "waiting.csv", results.notes, ("noise", "ranks", "group", "added"), waiting)
    checks = [(c.shortcut, c.platform, c.ranks, c.unit, f"{c.taken:.4f}", f"{c.checked:.4f}") for c in results.checks]
    head = ("shortcut", "platform", "ranks", "unit", "taken", "checked")
    _write(folder / "checks.csv", results.notes, head, checks)


def read(folder: Path) -> Results:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: if a file is missing, or of another form.
    """
    results = Results()
    try:
        for row in _rows(folder / "exchange.csv", results.notes):
            key = row.pop("platform"), int(row.pop("ranks")), row.pop("message"), row.pop("algorithm")
            results.exchange[key] = {int(C): float(us) for C, us in row.items()}
        for row in _rows(folder / "waiting.csv"):
            by_group = results.waiting.setdefault((row["noise"], int(row["ranks"])), {})
            by_group[int(row["group"])] = float(row["added"])
        for row in _rows(folder / "checks.csv"):
            numbers = int(row["ranks"]), row["unit"], float(row["taken"]), float(row["checked"])
            results.checks.append(Check(row["shortcut"], row["platform"], *numbers))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"It needs exchange.csv, waiting.csv and checks.csv of python -m benchmarks.scale in {folder}; "
            f"received {error!r}. Run that command, or name its folder."
        ) from error
    return results


def _write(path: Path, notes: Iterable[str], head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {note}\n" for note in notes)
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _rows(path: Path, notes: list[str] | None = None) -> Iterator[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if notes is not None:
        notes.extend(line[2:] for line in lines if line.startswith("# "))
    yield from csv.DictReader(line for line in lines if not line.startswith("# "))


def added_at(waiting: Mapping[tuple[str, int], dict[int, float]], ranks: int) -> dict[str, dict[int, float]]:
    """Returns the rows of a number of ranks, by noise."""
    return {noise: row for (noise, n), row in waiting.items() if n == ranks}
