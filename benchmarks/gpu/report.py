# SPDX-License-Identifier: BSD-3-Clause
"""The output of `python -m benchmarks.gpu`: two tables or one JSON document, complete even if the run ended early."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tabulate import tabulate

from benchmarks.gpu.verdict import Row, Verdict, judge

COLUMNS = (
    *("N,C,spatial", "dtype", "layout", "contender", "eager us", "graph us", "GPU us", "launches", "waits"),
    *("GB/s", "of copy", "eager x", "graph x", "GPU x"),
)


@dataclass
class Report:
    """The state of a run: the machine, what was planned, measured and left out."""

    machine: dict[str, str]
    planned: int
    rows: list[Row] = field(default_factory=list)
    timed: int = 0
    profiled: int = 0
    left_out: list[str] = field(default_factory=list)
    ended: str = ""

    @property
    def note(self) -> str:
        """How much of the plan was measured, and what was left out."""
        said = f"{self.timed} of {self.planned} shapes, dtypes and layouts timed, {self.profiled} profiled"
        return "\n".join(
            [f"{said}{'; ' if self.ended else ''}{self.ended}.", *map("Left out: {}".format, self.left_out)]
        )

    def as_json(self) -> str:
        """Renders everything as one document."""
        document = {
            "machine": self.machine,
            "planned": self.planned,
            "timed": self.timed,
            "profiled": self.profiled,
            "ended": self.ended,
            "left_out": self.left_out,
            "rows": [row.as_dict() for row in self.rows],
            "bars": [asdict(verdict) | {"verdict": verdict.met} for verdict in judge(self.rows)],
        }
        return json.dumps(document, indent=1)

    def as_tables(self) -> str:
        """Renders the rows, the targets and the note."""
        rows = tabulate([_cells(row) for row in self.rows], COLUMNS, disable_numparse=True, colalign=_aligned(4, 10))
        return "\n\n".join((rows, verdict_table(judge(self.rows)), self.note))

    def write(self, path: str) -> None:
        """Writes the JSON document atomically, so that a reader, also after a kill, gets a complete one."""
        part = Path(f"{path}.part")
        part.write_text(self.as_json() + "\n", encoding="utf-8")
        os.replace(part, path)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Renders the targets."""
    headers = ("bar", "verdict", "needed", "worst", "median", "rows", "short", "worst at")
    cells = [
        (v.bar, v.met, v.needed, _number(v.worst, 2), _number(v.median, 2), str(v.rows), str(v.short), v.where)
        for v in verdicts
    ]
    return tabulate(cells, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 5, "left"))


def _cells(row: Row) -> tuple[str, ...]:
    m = row.measured
    return (
        *(",".join(map(str, m.shape)), m.dtype, m.layout, m.contender),
        *(_number(us, 1) for us in (m.eager_us, m.graph_us, m.gpu_us)),
        *(_number(count, 0) for count in (m.launches, m.host_waits)),
        _number(row.gb_per_s, 0),
        *(_number(ratio, 2) for ratio in (row.of_copy, row.eager_ratio, row.graph_ratio, row.gpu_ratio)),
    )


def _aligned(left: int, right: int) -> tuple[str, ...]:
    return (*["left"] * left, *["right"] * right)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
