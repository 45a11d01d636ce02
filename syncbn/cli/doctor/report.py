# SPDX-License-Identifier: BSD-3-Clause
"""What `syncbn doctor` found. ``probe.py`` fills it step by step, ``text.py`` prints it.

C channels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from syncbn.cli.doctor.checklist import Item
from syncbn.cli.doctor.models import ModelReport
from syncbn.cli.doctor.network import Network
from syncbn.cli.doctor.system import System
from syncbn.cli.doctor.verdict import Verdict
from syncbn.transports.mpi_probe import MPIFacts


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    local_rank: int
    host: str
    pid: int
    device: str
    cores: str = ""
    """The cores that it may use, as ranges; empty if they are unknown."""
    threads: int = 1
    """Threads of one operator of torch."""
    core_limit: float | None = None
    """Cores' worth of time that its container may use; None for no limit."""


@dataclass
class Report:
    """What was found. It can be printed after every step, even if the next step hangs."""

    versions: dict[str, str] = field(default_factory=dict)
    launcher: str = "none"
    processes: int = 1
    evidence: str = ""
    mpi: MPIFacts = field(default_factory=MPIFacts)
    nccl: str = ""
    kernels: str = ""
    kernels_reason: str = ""
    transport: str = "none"
    reason: str = "see the problems"
    ranks: list[Place] = field(default_factory=list)
    all_reduce: str = "not checked"
    """right, wrong or not checked."""
    latency_us: dict[str, float] = field(default_factory=dict)
    """Of one all-reduce of a wire, by C: the median on the slowest rank."""
    waiting: float | None = None
    """The part of the time of these all-reduces for which a rank waited for a core, on the worst rank."""
    verdict: Verdict = field(default_factory=Verdict)
    """Whether that is what this transport takes on this layout."""
    node_latency_us: dict[str, float] = field(default_factory=dict)
    """The same for a group of one node, if the ranks are on several hosts, as many on each."""
    hosts: int = 1
    checklist: list[Item] = field(default_factory=list)
    """What is there on rank 0's host, and what would bring the rest."""
    system: System = field(default_factory=System)
    """Rank 0's host."""
    variables: dict[str, str] = field(default_factory=dict)
    """Those of rank 0 that change what this job does."""
    model: ModelReport | None = None
    """Of the model that --model names."""
    network: Network = field(default_factory=Network)
    """Of a job on several hosts; else empty."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    """What need not be wrong, and what to do if it is. They leave the exit status as it is."""
    step: str = "start"
    """The last step begun."""

    def complain(self, what: str, remedy: str) -> None:
        """Adds a problem."""
        self.problems.append(Problem(what, remedy))

    def warn(self, what: str, remedy: str) -> None:
        """Adds a warning."""
        self.warnings.append(Problem(what, remedy))

    def to_json(self) -> str:
        """Renders everything as one document."""
        model = None if self.model is None else self.model.to_dict()
        return json.dumps({**asdict(self), "model": model}, indent=2)
