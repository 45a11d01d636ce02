# SPDX-License-Identifier: BSD-3-Clause
"""Fills the report of `syncbn doctor`, step by step. Each problem comes with a remedy.

C channels, W ranks.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata

import numpy as np
import torch

import syncbn
from syncbn import kernels, transports
from syncbn.cli import latency, models, named_hosts, network
from syncbn.cli.channels import AbstractChannel, NameChannel, StoreChannel
from syncbn.cli.models import ModelReport
from syncbn.cli.network import Network
from syncbn.transports import AbstractTransport, gather, launchers, mpi_probe, parts, shared_memory
from syncbn.transports.choices import OVERRIDE, SRUN
from syncbn.transports.groups import NODE, GroupSpec
from syncbn.transports.launchers import Launch
from syncbn.transports.mpi_probe import MPIFacts
from syncbn.world import rendezvous

SEPARATOR = "\x1f"
BUILD = "build the model"
"""The step in which code of the user runs."""
INSTALL = 'pip install "syncbn[mpi]"'
FOREIGN = (("openmpi", "MPICH"), ("mpich", "Open MPI"))
"""Launchers and libraries of different MPIs: MPI_Init would abort, or make one job of each process."""


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
    node_latency_us: dict[str, float] = field(default_factory=dict)
    """The same for a group of one node, if the ranks are on several hosts, as many on each."""
    hosts: int = 1
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


def read_launch(report: Report) -> Launch:
    """Reads the launcher's variables. If they cannot be read, reports a problem and returns no launcher."""
    try:
        launch = launchers.detect()
    except (ValueError, KeyError) as error:
        remedy = "Unset the launcher's variables, or start with the launcher that sets them."
        report.complain(f"the environment cannot be read: {error}", remedy)
        launch = Launch("none", 0, 1, 0, speaks_mpi=False, evidence="")
    report.launcher, report.processes, report.evidence = launch.name, launch.size, launch.evidence
    return launch


def examine(report: Report, launch: Launch, factory: str = "", limit: float = 60.0) -> None:
    """Fills the report, on every rank. Never raises.

    Args:
        report: the report.
        launch: how this process was started.
        factory: ``package.module:function``, which builds the model to look at; empty for none.
        limit: seconds after which the caller gives up.

    Communication:
        On several hosts, see ``network.look``.
        If the processes connect: two exchanges of short texts, one all-reduce that is checked, and the timed ones; with
        a factory, one more exchange.
    """
    readable, began = not report.problems, time.monotonic()
    try:
        look_around(report, launch)
        ready = readable and _find_mpi(report, launch)
        left = max(1.0, 0.75 * (limit - (time.monotonic() - began)))  # so that it says who is missing
        ready = ready and _look_at_network(report, launch, left)
        transport = _connect(report, launch) if ready else None
        if transport is not None:
            _map_ranks(report, transport)
            try_all_reduce(report, transport)
            _share_problems(report, transport)
        if factory:
            _look_at_model(report, factory, transport)
    except Exception as error:
        remedy = "Do what the message says, then run the doctor again."
        report.complain(f"could not {report.step}: {type(error).__name__}: {error}", remedy)


def look_around(report: Report, launch: Launch) -> None:
    """Reports on this process: versions, kernels, GPUs."""
    report.step = "look at this process"
    report.versions = {
        "syncbn": syncbn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mpi4py": _version_of("mpi4py"),
    }
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        report.nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    host, gpus = socket.gethostname(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", launch.local_rank) if launch.local_rank < gpus else torch.device("cpu")
    if 0 < gpus <= launch.local_rank:
        remedy = "Start fewer processes a host, or call syncbn.init(device='cpu')."
        report.complain(f"host {host} has more processes than GPUs ({gpus})", remedy)
    on_cpu = device.type == "cpu"
    report.kernels, report.kernels_reason = kernels.explain() if on_cpu else kernels.explain_device()
    report.ranks = [Place(launch.rank, launch.local_rank, host, os.getpid(), str(device))]


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _find_mpi(report: Report, launch: Launch) -> bool:
    """Joins the MPI job if there is one, else examines MPI in another process. False if a job cannot use MPI."""
    report.step = "start MPI"
    if not launch.speaks_mpi:
        report.mpi = mpi_probe.beside() if launch.rank == 0 else MPIFacts()
        return True
    report.mpi = mpi_probe.identify()
    foreign = launch.size > 1 and (launch.name, report.mpi.name) in FOREIGN
    if not report.mpi.error and not foreign:
        report.mpi = mpi_probe.join()
    if launch.size in (1, report.mpi.size):
        return True
    if report.mpi.error:
        remedy = f"Install MPI for Python with: {INSTALL}, or make the site's MPI visible, as `module load` does."
        report.complain(f"{_started(launch)}, but MPI cannot be used: {report.mpi.error}", remedy)
        return False
    found = f"{report.mpi.name} {report.mpi.version}"
    joined = f"mpi4py loaded {found}" if foreign else f"{found} joined {report.mpi.size}"
    remedy = f"Start with the mpirun of {found}, or install the MPI of this mpirun, for example with: {INSTALL}."
    if launch.name == "slurm":
        remedy = f"Start with {SRUN}; or without MPI, by srun --mpi=none."
    report.complain(f"{_started(launch)}, but {joined} ({report.mpi.library})", remedy)
    return False


def _started(launch: Launch) -> str:
    return f"{launch.name} started {launch.size} processes ({launch.evidence})"


def _look_at_network(report: Report, launch: Launch, limit: float) -> bool:
    """Reports which addresses the hosts offer and who reaches whom. False if the processes cannot connect."""
    report.step = "connect the processes"
    if launch.local_size == launch.size:
        named = named_hosts.count() if launch.size > 1 else 0
        if named > 1:
            what = (
                f"all {launch.size} ranks are on host {socket.gethostname()}, of {named} hosts that the launcher knows"
            )
            remedy = "With Open MPI, map them by slots: --map-by slot:oversubscribe; see the slots of the hostfile."
            report.warnings.append(Problem(what, remedy))
        return True
    report.network = network.look(launch.rank, launch.size, None, limit, launch.name)
    channel = _channel(report, launch, limit)
    if channel is not None:
        report.network = network.look(launch.rank, launch.size, channel, limit, launch.name)
    report.warnings += [Problem(*each) for each in report.network.warnings]
    report.problems += [Problem(*each) for each in report.network.problems]
    return not report.network.problems


def _channel(report: Report, launch: Launch, limit: float) -> AbstractChannel | None:
    """Returns what connects the ranks already, or can connect them without their own addresses."""
    if not launch.speaks_mpi:
        place = f"rank 0 at {os.environ.get('MASTER_ADDR', 'its address')} port {os.environ.get('MASTER_PORT', '')}"
        return StoreChannel(rendezvous.meet(launch, timedelta(seconds=limit)), launch.rank, place.strip())
    if report.mpi.name != "Open MPI":
        return None
    from mpi4py import MPI

    return NameChannel(MPI, launch.rank)


def _connect(report: Report, launch: Launch) -> AbstractTransport | None:
    """Connects all processes, on the CPU, which does not depend on the GPUs that a rank sees."""
    report.step = "connect the processes"
    torch_distributed = True if os.environ.get(OVERRIDE) == "torch" else None
    world = syncbn.init(device="cpu", torch_distributed=torch_distributed)
    report.transport, report.reason, *_ = transports.explain()
    if world.size == launch.size:
        if world.size > 1:
            report.transport = world.transport.name
            report.reason += "; " + _of_shared_memory(world.transport)
        return world.transport
    what = f"NOT synchronised: {_started(launch)}, and the {report.transport} transport connects {world.size}"
    report.complain(what, f"Unset {OVERRIDE}, or use the launcher that goes with the transport.")
    return None


def _of_shared_memory(transport: AbstractTransport) -> str:
    if transport.name == "shm":
        return "the ranks share this host's memory"
    if transport.name == "torch":
        from syncbn.transports.nodes import NodesTransport

        if isinstance(transport, NodesTransport):
            return "shared memory inside each host, gloo between their first ranks"
    if os.environ.get(OVERRIDE, "auto") != "auto":
        return "shared memory is not asked for"
    return f"no shared memory: {shared_memory.problem() or 'not all ranks can open the same'}"


def _map_ranks(report: Report, transport: AbstractTransport) -> None:
    report.step = "gather the map of ranks"
    notes = gather.gather_notes(json.dumps(asdict(report.ranks[0])), transport)
    report.ranks = [Place(**json.loads(note)) for note in notes]


def try_all_reduce(report: Report, everyone: AbstractTransport) -> None:
    """Checks and times the transport for GPUs if every rank has one, else that for CPUs."""
    report.step = "sum over the ranks"
    transport, device = everyone, torch.device("cpu")
    if all(place.device.startswith("cuda") for place in report.ranks):
        device = torch.device(report.ranks[everyone.rank].device)
        report.transport, report.reason, *_ = transports.explain("cuda")
        transport = transports.choose(None, "cuda")
    right = latency.sums_are_right(transport, device)
    report.all_reduce = "right" if right else "wrong"
    if not right:
        remedy = f"Do not train on it. Try another: {OVERRIDE}={' or '.join(transports.CHOICES[1:])}."
        report.complain(f"an all-reduce of the {transport.name} transport returned a wrong sum", remedy)
    report.latency_us = latency.latencies(transport, everyone, device)
    sizes = parts.ranks_of_hosts(everyone)
    report.hosts = len(sizes)
    if len(sizes) > 1 and len(set(sizes)) == 1:
        report.step = "sum over the ranks of each host"
        node = transports.choose(GroupSpec(NODE, ()), device.type)
        report.node_latency_us = latency.latencies(node, everyone, device)


def _share_problems(report: Report, transport: AbstractTransport) -> None:
    """Collects the first problem of every rank on all ranks, so that all end with the same status."""
    report.step = "collect the problems"
    mine = SEPARATOR.join((report.problems[0].what, report.problems[0].remedy)) if report.problems else ""
    notes = dict.fromkeys(gather.gather_notes(mine, transport))
    report.problems = [Problem(*note.split(SEPARATOR, 1)) for note in notes if note]


def _look_at_model(report: Report, factory: str, transport: AbstractTransport | None) -> None:
    """Builds the model on every rank. All ranks that are connected find the same problems."""
    report.step = f"{BUILD} {factory}"
    report.model = models.look(factory, transport)
    for what, remedy in report.model.problems():
        report.complain(what, remedy)
