# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `syncbn doctor` and `syncbn bench`, alone or under any launcher. Rank 0 speaks for all."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from typing import IO, Any, NoReturn, final

import syncbn
from syncbn import bench, bench_report, doctor, launchers

GRACE = 5.0
"""Seconds that other ranks leave rank 0 to speak: a launcher ends all processes when the first one fails."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; None takes those of this process.

    Returns:
        The exit status: 0 if all is well, 1 if something is wrong, 2 for wrong arguments; the same on every rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends even a process that waits inside a collective
    args = _parser().parse_args(argv)
    if args.command == "doctor":
        status = doctor.run(limit=args.timeout, as_json=args.json)
    elif args.device == "cuda":
        status = _bench_gpu(args)
    else:
        form = "json" if args.json else "csv" if args.csv else "table"
        shapes = tuple(args.shapes or bench_report.SHAPES)
        dtype, repeats = args.dtype or bench_report.DTYPES[0], args.repeats or bench_report.Options().repeats
        options = bench_report.Options(
            shapes, dtype, args.channels_last, repeats, args.warmup, not args.no_composite, args.parts
        )
        status = bench.run(options, form=form)
    sys.stdout.flush()
    return _last(status)


def _bench_gpu(args: argparse.Namespace) -> int:
    """Runs ``syncbn bench --device cuda``."""
    from syncbn import bench_gpu, bench_gpu_plan

    if problem := _unfit_for_a_gpu(args):
        if _rank() == 0:
            print(f"syncbn bench: {problem}", file=sys.stderr, flush=True)
        return 2
    all_of_them = bench_gpu_plan.Options()
    options = bench_gpu_plan.Options(
        tuple(args.shapes or all_of_them.shapes),
        (args.dtype,) if args.dtype else all_of_them.dtypes,
        ("channels_last",) if args.channels_last else all_of_them.layouts,
        args.repeats or all_of_them.repeats,
        args.time_limit or all_of_them.time_limit,
        args.output,
    )
    return bench_gpu.run(options, form="json" if args.json else "table")


def _unfit_for_a_gpu(args: argparse.Namespace) -> str:
    try:
        processes = launchers.detect().size
    except ValueError as error:
        return str(error)
    if processes > 1:
        return f"--device cuda needs one process; received {processes}. Start it without a launcher."
    if args.csv or args.parts:
        return f"--device cuda prints tables of its own; received {'--csv' if args.csv else '--parts'}. Use --json."
    return ""


def _last(status: int) -> int:
    """Holds back a failing rank that is not rank 0, and returns its status."""
    if status and _rank() > 0:
        time.sleep(GRACE)
    return status


def _rank() -> int:
    try:
        return launchers.detect().rank
    except ValueError:  # the launcher's variables are no numbers; the doctor says so
        return 0


@final
class _RankZeroParser(argparse.ArgumentParser):
    """A parser whose messages come from rank 0 alone."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if _rank() == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        sys.stderr.flush()
        sys.exit(_last(status))


def _parser() -> argparse.ArgumentParser:
    parser = _RankZeroParser(prog="syncbn", description="Synchronized batch norm: is it set up well, is it fast?")
    parser.add_argument("--version", action="version", version=f"syncbn {syncbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_bench(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    about = "say what is installed, who is connected, what is wrong and what to do about it"
    command = commands.add_parser("doctor", help=about, description=f"syncbn doctor: {about}.")
    command.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="give up, and say where, when the processes do not connect (default: %(default)g)",
    )


def _add_bench(commands: Any) -> None:
    about = "time forward + backward beside torch's BatchNorm2d and a composite over gloo"
    command = commands.add_parser("bench", help=about, description=f"syncbn bench: {about}.")
    defaults = bench_report.Options()
    command.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        metavar="N,C,H,W",
        help="share of one process (default: those of a ResNet-50 at 2 images a process, and 2,64,8,8)",
    )
    command.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: one process beside torch's synchronised layer; shapes, dtypes and layouts of its own unless given",
    )
    command.add_argument(
        "--output", metavar="FILE", help="with --device cuda: write the JSON document there, all along"
    )
    command.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="with --device cuda: what is not measured by then is left",
    )
    command.add_argument("--dtype", choices=bench_report.DTYPES, help=f"(default: {defaults.dtype})")
    command.add_argument("--channels-last", action="store_true", help="input in channels_last memory format")
    command.add_argument("--repeats", type=_at_least(1), help=f"(default: {defaults.repeats}; with --device cuda 7)")
    command.add_argument("--warmup", type=_at_least(0), default=defaults.warmup, help="(default: %(default)s)")
    command.add_argument("--no-composite", action="store_true", help="leave the composite out, and torch.distributed")
    command.add_argument(
        "--parts",
        action="store_true",
        help="one process: each step beside a copy of its bytes, what a step costs besides, and its peak memory",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of tables")


def _shape(text: str) -> bench_report.Shape:
    """Reads N,C,H,W; two values per channel are the least that have a variance."""
    try:
        N, C, H, W = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs four whole numbers N,C,H,W; received {text!r}") from None
    if min(N, C, H, W) < 1 or N * H * W < 2:
        raise argparse.ArgumentTypeError(f"needs N, C, H, W >= 1 and N * H * W >= 2; received {text!r}")
    return N, C, H, W


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"needs a whole number >= {least}; received {text!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number of seconds > 0; received {text!r}")
    return seconds
