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
from dataclasses import asdict

import numpy as np
import torch

import syncbn
from syncbn import kernels, transports
from syncbn.cli.doctor import checklist, connecting, cores, latency, models, system, verdict
from syncbn.cli.doctor.report import Place, Problem, Report
from syncbn.transports import AbstractTransport, gather, launchers, parts
from syncbn.transports.choices import OVERRIDE
from syncbn.transports.groups import NODE, GroupSpec
from syncbn.transports.launchers import Launch
from syncbn.waits.ranks import ranks_of

SEPARATOR = "\x1f"
BUILD = "build the model"
"""The step in which code of the user runs."""


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
        ready = readable and connecting.find_mpi(report, launch)
        if launch.rank == 0:
            report.step = "list what is there"
            report.checklist = checklist.checklist(report.mpi)
        left = max(1.0, 0.75 * (limit - (time.monotonic() - began)))  # so that it says who is missing
        ready = ready and connecting.look_at_network(report, launch, left)
        transport = connecting.connect(report, launch) if ready else None
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
    """Reports on this process: versions, system, kernels, GPUs."""
    report.step = "look at this process"
    report.versions = {
        "syncbn": syncbn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "mpi4py": checklist.version_of("mpi4py"),
    }
    report.system, report.variables = system.look(), system.variables()
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        report.nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    host, gpus = socket.gethostname(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", launch.local_rank) if launch.local_rank < gpus else torch.device("cpu")
    if 0 < gpus <= launch.local_rank:
        remedy = "Start fewer processes a host, or call syncbn.init(device='cpu')."
        report.complain(f"host {host} has more processes than GPUs ({gpus})", remedy)
    on_cpu = device.type == "cpu"
    report.kernels, report.kernels_reason = kernels.explain() if on_cpu else kernels.explain_device()
    own, (threads, limit) = ranks_of(system.own_cores()), (report.system.threads, report.system.core_limit)
    report.ranks = [Place(launch.rank, launch.local_rank, host, os.getpid(), str(device), own, threads, limit)]


def _map_ranks(report: Report, transport: AbstractTransport) -> None:
    report.step = "gather the map of ranks"
    notes = gather.gather_notes(json.dumps(asdict(report.ranks[0])), transport)
    report.ranks = [Place(**json.loads(note)) for note in notes]


def try_all_reduce(report: Report, everyone: AbstractTransport) -> None:
    """Checks, times and judges the transport for GPUs if every rank has one, else that for CPUs."""
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
    report.latency_us, report.waiting = latency.measure(transport, everyone, device)
    sizes = parts.ranks_of_hosts(everyone)
    report.hosts = len(sizes)
    if len(sizes) > 1 and len(set(sizes)) == 1:
        report.step = "sum over the ranks of each host"
        node = transports.choose(GroupSpec(NODE, ()), device.type)
        report.node_latency_us = latency.measure(node, everyone, device).median_us
    _judge(report, transport, device.type)


def _judge(report: Report, transport: AbstractTransport, device: str) -> None:
    threads = cores.too_many_threads(report.ranks)
    layout = verdict.Layout(
        transport.name,
        device,
        transport.size,
        report.hosts,
        cores.crowded(report.ranks),
        threads,
        report.waiting,
        report.network.delay_us,
        connecting.why_not_shared(transport),
    )
    report.verdict = verdict.judge(report.latency_us[str(latency.CHANNELS[0])], layout)
    if report.verdict.warning:
        report.warn(*report.verdict.warning)
    elif threads:
        remedy = "Set OMP_NUM_THREADS to cores / processes of a host: torchrun and the files of launch/ set 1."
        report.warn(f"{threads}: they take turns, and a step takes longer than with one thread a core", remedy)
    if report.verdict.problem:
        report.complain(*report.verdict.problem)


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
