# SPDX-License-Identifier: BSD-3-Clause
"""How ranks are named in a text: by ranges, so that a job of 512 has no line of 512 numbers."""

from __future__ import annotations

from collections.abc import Collection


def ranks_of(ranks: Collection[int]) -> str:
    """Returns ``0, 2-63``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(", ".join(map(str, run)) if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs)


def named(ranks: Collection[int]) -> str:
    """Returns ``rank 1`` or ``ranks 0, 2-63``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {ranks_of(ranks)}"
