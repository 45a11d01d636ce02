# SPDX-License-Identifier: BSD-3-Clause
"""What `join` sends: before a collective, every rank announces which one it is, so that finished ranks can follow.

W ranks. A finished rank announces "finished" and takes part in what the others announce.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, final

import torch

from syncbn.transports import gather, watched
from syncbn.transports.base import AbstractTransport

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="Connected")

OPERATIONS = ("forward", "backward", "average_gradients", "loss_scale", "average", "raise_together")
_N = len(OPERATIONS)


class Announcement(NamedTuple):
    """The announcement of one rank."""

    operation: str | None
    """One of ``OPERATIONS``, or None from a finished rank."""
    forward: int = 0
    """The number of this forward, or of the one whose backward this is."""
    flags: int = 0
    """At most 25 bits that must be equal on all ranks that still train."""
    fresh: bool = False
    """Whether every gradient is None or zero."""
    needs_example: bool = False
    error: Exception | None = None
    """Why this rank leaves the loop or cannot go on. All ranks raise it."""


class Outcome(NamedTuple):
    """The outcome: what all ranks that still train have announced."""

    operation: str | None
    """None if every rank is finished."""
    forward: int
    flags: int
    fresh: bool
    needs_example: bool
    finished: int


def announce(said: Announcement, transport: AbstractTransport) -> Outcome:
    """Announces the next operation of this rank to the others, and returns the common outcome.

    Communication:
        One all-reduce of 14 float64 values; one more of texts if there is an error.

    Raises:
        RuntimeError, ValueError, TypeError: on every rank, if any rank announces an error or ranks announce
            different operations.
    """
    own = [float(said.operation == name) for name in OPERATIONS]
    active = float(said.operation is not None)
    numbers = (said.forward, said.forward**2, said.flags, said.flags**2, float(said.fresh)) if active else (0.0,) * 5
    row = [*own, active, *numbers, float(said.needs_example), float(said.error is not None)]
    message = transport.named("the end of syncbn.join" if said.operation is None else f"syncbn.join: {said.operation}")
    wire = transport.reduce(torch.tensor(row, dtype=torch.float64, device="cpu"), message).tolist()
    votes, (count, forward, forward2, flags, flags2, fresh, needs, errors) = wire[:_N], wire[_N:]
    if errors:
        gather.raise_gathered(said.error, transport)
    # All ranks sent one value iff n * sum(v^2) = (sum v)^2.
    if max(votes) < count or forward**2 != forward2 * count or flags**2 != flags2 * count:
        _raise_mismatch(said, transport)
    if count == 0:
        return Outcome(None, 0, 0, False, False, transport.size)
    finished = transport.size - int(count)
    operation = OPERATIONS[votes.index(count)]
    return Outcome(operation, int(forward / count), int(flags / count), fresh == count, needs > 0, finished)


def _raise_mismatch(said: Announcement, transport: AbstractTransport) -> None:
    numbered = said.operation in ("forward", "backward")
    text = f"{said.operation} {said.forward}, flags {said.flags:b}" if numbered else f"{said.operation or 'finished'}"
    received = gather.by_rank(gather.gather_notes(text, transport), transport.ranks)
    raise RuntimeError(
        "syncbn.join needs ranks that still train to make the same calls in the same order, on the same outputs, "
        f"under the same no_grad() and no_sync(); received {received}. Make every step alike on all ranks."
    )


@final
class Hook:
    """A hook of an open `join` on its model. In a copy of the model or a saved one it does nothing."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        # It communicates, so a compiled model must not trace it. A decorator would import torch's compiler with syncbn.
        self._method = None if method is None else torch.compiler.disable(method)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> Any:
        """Calls the method. A copy has none and does nothing."""
        return None if self._method is None else self._method(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """Pickles without the join, which holds live communicators."""
        return Hook, ()


class Connected(Protocol):
    """A World, as this module uses it."""

    @property
    def transport(self) -> AbstractTransport:
        """What connects everyone."""


class Announces(Protocol):
    """An open `join`, as this module uses it."""

    def enter(self, operation: str, transport: AbstractTransport) -> bool:
        """Announces an operation, unless another one is under way. Returns whether it did."""

    def leave(self, *, well: bool) -> None:
        """Notes that the operation has ended, well or with an exception."""


_open: list[Announces] = []
"""The open `join` of this process, if there is one."""


def is_open(joined: Announces | None = None) -> bool:
    """Whether a `join` is open in this process; with an argument, whether it is that one."""
    return bool(_open) and joined in (None, _open[0])


def open_for(joined: Announces) -> None:
    """Makes every World announce its collectives to a `join`."""
    _open.append(joined)


def close() -> None:
    """Undoes ``open_for``."""
    _open.clear()


def announced(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Makes a collective method of World announce itself to an open `join`."""

    @functools.wraps(method)
    def call(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _open or not _open[0].enter(method.__name__, self.transport):
            return method(self, *args, **kwargs)
        well = False
        try:
            result = method(self, *args, **kwargs)
            well = True
        finally:
            _open[0].leave(well=well)
        return result

    return call


_groups: weakref.WeakKeyDictionary[AbstractTransport, AbstractTransport] = weakref.WeakKeyDictionary()


def own_group(everyone: AbstractTransport) -> AbstractTransport:
    """Makes a group for announcements, once: they must not be mixed with the wires of layers.

    Communication:
        At a process's first: that of ``AbstractTransport.split``, and of ``watched.watch``.
    """
    if everyone not in _groups:
        _groups[everyone] = everyone.split(0)
        watched.watch(_groups[everyone])
    return _groups[everyone]
