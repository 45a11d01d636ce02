# SPDX-License-Identifier: BSD-3-Clause
"""Verdicts that every rank of a group shares: nobody raises alone, so nobody is left waiting.

N batch, C channels, S product of the spatial dims, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from syncbn.transports.base import AbstractTransport

NOTE_BYTES = 1000


def gather(row: Tensor, transport: AbstractTransport) -> Tensor:
    """Collects one row of numbers from every rank.

    Args:
        row: float64 (K,), K the same on every rank.
        transport: the group.

    Returns:
        float64 (W, K), exact: every rank adds its row to zeros.

    Communication:
        One all-reduce of W * K float64 values.
    """
    table = torch.zeros(transport.size, row.numel(), dtype=torch.float64, device="cpu")
    table[transport.rank] = row
    return transport.all_reduce(table)


def gather_notes(note: str, transport: AbstractTransport) -> list[str]:
    """Collects a short text from every rank, as bytes; a longer one is cut at ``NOTE_BYTES``.

    Communication:
        One all-reduce of W * ``NOTE_BYTES`` float64 values: for reports and failures, not for steps.
    """
    row = torch.zeros(NOTE_BYTES, dtype=torch.float64, device="cpu")
    encoded = note.encode()[:NOTE_BYTES]
    row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.float64, device="cpu")
    rows = gather(row, transport).to(torch.uint8).tolist()
    return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in rows]


def require_equal(
    values: Mapping[str, float], transport: AbstractTransport, what: str, remedy: str, *errors: Exception | None
) -> None:
    """Raises on every rank unless the named numbers are the same on all.

    Args:
        values: the numbers; the names and their order are the same on every rank.
        transport: the group.
        what: the subject of the message.
        remedy: its last sentence.
        errors: one error of this rank or None, which rides along and comes first; or nothing, on every rank alike.

    Communication:
        One all-reduce of W * (len(values) + len(errors)) float64 values, by every rank of the group.

    Raises:
        ValueError: on every rank, with the values that differ and the ranks that hold them.
    """
    row = [*values.values(), *[float(error is not None) for error in errors]]
    table = gather(torch.tensor(row, dtype=torch.float64, device="cpu"), transport)
    if errors and table[:, -1].any():
        raise_gathered(errors[0], transport)
    table = table[:, : len(values)]
    for name, column in zip(values, table.T.tolist(), strict=True):
        texts = [f"{v:.17g}" for v in column]  # compared as text: NaN is not equal to itself
        if len(set(texts)) > 1:
            received = by_rank(texts, transport.ranks)
            raise ValueError(f"{what} needs the same {name} on every rank; received {received}. {remedy}")


def raise_together(error: Exception | None, transport: AbstractTransport) -> None:
    """Raises on every rank if any rank brings an error; the text names the ranks.

    Args:
        error: this rank's error, or None.
        transport: the group.

    Communication:
        One all-reduce of one value by every rank; one more of texts if there is an error.

    Raises:
        ValueError, TypeError or RuntimeError: the kind of the first rank's error, on every rank.
    """
    count = torch.tensor([float(error is not None)], dtype=torch.float64, device="cpu")
    if transport.all_reduce(count).item():
        raise_gathered(error, transport)


def raise_gathered(error: Exception | None, transport: AbstractTransport) -> None:
    """Raises the errors of all ranks on all ranks. Called only where every rank knows that there is one."""
    kinds: dict[str, type[Exception]] = {"V": ValueError, "T": TypeError, "R": RuntimeError}
    kind = next((k for k, cls in kinds.items() if isinstance(error, cls)), "R")
    notes = gather_notes("" if error is None else f"{kind}{error}", transport)
    first = next(note for note in notes if note)
    raise kinds[first[0]](by_rank([note[1:] for note in notes], transport.ranks, skip_empty=True, joint=" | "))


def by_rank(notes: list[str], ranks: tuple[int, ...], *, skip_empty: bool = False, joint: str = " and ") -> str:
    """Groups equal notes: ``64 on ranks 0, 2 and 32 on rank 1``; for errors, the text leads with its ranks."""
    holders: dict[str, list[int]] = {}
    for rank, note in zip(ranks, notes, strict=True):
        if note or not skip_empty:
            holders.setdefault(note, []).append(rank)
    parts = []
    for note, who in holders.items():
        where = f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
        parts.append(f"On {where}: {note}" if skip_empty else f"{note} on {where}")
    return joint.join(parts)
