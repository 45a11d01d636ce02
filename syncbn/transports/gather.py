# SPDX-License-Identifier: BSD-3-Clause
"""Errors that every rank of a group raises alike: nobody raises alone, so nobody is left waiting.

N batch, C channels, S product of the spatial dims, W ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from syncbn import moments
from syncbn.moments import Message
from syncbn.transports.base import AbstractTransport, MismatchError
from syncbn.waits.ranks import named

NOTE_BYTES = 1000
_OTHER = -1
"""The direction of a message that is no layer's."""


def exchange(values: Tensor, transport: AbstractTransport, what: str) -> Tensor:
    """Sums numbers over the ranks, in a message that carries the identity of the call.

    Args:
        values: float64 (K,). K is the same on every rank that makes this call.
        transport: the group.
        what: the name of the call, for example "World.average_gradients".

    Returns:
        float64 (K,).

    Communication:
        One all-reduce of K + 7 float64 values.

    Raises:
        ValueError: on every rank, if some are in another call.
    """
    message = message_of(what, transport)
    wire = torch.cat((values.new_tensor(moments.head(message.numbers)), values))
    wire = all_reduce(wire, transport, message)
    if not moments.same_call(wire[: moments.CALL].tolist(), message.numbers):
        raise calls_differ(message, no_notes, transport)
    return wire[moments.CALL :]


def message_of(what: str, transport: AbstractTransport) -> Message:
    """Returns the identity of a message that is not a layer's."""
    numbers = moments.numbers(transport.serial, moments.text_hash(what), 0)
    return Message(numbers, transport.size, what, _OTHER, transport.serial)


Notes = Callable[[], tuple[str, str]]
"""Returns two texts for errors, see ``Site.notes``. Called only after an error has been found."""


def no_notes() -> tuple[str, str]:
    """Returns empty notes, for a message that is not a layer's."""
    return "", ""


def all_reduce(wire: Tensor, transport: AbstractTransport, message: Message, notes: Notes = no_notes) -> Tensor:
    """Sums a wire over the ranks. If the library refuses the message, raises an error that names the calls."""
    try:
        return transport.reduce(wire, message)
    except MismatchError as error:
        raise calls_differ(message, notes, transport, str(error)) from error


@contextmanager
def on_record(what: str, transport: AbstractTransport, patience: float | None = None) -> Iterator[None]:
    """Does ``AbstractTransport.call``. If the transport refuses the call, raises an error that names the calls."""
    with transport.call(what, patience):
        try:
            yield
        except MismatchError as error:
            raise calls_differ(transport.named(what), no_notes, transport, str(error)) from error


def calls_differ(message: Message, notes: Notes, transport: AbstractTransport, said: str = "") -> ValueError:
    """Returns the error for ranks in different calls. Every rank that finds a disagreement calls this.

    Args:
        message: of this rank.
        notes: of its layer.
        transport: the group.
        said: the error of the library, if it refused the message.
    """
    if said:  # write it now: the launcher may end this process while it waits for ranks that have ended
        sys.stderr.write(f"syncbn: rank {transport.ranks[transport.rank]} was in {message}; {said}\n")
        sys.stderr.flush()
    transport.failed = transport.begun, transport.current or message  # a rank that waits in it gets no answer any more
    rows = transport.exchange_notes("\n".join((str(message), *notes())))
    transport.leave()
    parts = [("an unknown call: it sent no word",) * 3 if row is None else tuple(row.split("\n")) for row in rows]
    calls, orders, settings = ([part[i] for part in parts] for i in range(3))
    library = f" The library below said: {said}." if said else ""
    if len(set(calls)) > 1 or said:
        return ValueError(
            f"All ranks must be in one call; received {by_rank(calls, transport.ranks)}. Ranks took different "
            "branches, ran backward passes in another order, or one of them left a call out. Look for code that "
            f"depends on the rank or on its data.{library}"
        )
    if len(set(orders)) > 1:
        received = by_rank([f"{c}, {o}" for c, o in zip(calls, orders, strict=True)], transport.ranks)
        return ValueError(
            f"All ranks must call the same layer; received {received}. Ranks took different branches, or use copies of "
            "a model in another order. Look for code that depends on the rank or on its data."
        )
    if len(set(settings)) == 1:
        return ValueError(
            f"All ranks must get exact sums; received others in {by_rank(calls, transport.ranks)}. "
            "The transport must keep every bit of float64: look for a wrapper that rounds or compresses."
        )
    return ValueError(
        f"All ranks must use the same settings of {message.label}; received {by_rank(settings, transport.ranks)}. "
        "Change them on all ranks, at the same step."
    )


def gather(row: Tensor, transport: AbstractTransport, what: str = "a comparison") -> Tensor:
    """Collects one row of numbers from every rank.

    Args:
        row: float64 (K,). K is the same on every rank.
        transport: the group.
        what: the call, see ``exchange``.

    Returns:
        float64 (W, K), exact: every rank adds its row to zeros.

    Communication:
        One all-reduce of W * K + 7 float64 values.
    """
    table = torch.zeros(transport.size, row.numel(), dtype=torch.float64, device="cpu")
    table[transport.rank] = row
    return exchange(table.view(-1), transport, what).view(table.shape)


def gather_notes(note: str, transport: AbstractTransport) -> list[str]:
    """Collects a short text from every rank. A text is cut at ``NOTE_BYTES`` bytes.

    Communication:
        One all-reduce of W * ``NOTE_BYTES`` float64 values. Use it for reports and errors, not in every step.
    """
    row = torch.zeros(NOTE_BYTES, dtype=torch.float64, device="cpu")
    encoded = note.encode(errors="backslashreplace")[:NOTE_BYTES]  # the name of a file may be no text
    row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.float64, device="cpu")
    rows = gather(row, transport, "a report of texts").to(torch.uint8).tolist()
    return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in rows]


def require_equal(
    values: Mapping[str, float], transport: AbstractTransport, what: str, remedy: str, *errors: Exception | None
) -> None:
    """Raises on every rank unless the named numbers are the same on all.

    Args:
        values: the numbers. Names and order are the same on every rank.
        transport: the group.
        what: the subject of the message.
        remedy: its last sentence.
        errors: nothing, or one error of this rank or None, which is raised first. The same choice on every rank.

    Communication:
        One all-reduce of W * (len(values) + len(errors)) + 7 float64 values, by every rank of the group.

    Raises:
        ValueError: on every rank, with the values that differ and the ranks that hold them.
    """
    row = [*values.values(), *[float(error is not None) for error in errors]]
    table = gather(torch.tensor(row, dtype=torch.float64, device="cpu"), transport, what)
    if errors and table[:, -1].any():
        raise_gathered(errors[0], transport)
    raise_unless_equal(table[:, : len(values)], values, transport, what, remedy)


def raise_unless_equal(
    table: Tensor, names: Iterable[str], transport: AbstractTransport, what: str, remedy: str
) -> None:
    """Raises on every rank unless each column of a gathered table, (W, K), holds one value."""
    for name, column in zip(names, table.T.tolist(), strict=True):
        texts = [f"{v:.17g}" for v in column]  # compared as text: NaN is not equal to itself
        if len(set(texts)) > 1:
            received = by_rank(texts, transport.ranks)
            raise ValueError(f"{what} needs the same {name} on every rank; received {received}. {remedy}")


def raise_together(error: Exception | None, transport: AbstractTransport, what: str = "World.raise_together") -> None:
    """Raises on every rank if any rank passes an error. The text names the ranks.

    Args:
        error: this rank's error, or None.
        transport: the group.
        what: the name of the call, see ``exchange``.

    Communication:
        One all-reduce of 8 values by every rank; one more of texts if there is an error.

    Raises:
        ValueError, TypeError or RuntimeError: the kind of the first rank's error, on every rank.
    """
    count = torch.tensor([float(error is not None)], dtype=torch.float64, device="cpu")
    if exchange(count, transport, what).item():
        raise_gathered(error, transport)


def raise_gathered(error: Exception | None, transport: AbstractTransport) -> None:
    """Raises the errors of all ranks on all ranks. Called only if every rank knows that there is one."""
    kinds: dict[str, type[Exception]] = {"V": ValueError, "T": TypeError, "R": RuntimeError}
    kind = next((k for k, cls in kinds.items() if isinstance(error, cls)), "R")
    notes = gather_notes("" if error is None else f"{kind}{_text(error)}", transport)
    first = next((note for note in notes if note), "R")
    raise kinds[first[0]](by_rank([note[1:] for note in notes], transport.ranks, skip_empty=True, joint=" | "))


def _text(error: object) -> str:
    """Returns the text of an error; its type, if it has none, or raises when asked for it."""
    try:
        return str(error).replace("\0", "\\0") or type(error).__name__  # zeros are the padding of notes
    except Exception:  # of any kind: raised on this rank alone, it would leave the others waiting
        return type(error).__name__


def by_rank(notes: list[str], ranks: tuple[int, ...], *, skip_empty: bool = False, joint: str = " and ") -> str:
    """Groups equal notes: ``64 on ranks 0, 2-63 and 32 on rank 1``. ``skip_empty`` puts the ranks first."""
    holders: dict[str, list[int]] = {}
    for rank, note in zip(ranks, notes, strict=True):
        if note or not skip_empty:
            holders.setdefault(note, []).append(rank)
    parts = []
    for note, who in holders.items():
        where = named(who)
        parts.append(f"On {where}: {note}" if skip_empty else f"{note} on {where}")
    return joint.join(parts)
