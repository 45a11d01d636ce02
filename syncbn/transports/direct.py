# SPDX-License-Identifier: BSD-3-Clause
"""Sums over gloo by a direct exchange: every rank sends its wire to every other one, and adds all in rank order.

gloo's all-reduce passes a message on 2 (W - 1) times, and each time asks first whether its peer is ready: 4 (W - 1)
one-way delays of the network. Here two receives from every rank are always posted ahead, so a message goes at once, and
a sum takes one delay.

A message is ``[sequence, bytes, dtype, numbers of the call (4), sound]`` and the values. It is received into memory
of a fixed size, so ranks in calls of different length find that out by comparing, where gloo would end the process. A
wire that is too long to be sent W - 1 times leaves its values out: gloo's all-reduce sums it, after the heads agree.

W ranks.
"""

from __future__ import annotations

from collections import deque
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from syncbn.moments import Numbers

TAG = 0x53594E43
"""Of all our messages; a user's own have 0, unless they say otherwise."""
MOST_RANKS = 64
LONGEST = 1 << 16
"""Bytes of a wire that is sent to each of the others."""
_HEAD = 8
"""Values of float64 before those of the wire."""
_AHEAD = 2
"""Receives that are posted from each rank: of this call, and of the next one, which a quick rank may already make."""
_DTYPES = {torch.float64: 0.0, torch.float32: 1.0}


@final
class Direct:
    """The exchange in one group. Every method is collective over it.

    Args:
        group: a process group with gloo for CPU tensors.
        rank: of this process in it.
        size: W.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._rank, self._size, self._sequence = rank, size, 0
        with torch.inference_mode(False):  # the first use may be inside of it, and later ones outside
            self._own = torch.zeros(_HEAD + LONGEST // 8, dtype=torch.float64, device="cpu")
        self._others = [r for r in range(size) if r != rank]
        self._posted: dict[int, deque[tuple[Tensor, Any]]] = {r: deque() for r in self._others}
        for _ in range(_AHEAD):
            for other in self._others:
                self._post(group, other, torch.zeros_like(self._own))

    def _post(self, group: Any, other: int, memory: Tensor) -> None:
        self._posted[other].append((memory, group.recv([memory], other, TAG)))

    def sum(self, wire: Tensor, numbers: Numbers, group: Any, *, sound: bool = True) -> bool | None:
        """Sums a wire in place, if it is not too long. Returns whether; None if ranks are in different calls.

        Args:
            wire: contiguous float64 or float32, on the CPU.
            numbers: of the call.
            group: the process group.
            sound: False if this rank knows already that ranks are in different calls.

        Raises:
            RuntimeError: by gloo, if a rank has ended or does not answer within the limit of the group.
        """
        self._sequence += 1
        flat = wire.detach().view(-1)  # the memory for messages stays, and must not become part of a graph
        small = wire.nbytes <= LONGEST
        head = (self._sequence, wire.nbytes, _DTYPES[wire.dtype], *numbers, float(sound))
        self._own[: len(head)] = torch.tensor(head, dtype=torch.float64, device="cpu")
        if small:
            self._values(self._own, flat).copy_(flat)
        message = self._own[: _HEAD + (wire.nbytes + 7) // 8 if small else _HEAD]
        sent = [group.send([message], other, TAG) for other in self._others]
        parts = {self._rank: self._own}
        for other in self._others:
            memory, receive = self._posted[other].popleft()
            receive.wait()
            parts[other] = memory
        for work in sent:
            work.wait()
        heads = [parts[r][: len(head)].tolist() for r in range(self._size)]
        same = agree(heads)
        if same and small:
            total = self._values(parts[0], flat).double()  # a copy of float32
            total = total.clone() if wire.dtype == torch.float64 else total
            for r in range(1, self._size):
                total += self._values(parts[r], flat)
            flat.copy_(total)
        for other in self._others:
            self._post(group, other, parts[other])
        return small if same else None

    def _values(self, message: Tensor, like: Tensor) -> Tensor:
        return message[_HEAD:].view(like.dtype)[: like.numel()]


_made: WeakKeyDictionary[Any, Direct] = WeakKeyDictionary()


def direct_of(group: Any, rank: int, size: int) -> Direct:
    """Returns the exchange of a group: one, since receives that another one had posted would take its messages."""
    if group not in _made:
        _made[group] = Direct(group, rank, size)
    return _made[group]


def agree(heads: list[list[float]]) -> bool:
    """Whether all ranks are in one call. One that abstains from naming it fits every call of its length."""
    calls = {tuple(head[3:7]) for head in heads if head[3]}
    return len(calls) <= 1 and len({tuple(head[:3]) for head in heads}) == 1 and all(head[7] for head in heads)
