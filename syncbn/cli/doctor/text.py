# SPDX-License-Identifier: BSD-3-Clause
"""The report of `syncbn doctor` as text for a person, of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from tabulate import tabulate

from syncbn.cli import lines
from syncbn.cli.doctor import cores
from syncbn.cli.doctor.report import Problem, Report
from syncbn.transports.mpi_probe import MPIFacts
from syncbn.transports.reach import REACHED
from syncbn.waits.ranks import ranks_of

MOST_RANKS = 32
"""Ranks that have a line each; from there on a host has one."""
_MOST_ROUTES = 20


def to_text(report: Report) -> str:
    """Renders a report as tables."""
    parts = [
        lines.facts(list(_job(report))),
        _ranks(report),
        *_network(report),
        *_checklist(report),
        *_system(report),
        *([] if report.model is None else [report.model.table()]),
        *(["\n".join(["Warnings:", *_numbered(report.warnings)])] if report.warnings else []),
        "\n".join(["Problems:", *_numbered(report.problems)]) if report.problems else "No problem found.",
    ]
    return "\n\n".join(parts)


def _job(report: Report) -> Iterator[tuple[str, str]]:
    """Yields what is known of the job and of its transport."""
    processes = f"{report.processes} process{'es' if report.processes > 1 else ''}"
    yield "versions", "  ".join(f"{name} {version}" for name, version in report.versions.items())
    yield "launcher", f"{report.launcher}, {processes}" + (f" ({report.evidence})" if report.evidence else "")
    if not report.checklist:  # it has them, too
        yield "MPI", _mpi(report.mpi)
    yield "kernels", f"{report.kernels}: {report.kernels_reason}"
    yield "transport", f"{report.transport}: {report.reason}"
    yield "all-reduce", _all_reduce(report)
    yield "latency", report.verdict.text
    if report.hosts > 1:
        yield "in one node", _in_one_node(report)


def _mpi(mpi: MPIFacts) -> str:
    if mpi.error:
        return f"not usable: {mpi.error}"
    return f"{mpi.name} {mpi.version} ({mpi.library})" if mpi.name else "not looked at"


def _times(latency_us: dict[str, float]) -> str:
    return ", ".join(f"{us:.1f} us at C = {C}" for C, us in latency_us.items())


def _all_reduce(report: Report) -> str:
    times = _times(report.latency_us)
    answer = {"right": "the known answer", "wrong": "a WRONG answer"}.get(report.all_reduce, report.all_reduce)
    return f"{answer}; {times}" if times else answer


def _in_one_node(report: Report) -> str:
    if not report.node_latency_us:
        return f"not timed: the {report.hosts} hosts have different numbers of ranks"
    return f"{_times(report.node_latency_us)} (group_size='node', {report.processes // report.hosts} ranks a host)"


def _ranks(report: Report) -> str:
    """Returns a table of the ranks; of the hosts, if there are many ranks."""
    if len(report.ranks) <= MOST_RANKS:
        rows = [(p.rank, p.local_rank, p.host, p.pid, p.device, p.cores, p.threads) for p in report.ranks]
        columns = ["rank", "local rank", "host", "pid", "device", "cores", "threads"]
        return tabulate(rows, columns, disable_numparse=True)
    hosts = []
    for host, mine in cores.by_host(report.ranks).items():
        devices, threads = {place.device for place in mine}, {place.threads for place in mine}
        own = set[int]().union(*(cores.read(place.cores) for place in mine))
        all_threads = ", ".join(map(str, sorted(threads)))
        who = ranks_of([place.rank for place in mine])
        hosts.append((who, host, ", ".join(sorted(devices)), ranks_of(own), all_threads))
    return tabulate(hosts, ["ranks", "host", "devices", "cores", "threads"], disable_numparse=True)


def _checklist(report: Report) -> Iterator[str]:
    """Yields what is there, and what is not with what would bring it."""
    if not report.checklist:
        return
    width = max(len(item.name) for item in report.checklist)
    rows, group = ["[x] is there, [ ] is not, with what would bring it:"], ""
    for item in report.checklist:
        if item.group != group:
            rows.append(group := item.group)
        note = f"{item.note}; {item.install}" if item.install else item.note
        rows.append(lines.wrapped(note, f"  [{'x' if item.there else ' '}] {item.name:<{width}}  "))
    yield "\n".join(rows)


def _system(report: Report) -> Iterator[str]:
    """Yields what is known of rank 0's host, and the variables that are set."""
    system = report.system
    if not system.os:
        return
    load = f"{system.load:g} programs ran or waited in the last minute"
    limit = "" if system.core_limit is None else f", a container's limit of {cores.shown(system.core_limit)}"
    memory = "" if system.memory_limit_gib is None else f", a container's limit of {system.memory_limit_gib:g} GiB"
    shm = "" if system.shm_free_gib is None else f"; {system.shm_free_gib:g} GiB free in /dev/shm"
    shown = " ".join(f"{name}={value}" for name, value in report.variables.items())
    rows = [
        ("OS", system.os),
        ("CPU", system.cpu),
        ("cores", f"{system.cores} of {system.cores_of_host} for this process{limit}; {load}"),
        ("threads", f"{system.threads} a process ({_why_threads(report)})"),
        ("memory", f"{system.memory_free_gib:g} of {system.memory_gib:g} GiB free{memory}{shm}"),
        ("variables", shown or "none of SYNCBN_, OMP_, GLOO_, MASTER_, MALLOC_, OMPI_MCA_, NCCL_"),
    ]
    yield "\n".join(["system", lines.facts(rows, "  ")])


def _why_threads(report: Report) -> str:
    value = report.variables.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={value}" if value else "OMP_NUM_THREADS is not set"


def _network(report: Report) -> Iterator[str]:
    """Yields the table of hosts, and who reaches whom; nothing if all ranks are on one host."""
    hosts = report.network.hosts
    if not hosts or (len(hosts) == 1 and not report.problems):
        return
    rows = [
        (
            each.name,
            ranks_of(each.ranks),
            each.address,
            each.interface,
            each.own_name or "unknown",
            _joined(each.others),
        )
        for each in hosts
    ]
    columns = ["host", "ranks", "offers", "interface", "own name is", "other addresses"]
    yield tabulate(rows, columns, disable_numparse=True)
    routes = report.network.routes
    failed = [
        f"{each.source} to {each.target} at {each.address}: {each.found}" for each in routes if each.found != REACHED
    ]
    if routes:
        reached = f"{len(routes) - len(failed)} of {len(routes)} connections from host to host were made"
        delay = report.network.delay_us
        slowest = f"; the longest one-way delay is {delay:.0f} us" if delay else ""
        yield "\n".join([reached + slowest, *failed[:_MOST_ROUTES]])


def _joined(others: list[str]) -> str:
    return ", ".join(others)


def _numbered(problems: list[Problem]) -> list[str]:
    rows = []
    for n, problem in enumerate(problems, 1):
        rows.append(lines.wrapped(problem.what, f"  {n}. "))
        rows.append(lines.wrapped(problem.remedy, "     -> "))
    return rows
