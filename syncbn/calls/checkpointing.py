# SPDX-License-Identifier: BSD-3-Clause
"""Activation checkpointing: a forward that is repeated in backward must not communicate again.

A first forward that may be repeated stores its all-reduced wire here. The repeated forward runs inside a backward pass
and finds that wire by the bits of its local wire, since the kernels are deterministic. An ordinary training step
stores nothing and looks nothing up.

C channels.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from syncbn import moments
from syncbn.calls.renorm import Renormalize, corrected
from syncbn.moments import ABSTAINS, CALL, STATUS_SLOTS, Message, Running
from syncbn.transports.base import AbstractTransport

MOST = 64
"""How many first calls of one layer are kept when no autograd graph keeps them: the newest."""

_graph_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class FirstCall:
    """One forward: the digest of this rank's wire and, after the all-reduce, the wire of all ranks and r and d."""

    def __init__(self, wire: Tensor) -> None:
        self.count_local = float(moments.count(wire))
        self.digest = _digest(wire)
        self.reduced: Tensor | None = None
        self.correction: tuple[Tensor, Tensor] | None = None
        self.group: AbstractTransport | None = None
        """The transport that reduced the wire. Backward uses it, even if the layer has another group by then."""
        self.message: Message | None = None
        self.repeated = False
        self.alone = True
        """False if other forwards have the same sums on this rank, so that it cannot say which one is repeated."""


@final
class Replay(AbstractTransport):
    """The transport of one call that activation checkpointing may repeat.

    It keeps a first forward with its sums. A repeated forward gets these sums, and nothing is sent.

    Args:
        inner: the transport.
        owner: the layer, or a tensor of it.
        message: the identity of the call.
        error: what is wrong with the input of this rank, or None.
        renorm: what makes r and d, or None.
    """

    name = "replay"

    def __init__(
        self,
        inner: AbstractTransport,
        owner: Any,
        message: Message,
        error: Exception | None,
        renorm: Renormalize | None,
    ) -> None:
        self._owner, self._message, self._error, self._renorm = owner, message, error, renorm
        self._first: FirstCall | None = None
        self._take(inner)

    def _take(self, inner: AbstractTransport) -> None:
        self._inner = inner
        self.rank, self.size, self.ranks, self.group_id = inner.rank, inner.size, inner.ranks, inner.group_id
        self.spec, self.host_synchronous = inner.spec, inner.host_synchronous

    @property
    def sender(self) -> AbstractTransport:
        """See ``AbstractTransport.sender``."""
        return self._inner

    @property
    def serial(self) -> int:
        """See ``AbstractTransport.serial``."""
        return self._inner.serial

    @serial.setter
    def serial(self, serial: int) -> None:
        self._inner.serial = serial

    def reduce(self, wire: Tensor, message: Message) -> Tensor:
        """Sums a wire. If this forward repeats an earlier one, returns the sums of that one instead."""
        if self._first is not None:
            return self._inner.reduce(wire, message)
        self._first = first = first_call(self._owner, wire, self._error)
        if first.reduced is None or first.group is None:
            return self._inner.reduce(wire, message)
        assert first.message is not None
        self.repeated = first.message if first.alone else first.message._replace(numbers=ABSTAINS)
        self._take(first.group)  # no_sync may have begun or ended since
        return first.reduced

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``."""
        return self._inner.all_reduce(wire)

    def adjust(
        self, wire: Tensor, running: Running | None, eps: float, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keeps a first forward, now that the ranks have agreed on it. A repeated one gets the r and d of the first."""
        first = self._first
        assert first is not None
        if first.reduced is None:
            first.correction = None if self._renorm is None else self._renorm.correction(wire, running, eps)
            first.message = self._message
            keep(self._owner, first, wire, group=self._inner)
        return (weight, bias) if first.correction is None else corrected(*first.correction, weight, bias)

    def leave(self) -> None:
        """See ``AbstractTransport.leave``."""
        self._inner.leave()

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self._inner.exchange_notes(note)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        return self._inner.broadcast(tensor, root)

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        return self._inner.split(color)

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        self._inner.barrier()


class _Calls:
    """The first calls of one layer. A call is in ``alive`` while a graph or ``recent`` holds it."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[FirstCall] = weakref.WeakSet()
        self.recent: list[FirstCall] = []


kept_calls: MutableMapping[Any, _Calls] = WeakIdKeyDictionary()  # no attribute of a layer: it would be copied
NOBODY = _Calls  # stands for the owner of a functional.sync_batch_norm that gets no parameter or buffer


def concerns(grad_enabled: bool) -> bool:
    """Whether checkpointing may repeat this forward, or this one may repeat another. Costs two look-ups of 50 ns.

    Reentrant checkpointing runs its first forward under no_grad, the other kind under hooks on saved tensors.
    """
    return not grad_enabled or _graph_task() != -1 or _hooks(True) is not None


def unseen() -> AbstractContextManager[Any]:
    """Hides the operators of a layer from selective checkpointing.

    Selective checkpointing matches operators by their order. A repeated forward has fewer of them: it does not
    communicate and moves no running statistics.
    """
    return _disable_current_modes()


def first_call(owner: Any, wire: Tensor, error: Exception | None) -> FirstCall:
    """Returns the first call that this one repeats, with ``reduced`` set; else a new one, with ``reduced`` None.

    Args:
        owner: the layer, or a tensor of it.
        wire: float64 (2C + 15,), this rank's, before the all-reduce.
        error: what is wrong with the input of this rank, or None.

    Raises:
        RuntimeError: on this rank, if a repeated forward matches no first call, or several that differ.
    """
    if not repeats(owner):
        return FirstCall(wire)  # in backward too, if no first call was stored: there is nothing to repeat
    calls = kept_calls[owner]
    if error is not None:
        raise error
    digest = _digest(wire)
    found = [call for call in calls.alive if call.digest == digest]
    if not found:
        raise RuntimeError(_unknown(len(calls.alive)))
    # With an empty local batch any of them will do: y and grad_x are empty, and this rank adds 0 to every sum.
    if found[0].count_local and len({_digest(call.reduced) for call in found if call.reduced is not None}) > 1:
        raise RuntimeError(_ambiguous(len(found)))
    for call in found:
        call.repeated, call.alone = True, len(found) == 1
    return found[0]


def repeats(owner: Any) -> bool:
    """Whether this forward runs in backward and first calls are stored, so that it must repeat one of them."""
    calls = kept_calls.get(owner)
    return _graph_task() != -1 and calls is not None and len(calls.alive) > 0


def keep(owner: Any, call: FirstCall, reduced: Tensor, *, group: AbstractTransport) -> None:
    """Keeps a first call. It lives as long as its autograd graph. The newest ``MOST`` are kept anyway.

    No graph holds a first forward under no_grad, as reentrant checkpointing runs it, or one whose output was dropped.
    The next first forward drops the calls that have been repeated.
    """
    call.reduced, call.group = reduced, group
    calls = kept_calls.setdefault(owner, _Calls())
    calls.alive.add(call)
    calls.recent = [*(c for c in calls.recent if not c.repeated), call][-MOST:]


def _digest(wire: Tensor) -> bytes:
    """Hashes count and sums. The other slots differ: a repeated forward is a later call and may record gradients."""
    return hashlib.blake2b(wire[CALL : -len(STATUS_SLOTS)].cpu().numpy().tobytes(), digest_size=16).digest()


def _unknown(kept: int) -> str:
    return (
        "SyncBatchNorm needs a forward that activation checkpointing repeats to have the bits of the first one, since "
        f"it does not communicate again; received an input in backward that none of the {kept} forwards kept had. "
        "Make the checkpointed part deterministic (preserve_rng_state=True, no input changed in place). With "
        f"use_reentrant=True, leave at most {MOST} forwards of a layer without their backward. If this forward repeats "
        "none, as in an adjoint ODE block or a reversible network, make the layer with replays=False."
    )


def _ambiguous(found: int) -> str:
    return (
        "SyncBatchNorm needs to know which forward activation checkpointing repeats; received the same sums on this "
        f"rank from {found} forwards of one layer, but different sums on other ranks. Leave the layer out of the "
        "checkpointed part, or use a layer of its own for each call."
    )
