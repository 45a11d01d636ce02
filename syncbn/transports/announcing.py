# SPDX-License-Identifier: BSD-3-Clause
"""What `join` sends: before a collective, every rank says which one it comes to, so that a finished one can follow.

W ranks. A finished rank only listens: it says "finished" and does what the others do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, final

import torch

from syncbn.transports import agreement
from syncbn.transports.base import AbstractTransport

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="Connected")

OPERATIONS = ("forward", "backward", "average_gradients", "loss_scale", "raise_together")
_N = len(OPERATIONS)


class Said(NamedTuple):
    """What one rank says."""

    operation: str | None
    """One of ``OPERATIONS``, or None from a finished rank."""
    forward: int = 0
    """The number of this forward, or of the one whose backward this is."""
    flags: int = 0
    """Bits that must be equal on all ranks that still train, at most 25."""
    fresh: bool = False
    """Whether every gradient is None or zero."""
    needs_example: bool = False
    error: Exception | None = None
    """Why this rank leaves the loop or cannot go on; all ranks raise it."""


class Heard(NamedTuple):
    """What all ranks that still train say in common."""

    operation: str | None
    """None where every rank is finished."""
    forward: int
    flags: int
    fresh: bool
    needs_example: bool
    finished: int


def announce(said: Said, transport: AbstractTransport) -> Heard:
    """Tells the others what this rank comes to, and hears what they come to.

    Communication:
        One all-reduce of 13 float64 values; one more of texts if there is an error.

    Raises:
        RuntimeError, ValueError, TypeError: on every rank, if any rank brings an error or ranks come to
            different operations.
    """
    own = [float(said.operation == name) for name in OPERATIONS]
    active = float(said.operation is not None)
    numbers = (said.forward, said.forward**2, said.flags, said.flags**2, float(said.fresh)) if active else (0.0,) * 5
    row = [*own, active, *numbers, float(said.needs_example), float(said.error is not None)]
    wire = transport.all_reduce(torch.tensor(row, dtype=torch.float64, device="cpu")).tolist()
    votes, (count, forward, forward2, flags, flags2, fresh, needs, errors) = wire[:_N], wire[_N:]
    if errors:
        agreement.raise_gathered(said.error, transport)
    # Equal numbers are those whose mean of squares is the square of their mean.
    if max(votes) < count or forward**2 != forward2 * count or flags**2 != flags2 * count:
        _raise_mismatch(said, transport)
    if count == 0:
        return Heard(None, 0, 0, False, False, transport.size)
    finished = transport.size - int(count)
    operation = OPERATIONS[votes.index(count)]
    return Heard(operation, int(forward / count), int(flags / count), fresh == count, needs > 0, finished)


def _raise_mismatch(said: Said, transport: AbstractTransport) -> None:
    numbered = said.operation in ("forward", "backward")
    text = f"{said.operation} {said.forward}, flags {said.flags:b}" if numbered else f"{said.operation or 'finished'}"
    received = agreement.by_rank(agreement.gather_notes(text, transport), transport.ranks)
    raise RuntimeError(
        "syncbn.join needs ranks that still train to make the same calls in the same order, on the same outputs, "
        f"under the same no_grad() and no_sync(); received {received}. Make every step alike on all ranks."
    )


@final
class Hook:
    """A hook of an open `join` on its model. A copy of the model, or a saved one, is not in the join."""

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = method

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it communicates, where model is compiled and join is given model
    def __call__(self, *args: Any) -> Any:
        """Calls the method; a copy does nothing."""
        return None if self._method is None else self._method(*args)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """Leaves the join behind: it holds live communicators."""
        return Hook, ()


class Connected(Protocol):
    """A World."""

    @property
    def transport(self) -> AbstractTransport:
        """What connects everyone."""


class Announces(Protocol):
    """What hears of a collective that is about to begin: an open `join`."""

    def enter(self, operation: str, transport: AbstractTransport) -> bool:
        """Announces, unless this happens within another operation; says whether it did."""

    def leave(self, *, well: bool) -> None:
        """Notes that the operation has ended, well or with an exception."""


_open: list[Announces] = []
"""The open `join` of this process, or nothing."""


def is_open(joined: Announces | None = None) -> bool:
    """Whether this process is within a `join`, or within this one."""
    return bool(_open) and joined in (None, _open[0])


def open_for(joined: Announces) -> None:
    """Makes a `join` hear of the collectives of every World."""
    _open.append(joined)


def close() -> None:
    """Ends what ``open_for`` began."""
    _open.clear()


def announced(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Makes a collective method of World tell an open `join` before it begins."""

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
