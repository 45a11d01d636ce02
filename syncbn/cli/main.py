# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `syncbn doctor`, `test` and `bench`, alone or under any launcher. Rank 0 prints."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from typing import IO, Any, NoReturn, final

import syncbn
from syncbn.cli.arguments import at_least, factory, seconds, shape
from syncbn.cli.bench import cpu, report
from syncbn.cli.doctor import command as doctor
from syncbn.cli.selftest import command as selftest
from syncbn.transports import launchers

GRACE = 5.0
"""Seconds for which a failing rank waits for rank 0 to print: a launcher ends all processes when one fails."""
PASSED_ON = 0.5
"""Seconds that a launcher gets to pass on what rank 0 has printed, before it hears that rank 0 has failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes those of this process.

    Returns:
        The exit status: 0 for success, 1 for a problem, 2 for wrong arguments. The same on every rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C then ends even a process that waits in a collective
    args = _parser().parse_args(argv)
    if args.command == "doctor":
        status = doctor.run(limit=args.timeout, as_json=args.json, factory=args.model or "")
    elif args.command == "test":
        status = selftest.run(as_json=args.json, device=args.device)
    else:
        form = "json" if args.json else "csv" if args.csv else "table"
        shapes = tuple(args.shapes or report.SHAPES)
        options = report.Options(
            shapes, args.dtype, args.channels_last, args.repeats, args.warmup, not args.no_baseline
        )
        status = cpu.run(options, form=form, output=args.output)
    sys.stdout.flush()
    return _last(status)


def _last(status: int) -> int:
    """Delays a failing rank, rank 0 the least. Returns its status."""
    rank, size = _place()
    if status and size > 1:
        time.sleep(GRACE if rank > 0 else PASSED_ON)
    return status


def _place() -> tuple[int, int]:
    """Returns rank and size of the job."""
    try:
        launch = launchers.detect()
    except ValueError:  # the launcher's variables are no numbers: the doctor reports it
        return 0, 1
    return launch.rank, launch.size


@final
class _RankZeroParser(argparse.ArgumentParser):
    """A parser that prints on rank 0 only."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if _place()[0] == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        sys.stderr.flush()
        sys.exit(_last(status))


def _parser() -> argparse.ArgumentParser:
    parser = _RankZeroParser(prog="syncbn", description="Check the setup of syncbn, test it, or measure its speed.")
    parser.add_argument("--version", action="version", version=f"syncbn {syncbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_test(commands)
    _add_bench(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    about = "say what is installed, which processes are connected, what is wrong and what to do about it"
    command = commands.add_parser("doctor", help=about, description=f"syncbn doctor: {about}.")
    command.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    command.add_argument(
        "--model",
        type=factory,
        metavar="MODULE:FUNCTION",
        help="list the batch norms of the model that this function returns, and what conversion would do to them",
    )
    command.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="give up if the processes do not connect in this time, and say where (default: %(default)g)",
    )


def _add_test(commands: Any) -> None:
    about = "train a small network in this job, and compare it with the same steps in one process"
    command = commands.add_parser("test", help=about, description=f"syncbn test: {about}.")
    command.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    command.add_argument(
        "--device", metavar="DEVICE", help="such as cpu or cuda:0 (default: the GPU of the local rank, else the CPU)"
    )


def _add_bench(commands: Any) -> None:
    about = "time forward + backward, beside torch's BatchNorm2d and the usual baseline over gloo"
    command = commands.add_parser("bench", help=about, description=f"syncbn bench: {about}.")
    defaults = report.Options()
    command.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="N,C,H,W",
        help="local batches (default: those of a ResNet-50 at 2 images a process, and 2,64,8,8)",
    )
    command.add_argument("--dtype", choices=report.DTYPES, default=defaults.dtype, help="(default: %(default)s)")
    command.add_argument("--channels-last", action="store_true", help="input in channels_last memory format")
    command.add_argument("--repeats", type=at_least(1), default=defaults.repeats, help="(default: %(default)s)")
    command.add_argument("--warmup", type=at_least(0), default=defaults.warmup, help="(default: %(default)s)")
    command.add_argument("--no-baseline", action="store_true", help="no baseline, and no torch.distributed")
    command.add_argument("--output", metavar="FILE", help="write the JSON document there too, after every shape")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of tables")
