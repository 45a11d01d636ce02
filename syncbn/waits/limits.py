# SPDX-License-Identifier: BSD-3-Clause
"""How long a call may wait for other ranks, and what decides that."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta

TIMEOUT = "SYNCBN_TIMEOUT"
"""Seconds that a call may wait; "inf" for no limit."""
REPORT = "SYNCBN_REPORT"
"""A file that gets the report as JSON."""
DEFAULT = 300.0
WARNS_AT = 0.2
"""The part of the limit after which a rank that waits is warned of."""
BUSY_FACTOR = 10.0
"""A rank that compiles, or saves or loads a file, may keep the others waiting for this many limits."""
TICK = 0.5
"""Seconds between two looks."""
_ENDLESS = 365 * 86400.0
"""Seconds that stand for no limit where a library needs a number."""

_given: list[float] = []


def limit() -> float:
    """Returns the seconds that a call may wait: what ``syncbn.init`` was given, else the variable, else 300.

    Raises:
        ValueError: if the variable is not a number above 0.
    """
    return _given[-1] if _given else of_environment()


def or_default() -> float:
    """Returns the limit, or the default if the variable is wrong, as the first use of a group is about to say."""
    try:
        return limit()
    except ValueError:
        return DEFAULT


def give(seconds: float) -> None:
    """Sets the limit of this process, see ``syncbn.init``."""
    _given[:] = [seconds]


def of_libraries(seconds: object = None) -> timedelta | None:
    """Returns the timeout for process groups of torch, which also end waits that are on no record here, as DDP's are.

    It is the longest wait that this room allows, so that a report comes first, and a checkpoint may be saved meanwhile.

    Args:
        seconds: the limit that ``syncbn.init`` was given; None for the one that is in force.

    Returns:
        Ten limits; None, which is torch's own default, if nobody has given a limit, or a wrong one.
    """
    try:
        found = limit() if seconds is None else checked(seconds, TIMEOUT)
    except ValueError:  # the first use of a group says so
        return None
    return None if found == DEFAULT else timedelta(seconds=min(BUSY_FACTOR * found, _ENDLESS))


def of_environment(environ: Mapping[str, str] = os.environ) -> float:
    """Reads the limit from ``SYNCBN_TIMEOUT``.

    Raises:
        ValueError: if it is not a number above 0.
    """
    text = environ.get(TIMEOUT)
    if not text:
        return DEFAULT
    try:
        return checked(float(text), TIMEOUT)
    except ValueError:
        raise error(text, TIMEOUT) from None


def checked(seconds: object, name: str) -> float:
    """Returns seconds as a float.

    Raises:
        ValueError: if it is not a number above 0.
    """
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise error(seconds, name)
    try:
        found = float(seconds)
    except OverflowError:  # an integer beyond the largest float
        raise error(seconds, name) from None
    if not found > 0:
        raise error(seconds, name)
    return found


def error(received: object, name: str) -> ValueError:
    """Returns the error for a limit that is not one."""
    return ValueError(
        f"{name} must be a number of seconds above 0, or inf to wait without a limit; received {shown(received)}. "
        f"Correct it or leave it out: the default is {DEFAULT:g}."
    )


def shown(value: object, most: int = 100) -> str:
    """Returns a value for an error: its repr, cut; its type, if that raises. An error on one rank alone would hang."""
    try:
        return repr(value)[:most]
    except Exception:  # of any kind: whoever wrote the class decides, and an integer may be too long for Python
        return f"a value of type {type(value).__name__}"


def spoken(seconds: float) -> str:
    """Returns seconds as a short text."""
    if math.isinf(seconds):
        return "without a limit"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
