# SPDX-License-Identifier: BSD-3-Clause
"""Argument types of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from syncbn.cli.bench.report import Shape


def shape(text: str) -> Shape:
    """Reads N,C,H,W with at least two values per channel, since one has no variance."""
    try:
        N, C, H, W = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs four whole numbers N,C,H,W; received {text!r}") from None
    if min(N, C, H, W) < 1 or N * H * W < 2:
        raise argparse.ArgumentTypeError(f"needs N, C, H, W >= 1 and N * H * W >= 2; received {text!r}")
    return N, C, H, W


def at_least(least: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers >= ``least``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"needs a whole number >= {least}; received {text!r}")
        return int(text)

    return number


def seconds(text: str) -> float:
    """Reads a duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"needs a number of seconds > 0; received {text!r}")
    return value


def factory(text: str) -> str:
    """Reads package.module:function, without importing it."""
    module, _, function = text.partition(":")
    if not all(word.isidentifier() for word in (*module.split("."), *function.split("."))):
        raise argparse.ArgumentTypeError(f"needs package.module:function; received {text!r}")
    return text
