# SPDX-License-Identifier: BSD-3-Clause
"""What activation checkpointing needs: a forward that is run again in backward must not communicate again.

A first forward leaves its all-reduced wire here where a second one may come, and the second one, which runs
inside a backward pass, finds it by the bits of its local wire: the kernels are deterministic. An ordinary
training step leaves nothing and looks nothing up.

C channels.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from syncbn.moments import STATUS_SLOTS

MOST = 64
"""First calls of one layer that are kept where no autograd graph keeps them, newest first."""

_graph_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class FirstCall:
    """One forward: the digest of this rank's wire and, once they are there, the wire of all ranks, and r and d."""

    def __init__(self, wire: Tensor) -> None:
        self.count_local = float(wire[0])
        self.digest = _digest(wire)
        self.reduced: Tensor | None = None
        self.correction: tuple[Tensor, Tensor] | None = None
        self.group: Any = None
        """What reduced the wire, a transport or its number: backward goes there, wherever the layer is by then."""
        self.repeated = False


class _Calls:
    """First calls of one layer: ``alive`` as long as a graph or ``recent`` holds them."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[FirstCall] = weakref.WeakSet()
        self.recent: list[FirstCall] = []


_calls: MutableMapping[Any, _Calls] = WeakIdKeyDictionary()  # beside the layers, not on them: these copy and pickle
NOBODY = _Calls  # owns the calls of functional.sync_batch_norm without any tensor of a layer


def concerns(grad_enabled: bool) -> bool:
    """Whether this forward is a recomputation or may see one. Two look-ups of some 50 ns in an ordinary step.

    Reentrant checkpointing runs its first forward under no_grad, the other kind under hooks on saved tensors.
    """
    return not grad_enabled or _graph_task() != -1 or _hooks(True) is not None


def unseen() -> AbstractContextManager[Any]:
    """Hides the operators of a layer from selective checkpointing.

    It matches operators by their order, and a repeated forward has fewer: no collective, no running statistics.
    """
    return _disable_current_modes()


def first_call(owner: Any, wire: Tensor, error: Exception | None) -> FirstCall:
    """Finds the first call that this one repeats, with ``reduced`` set, or begins a new one, with None.

    Args:
        owner: the layer, or a tensor of it.
        wire: float64 (2C + 8,), this rank's, before the all-reduce.
        error: what is wrong with the input of this rank, or None.

    Raises:
        RuntimeError: on this rank, in a recomputation that matches no first call, or several that differ.
    """
    if not repeats(owner):
        return FirstCall(wire)  # also in backward, where nothing was left: it repeats nothing
    calls = _calls[owner]
    if error is not None:
        raise error
    digest = _digest(wire)
    found = [call for call in calls.alive if call.digest == digest]
    if not found:
        raise RuntimeError(_unknown(len(calls.alive)))
    # Without local samples any will do: y and grad_x are empty, and this rank's sums are 0 under any statistics.
    if found[0].count_local and len({_digest(call.reduced) for call in found if call.reduced is not None}) > 1:
        raise RuntimeError(_ambiguous(len(found)))
    for call in found:
        call.repeated = True
    return found[0]


def repeats(owner: Any) -> bool:
    """Whether a forward that runs now can only be the repetition of an earlier one."""
    calls = _calls.get(owner)
    return _graph_task() != -1 and calls is not None and len(calls.alive) > 0


def keep(owner: Any, call: FirstCall, reduced: Tensor, correction: tuple[Tensor, Tensor] | None, *, group: Any) -> None:
    """Keeps a first call: for as long as the caller does, and among the newest ``MOST`` in any case.

    The latter is for what no graph holds: a first forward under no_grad, and one whose output was dropped.
    Those that have been repeated go with the first forward after that.
    """
    call.reduced, call.correction, call.group = reduced, correction, group
    calls = _calls.setdefault(owner, _Calls())
    calls.alive.add(call)
    calls.recent = [*(c for c in calls.recent if not c.repeated), call][-MOST:]


def _digest(wire: Tensor) -> bytes:
    """Hashes count and sums. The status is left out: a recomputation may record where the first call did not."""
    return hashlib.blake2b(wire[: -len(STATUS_SLOTS)].cpu().numpy().tobytes(), digest_size=16).digest()


def _unknown(kept: int) -> str:
    return (
        "SyncBatchNorm needs a forward that activation checkpointing repeats to have the bits of the first one, so "
        f"that it need not communicate again; received other input in backward than in the {kept} forwards kept. "
        "Make the checkpointed part deterministic (preserve_rng_state=True, no input changed in place), call the layer "
        f"outside backward otherwise, and with use_reentrant=True leave at most {MOST} forwards of a layer open."
    )


def _ambiguous(found: int) -> str:
    return (
        "SyncBatchNorm needs to tell the forwards apart that activation checkpointing repeats; received the same sums "
        f"on this rank from {found} forwards of one layer, with other sums on other ranks. Leave the layer out of the "
        "checkpointed part, or use a layer of its own for each call."
    )
