# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn doctor`: prints on rank 0 what ``probe.py`` found, even if a step hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from tabulate import tabulate

from syncbn.cli import probe
from syncbn.cli.probe import Problem, Report
from syncbn.transports.launchers import Launch
from syncbn.transports.mpi_probe import MPIFacts
from syncbn.transports.reach import REACHED

LEAD = 2.0
"""Seconds by which rank 0 gives up before the others: when it ends, the launcher ends them."""


def run(*, limit: float, as_json: bool, factory: str = "") -> int:
    """Runs the command: examines every rank, prints on rank 0.

    Args:
        limit: seconds until a process that waits for others gives up.
        as_json: one JSON document instead of tables.
        factory: ``package.module:function``, which builds the model to look at; empty for none.

    Returns:
        0 if no problem was found, else 1; the same on every rank.
    """
    report = Report()
    launch = probe.read_launch(report)
    with warnings.catch_warnings(), _time_limit(limit, report, launch, as_json=as_json):
        warnings.simplefilter("ignore")  # warnings of the library are problems in the report
        probe.examine(report, launch, factory, limit)
    speak(report, launch, as_json=as_json)
    return int(bool(report.problems))


@contextmanager
def _time_limit(limit: float, report: Report, launch: Launch, *, as_json: bool) -> Iterator[None]:
    """Ends this process with a report if other processes do not connect in time."""
    out = sys.stdout  # a function of the user may run under a redirection

    def give_up() -> None:
        why = "some processes never came"
        remedy = "Look for a process that ended or never started; on several hosts, for a firewall between them."
        if report.step.startswith(probe.BUILD):
            why, remedy = "it is not done on every rank", "Pass a longer --timeout, or a function that builds less."
        if report.network.suspects:
            why, remedy = report.network.suspects[0]
        report.complain(f"could not {report.step} within {limit:g} s: {why}", remedy)
        speak(report, launch, as_json=as_json, out=out)
        os._exit(1)

    late = 0.0 if launch.rank == 0 else LEAD
    timer = threading.Timer(limit + late, give_up)
    timer.daemon = True
    timer.start()
    # MPI_Init blocks all Python threads, also the timer. faulthandler needs no Python.
    faulthandler.dump_traceback_later(limit + late + LEAD, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def speak(report: Report, launch: Launch, *, as_json: bool, out: TextIO | None = None) -> None:
    """Prints on rank 0. If the ranks are not connected, the first rank of another host prints its own problems."""
    if launch.rank == 0:
        print(to_json(report) if as_json else to_text(report), file=out, flush=True)
    elif launch.local_rank == 0 and report.problems and report.all_reduce == "not checked":
        host = report.ranks[0].host if report.ranks else "unknown"
        for problem in report.problems:
            print(f"rank {launch.rank} on {host}: {problem.what}. {problem.remedy}", file=sys.stderr, flush=True)


def to_json(report: Report) -> str:
    """Renders a report as one document."""
    model = None if report.model is None else report.model.to_dict()
    return json.dumps({**asdict(report), "model": model}, indent=2)


def to_text(report: Report) -> str:
    """Renders a report as tables for a person."""
    facts = [
        ("versions", "  ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("launcher", _launcher(report)),
        ("MPI", _mpi(report.mpi)),
        ("NCCL", report.nccl or "none: this torch has no CUDA"),
        ("kernels", f"{report.kernels}: {report.kernels_reason}"),
        ("transport", f"{report.transport}: {report.reason}"),
        ("all-reduce", _all_reduce(report)),
        *([] if report.hosts == 1 else [("in one node", _in_one_node(report))]),
    ]
    ranks = [list(asdict(place).values()) for place in report.ranks]
    parts = [
        tabulate(facts, tablefmt="plain", disable_numparse=True),
        tabulate(ranks, ["rank", "local rank", "host", "pid", "device"], disable_numparse=True),
        *_network(report),
        *([] if report.model is None else [report.model.table()]),
        *(["\n".join(["Warnings:", *_numbered(report.warnings)])] if report.warnings else []),
        _problems(report),
    ]
    return "\n\n".join(parts)


def _launcher(report: Report) -> str:
    processes = f"{report.processes} process{'es' if report.processes > 1 else ''}"
    return f"{report.launcher}, {processes}" + (f" ({report.evidence})" if report.evidence else "")


def _mpi(mpi: MPIFacts) -> str:
    if mpi.error:
        return f"not usable: {mpi.error}"
    return f"{mpi.name} {mpi.version} ({mpi.library})" if mpi.name else "not looked at"


def _times(latency_us: dict[str, float]) -> str:
    return ", ".join(f"{us:.1f} us at C = {C}" for C, us in latency_us.items())


def _in_one_node(report: Report) -> str:
    if not report.node_latency_us:
        return f"not timed: the {report.hosts} hosts have different numbers of ranks"
    return f"{_times(report.node_latency_us)} (group_size='node', {report.processes // report.hosts} ranks a host)"


def _all_reduce(report: Report) -> str:
    times = _times(report.latency_us)
    answer = {"right": "the known answer", "wrong": "a WRONG answer"}.get(report.all_reduce, report.all_reduce)
    return f"{answer}; {times}" if times else answer


def _problems(report: Report) -> str:
    if not report.problems:
        return "No problem found."
    return "\n".join(["Problems:", *_numbered(report.problems)])


def _numbered(problems: list[Problem]) -> list[str]:
    return [f"  {n}. {problem.what}\n     {problem.remedy}" for n, problem in enumerate(problems, 1)]


def _network(report: Report) -> list[str]:
    """Returns the table of hosts, and who reaches whom; nothing if all ranks are on one host."""
    hosts = report.network.hosts
    if not hosts or (len(hosts) == 1 and not report.problems):
        return []
    rows = [
        (
            each.name,
            ranges(each.ranks),
            each.address,
            each.interface,
            each.own_name or "unknown",
            ", ".join(each.others),
        )
        for each in hosts
    ]
    columns = ["host", "ranks", "offers", "interface", "own name is", "other addresses"]
    table = tabulate(rows, columns, disable_numparse=True)
    routes = report.network.routes
    failed = [
        f"{each.source} to {each.target} at {each.address}: {each.found}" for each in routes if each.found != REACHED
    ]
    if not routes:
        return [table]
    reached = f"{len(routes) - len(failed)} of {len(routes)} connections from host to host were made"
    return [table, "\n".join([reached, *failed[:20]])]


def ranges(ranks: list[int]) -> str:
    """Renders sorted numbers: 0-3, 8."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
