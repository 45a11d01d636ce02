# SPDX-License-Identifier: BSD-3-Clause
"""Gradients, averaged over the ranks: one all-reduce per dtype, which also says whether all ranks have one model.

The first time, ranks compare the layouts of their models in a message of its own. From then on every rank expects the
layout that the group has agreed on, and sends a wire of its length. A rank whose model is another one, or that has an
error, sends zeros of that length and says so. Then all ranks compare again.

    [call (31), differs, gradient? (tensors of the pack), values]     the first wire of a call
    [gradient? (tensors of the pack), values]                         the others, one for each further dtype

W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from syncbn.moments import Message, Numbers
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport
from syncbn.world import packs

WHAT = "World.average_gradients"
_MOST = 64
"""Layouts that a group remembers."""
_BITS, _DIGITS = 4, 5
"""Sums of squares of 4-bit digits are exact in float32 for up to 65,536 ranks; 5 digits hold an integer of a call."""
_HEAD = 1 + 2 * 3 * _DIGITS


class Layout(NamedTuple):
    """What every rank's model has in common."""

    numbers: tuple[float, ...]
    """As ``packs.layout`` counts them."""
    wires: tuple[tuple[torch.dtype, int, int], ...]
    """For each pack: the dtype of its wire, its tensors, and its values."""


@final
class Agreed:
    """The layouts that a group has agreed on: the same on all of its ranks, as it follows from their common calls."""

    def __init__(self) -> None:
        self._last: Layout | None = None
        self._after: dict[Layout, Layout] = {}

    def expected(self) -> Layout | None:
        """Returns the layout that followed the last one the last time, for models that take turns. None: compare."""
        layout = None if self._last is None else self._after.get(self._last, self._last)
        return layout if layout is not None and layout.wires else None

    def note(self, layout: Layout) -> None:
        """Notes the layout of a call."""
        if len(self._after) >= _MOST:
            self._after.clear()
        if self._last is not None:
            self._after[self._last] = layout
        self._last = layout


_agreed: WeakKeyDictionary[AbstractTransport, Agreed] = WeakKeyDictionary()


@torch.no_grad()
def average(
    parameters: Mapping[str, Tensor], error: Exception | None, transport: AbstractTransport, device: torch.device
) -> None:
    """Replaces the gradients by their means over the ranks. See ``World.average_gradients``."""
    agreed = _agreed.setdefault(transport, Agreed())
    groups = packs.by_dtype(parameters.values(), packs.wire_dtype)
    own = Layout(
        tuple(packs.layout(parameters).values()),
        tuple((packs.wire_dtype(p[0]), len(p), sum(packs.real(t.detach()).numel() for t in p)) for p in groups),
    )
    layout = agreed.expected()
    if layout is None or not _send(groups if own == layout and error is None else None, layout, transport, device):
        packs.require_same_layout(parameters, transport, WHAT, error)
        layout = own
        _send(groups, own, transport, device)
    agreed.note(layout)


def _send(
    groups: list[list[Tensor]] | None, layout: Layout, transport: AbstractTransport, device: torch.device
) -> bool:
    """Averages all packs, unless the first wire says that some rank has others. Returns whether none has.

    Args:
        groups: the packs; None if this rank has others than the layout's.
        layout: the one on which the wires depend, the same on every rank.
        transport: the group.
        device: of the wires, the same kind on every rank.
    """
    message = gather.message_of(WHAT, transport)
    for i, (dtype, tensors, values) in enumerate(layout.wires):
        front = [*_head(message.numbers), float(groups is None)] if i == 0 else []
        if groups is None:
            zeros = torch.zeros(tensors + values, dtype=dtype, device=device)
            wire = torch.cat((torch.tensor(front, dtype=dtype, device=device), zeros))
            found = _reduce(wire, len(front), message, transport)
            assert found[_HEAD] > 0
            return False
        front += [float(p.grad is not None) for p in groups[i]]
        parts = [packs.real(torch.zeros_like(p) if p.grad is None else p.grad) for p in groups[i]]
        first = torch.tensor(front, dtype=dtype, device=device)  # the device may decide which library sends
        wire = torch.cat([first, *[part.to(device, dtype).reshape(-1) for part in parts]])
        found = _reduce(wire, len(front), message, transport, named=i == 0)
        if i == 0 and found[_HEAD]:
            return False
        _take(groups[i], wire[len(front) :], found[-tensors:], transport.size)
    return True


def _reduce(
    wire: Tensor, front: int, message: Message, transport: AbstractTransport, *, named: bool = True
) -> list[float]:
    """Sums a wire over the ranks. Returns its first values, after a look at the call that they name."""
    gather.all_reduce(wire, transport, message)
    found: list[float] = wire[:front].tolist()
    if named and found[:_HEAD] != [transport.size * v for v in _head(message.numbers)]:
        raise gather.calls_differ(message, gather.no_notes, transport)
    return found


def _take(pack: list[Tensor], values: Tensor, found: list[float], size: int) -> None:
    """Gives every parameter that has a gradient on some rank the mean."""
    summed = torch.split(values, [packs.real(p.detach()).numel() for p in pack])
    for parameter, total, any_gradient in zip(pack, summed, found, strict=True):
        if any_gradient:
            like = packs.real(parameter.detach())
            mean = (total / size).view_as(like).to(like.device, like.dtype)
            mean = torch.view_as_complex(mean) if parameter.is_complex() else mean
            parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)


def _head(numbers: Numbers) -> list[float]:
    """Returns the slots of a call, small enough for float32: 1, the digits of its integers, and their squares.

    W ranks sent the digit d iff the sum is W * d and the sum of squares W * d^2.
    """
    digits = [float(v >> _BITS * k & 2**_BITS - 1) for v in numbers[1:] for k in range(_DIGITS)]
    return [1.0, *digits, *(d * d for d in digits)]
