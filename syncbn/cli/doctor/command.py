# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn doctor`: prints on rank 0 what ``probe.py`` found, even if a step hangs."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from syncbn.cli.deadline import time_limit
from syncbn.cli.doctor import probe
from syncbn.cli.doctor.report import Report
from syncbn.cli.doctor.text import to_text
from syncbn.transports.launchers import Launch


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
    out = sys.stdout  # a function of the user may run under a redirection

    def give_up() -> None:
        _complain_of_time(report, limit)
        speak(report, launch, as_json=as_json, out=out)

    with warnings.catch_warnings(), time_limit(limit, launch.rank, give_up):
        warnings.simplefilter("ignore")  # warnings of the library are problems in the report
        probe.examine(report, launch, factory, limit)
    speak(report, launch, as_json=as_json)
    return int(bool(report.problems))


def _complain_of_time(report: Report, limit: float) -> None:
    why = "some processes never came"
    remedy = "Look for a process that ended or never started; on several hosts, for a firewall between them."
    if report.step.startswith(probe.BUILD):
        why, remedy = "it is not done on every rank", "Pass a longer --timeout, or a function that builds less."
    if report.network.suspects:
        why, remedy = report.network.suspects[0]
    report.complain(f"could not {report.step} within {limit:g} s: {why}", remedy)


def speak(report: Report, launch: Launch, *, as_json: bool, out: TextIO | None = None) -> None:
    """Prints on rank 0. If the ranks are not connected, the first rank of another host prints its own problems."""
    if launch.rank == 0:
        print(report.to_json() if as_json else to_text(report), file=out, flush=True)
    elif launch.local_rank == 0 and report.problems and report.all_reduce == "not checked":
        host = report.ranks[0].host if report.ranks else "unknown"
        for problem in report.problems:
            print(f"rank {launch.rank} on {host}: {problem.what}. {problem.remedy}", file=sys.stderr, flush=True)
