# SPDX-License-Identifier: BSD-3-Clause
"""Helpers: print once, and end all processes with one exit code. Not an example by itself."""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import NoReturn

import syncbn


def parse(world: syncbn.World, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line on every rank. Only rank 0 prints help and errors."""
    nowhere = io.StringIO()
    with contextlib.ExitStack() as stack:
        if world.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            return parser.parse_args()
        except SystemExit as stop:
            code = stop.code
    leave(world, int(code or 0))


def agree(world: syncbn.World, error: Exception | None, *, exit_code: int = 2) -> None:
    """Returns if no rank has an error. Else rank 0 prints it, and every rank ends with ``exit_code``."""
    try:
        world.raise_together(error)
    except (ValueError, TypeError, RuntimeError) as everyones:
        if world.rank == 0:
            print(f"{Path(sys.argv[0]).name}: error: {everyones}", file=sys.stderr)
        leave(world, exit_code)


def leave(world: syncbn.World, exit_code: int) -> NoReturn:
    """Ends this process after every rank has called this: the first non-zero exit makes mpirun kill the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    world.barrier()
    sys.exit(exit_code)


def at_least(smallest: int):
    """Makes an argparse type for whole numbers from ``smallest``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"needs a whole number >= {smallest}; received {value}")
        return value

    return integer
