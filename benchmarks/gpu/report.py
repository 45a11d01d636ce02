# SPDX-License-Identifier: BSD-3-Clause
"""The output of `python -m benchmarks.gpu`: two tables or one JSON document, complete even if the run ended early."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tabulate import tabulate

from benchmarks.gpu.targets import Row, Target, judge

COLUMNS = (
    *("N,C,spatial", "dtype", "layout", "method", "eager us", "graph us", "GPU us", "launches", "waits"),
    *("GB/s", "of copy", "eager x", "graph x", "GPU x"),
)


@dataclass
class Report:
    """The state of a run: the machine, what was planned, measured and left out."""

    machine: dict[str, str]
    planned: int
    turns_s: float = 0.0
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
            "turns_s": self.turns_s,
            "timed": self.timed,
            "profiled": self.profiled,
            "ended": self.ended,
            "left_out": self.left_out,
            "rows": [row.as_dict() for row in self.rows],
            "targets": [asdict(target) | {"result": target.result} for target in judge(self.rows)],
        }
        return json.dumps(document, indent=1)

    def as_tables(self) -> str:
        """Renders the rows, the targets and the note."""
        rows = tabulate([_fields(row) for row in self.rows], COLUMNS, disable_numparse=True, colalign=_aligned(4, 10))
        return "\n\n".join((rows, target_table(judge(self.rows)), self.note))

    def write(self, path: str) -> None:
        """Writes the JSON document atomically, so that a reader, also after a kill, gets a complete one."""
        part = Path(f"{path}.part")
        part.write_text(self.as_json() + "\n", encoding="utf-8")
        os.replace(part, path)


def target_table(targets: Sequence[Target]) -> str:
    """Renders the targets."""
    headers = ("target", "result", "needed", "worst", "median", "rows", "short", "worst at")
    rows = [
        (t.target, t.result, t.needed, _number(t.worst, 2), _number(t.median, 2), str(t.rows), str(t.short), t.where)
        for t in targets
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 5, "left"))


def _fields(row: Row) -> tuple[str, ...]:
    m = row.measured
    return (
        *(",".join(map(str, m.shape)), m.dtype, m.layout, m.method),
        *(_number(us, 1) for us in (m.eager_us, m.graph_us, m.gpu_us)),
        *(_number(count, 0) for count in (m.launches, m.host_waits)),
        _number(row.gb_per_s, 0),
        *(_number(ratio, 2) for ratio in (row.of_copy, row.eager_ratio, row.graph_ratio, row.gpu_ratio)),
    )


def _aligned(left: int, right: int) -> tuple[str, ...]:
    return (*["left"] * left, *["right"] * right)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
