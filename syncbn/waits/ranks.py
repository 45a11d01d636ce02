# SPDX-License-Identifier: BSD-3-Clause
"""How ranks are named in a text: by ranges, so that a job of 512 has no line of 512 numbers."""

from __future__ import annotations

from collections.abc import Collection

MOST_RUNS = 30
"""Ranges in one text. Every second rank of 4,096 would be a line of 10 kB."""


def ranks_of(ranks: Collection[int]) -> str:
    """Returns ``0, 2-63``, or ``0, 2, 4 and 1021 more`` if there are too many ranges."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = runs[:MOST_RUNS]
    left = len(ranks) - sum(map(len, shown))
    text = ", ".join(", ".join(map(str, run)) if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in shown)
    return f"{text} and {left} more" if left else text


def named(ranks: Collection[int]) -> str:
    """Returns ``rank 1`` or ``ranks 0, 2-63``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {ranks_of(ranks)}"
