# SPDX-License-Identifier: BSD-3-Clause
"""What `syncbn test` found, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from tabulate import tabulate

from syncbn.cli import lines
from syncbn.cli.selftest.comparison import Row
from syncbn.cli.selftest.training import LAYERS, STEPS

START = """  torchrun --nproc-per-node 2 -m syncbn test
  mpirun -n 2 python -m mpi4py -m syncbn test"""
"""Lines that start several processes; without indent they would look like results."""


@dataclass
class Report:
    """A test of a job. It can be printed at any time."""

    launcher: str = "none"
    processes: int = 1
    transport: str = ""
    device: str = ""
    kernels: str = ""
    torch: str = ""
    local_batches: list[int] = field(default_factory=list)
    """Samples of each rank."""
    rows: list[Row] = field(default_factory=list)
    unsynchronised: float | None = None
    """By how much parameters would differ if layers used their local batches; None in one process."""
    not_tried: str = ""
    """Why DistributedDataParallel was not tried."""
    seconds: float = 0.0
    step: str = "connect the processes"
    """The last step begun."""
    problem: str = ""
    """Why the test could not be done."""

    @property
    def ok(self) -> bool:
        """Whether all that was compared is within its bound."""
        return not self.problem and bool(self.rows) and all(row.ok for row in self.rows)

    def to_json(self) -> str:
        """Renders everything as one document."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.rows]
        return json.dumps({**asdict(self), "steps": STEPS, "rows": rows, "ok": self.ok}, indent=2)

    def to_text(self) -> str:
        """Renders the report for a person."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Iterator[str]:
        if self.transport:
            yield lines.facts(list(self._facts()))
        if self.rows:
            columns = ["gradients averaged by", "what", "largest difference", "bound", "ok"]
            body = [
                [row.gradients, row.what, f"{row.difference:.1e}", f"{row.bound:.0e}", "yes" if row.ok else "NO"]
                for row in self.rows
            ]
            yield tabulate(body, columns, disable_numparse=True, colalign=("left", "left", "right", "right", "left"))
        yield "\n".join(self._verdict())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "job", f"{_processes(self.processes)}, launcher {self.launcher}"
        yield "uses", f"transport {self.transport}, device {self.device}, kernels {self.kernels}, torch {self.torch}"
        few, many = min(self.local_batches), max(self.local_batches)
        samples = f"{few}" if few == many else f"{few} to {many}"
        yield "did", f"{STEPS} steps of a network with {LAYERS} batch norms, local batches of {samples} samples"

    def _verdict(self) -> Iterator[str]:
        if self.problem:
            yield lines.wrapped(f"FAILED: {self.problem}")
            return
        if self.unsynchronised is not None:
            yield f"Without synchronisation parameters would differ by {self.unsynchronised:.1e}."
        if self.not_tried:
            yield lines.wrapped(f"DistributedDataParallel was not tried: {self.not_tried}.")
        took = f"in {self.seconds:.1f} s"
        if not self.ok:
            text = f"FAILED {took}: this job does not train as one process does. Run `syncbn doctor`, started in the "
            yield lines.wrapped(f"{text}same way; SYNCBN_TRANSPORT and SYNCBN_KERNELS name others to compare with.")
        elif self.processes == 1:
            yield lines.wrapped(
                f"Passed {took}, and nothing was synchronised: this is one process, whose layers compute what torch's "
                "compute. Start several:"
            )
            yield START
        else:
            yield f"Passed {took}: {_processes(self.processes)} train as one process does on the whole batch."


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number != 1)}"
