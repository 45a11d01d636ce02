# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu import main as benchmark
from benchmarks.gpu.plan import DTYPES, Options
from syncbn.cli.arguments import at_least, seconds, shape
from syncbn.transports import launchers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None takes those of this process.

    Returns:
        See :func:`benchmarks.gpu.main.run`; 2 for wrong arguments or more than one process.
    """
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Time a training step beside torch's layers, on one GPU."
    )
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="N,C,H,W", default=defaults.shapes, help="(default: see the docs)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: all)")
    parser.add_argument("--channels-last", action="store_true", help="that memory format alone (default: both)")
    parser.add_argument("--repeats", type=at_least(1), default=defaults.repeats, help="(default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON document there during the run")
    parser.add_argument(
        "--time-limit", type=seconds, default=defaults.time_limit, help="seconds after which the rest is left out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    args = parser.parse_args(argv)
    try:
        processes = launchers.detect().size
    except ValueError as error:
        parser.error(str(error))
    if processes > 1:
        parser.error(f"it needs one process; received {processes}. Start it without a launcher.")
    options = Options(
        tuple(args.shapes),
        (args.dtype,) if args.dtype else defaults.dtypes,
        ("channels_last",) if args.channels_last else defaults.layouts,
        args.repeats,
        args.time_limit,
        args.output,
    )
    return benchmark.run(options, form="json" if args.json else "table")


if __name__ == "__main__":
    sys.exit(main())
