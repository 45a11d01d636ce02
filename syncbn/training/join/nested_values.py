# SPDX-License-Identifier: BSD-3-Clause
"""Broadcasts nested dicts, lists and tuples: their structure as JSON, their tensors as flat buffers."""

from __future__ import annotations

import json
import numbers
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from syncbn.transports.base import AbstractTransport

PACK_BYTES = 2**26
"""A broadcast holds at most this, or one tensor: a second copy of a large state might not fit."""

_DICTS: dict[str, Callable[[Any], Any]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_LISTS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple}


class Group(NamedTuple):
    """The ranks that take part, and what connects them."""

    host: AbstractTransport
    """For text and for tensors that are on the CPU."""
    transport: AbstractTransport
    """For tensors on ``device``, by the same ranks."""
    device: torch.device
    """Where this rank puts tensors that are not on the CPU on the root."""


@final
class Encoder:
    """Turns nested values into JSON and a list of tensors.

    A container becomes ``[kind, items]``, a tensor ``["tensor", index, dtype, shape, stride, on_cpu]``.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def encode(self, value: Any, *path: Any) -> Any:
        """Returns what ``json`` can write of a value.

        Args:
            value: a tensor, a number, text, None, or a dict, list or tuple of these.
            path: the name of the outermost value and the keys that lead to this one.

        Raises:
            TypeError: with the path, if it is anything else.
        """
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, numbers.Integral):  # also NumPy's
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            return self._tensor(value.detach())
        kind = type(value).__name__
        if type(value) in _LISTS.values():
            return [kind, [self.encode(item, *path, i) for i, item in enumerate(value)]]
        if type(value) in _DICTS.values() and all(isinstance(key, str | int | float | None) for key in value):
            return [kind, [[key, self.encode(item, *path, key)] for key, item in value.items()]]
        where = f"{path[0]}{''.join(f'[{key!r}]' for key in path[1:])}"
        raise TypeError(f"{type(value).__module__}.{kind} in {where}")

    def _tensor(self, tensor: Tensor) -> list[Any]:
        self.tensors.append(tensor)
        stride = torch.empty_like(tensor, device="meta").stride()  # dense, also where the tensor is expanded
        index = len(self.tensors) - 1
        return ["tensor", index, str(tensor.dtype), list(tensor.shape), list(stride), tensor.is_cpu]


def broadcast(encoded: Any, tensors: Sequence[Tensor], root: int, group: Group) -> Any:
    """Copies nested values from rank ``root`` to every rank.

    Args:
        encoded: on ``root`` what ``Encoder`` made of them; not read on the others.
        tensors: on ``root`` the tensors of the encoder.
        root: the rank that has them.
        group: the ranks.

    Returns:
        The values: on ``root`` with its own tensors, on the others with new ones of the same dtype, shape and
        layout in memory.

    Communication:
        Two broadcasts of text, then one for every 64 MB of one dtype, or for a larger tensor. By every rank.
    """
    encoded = json.loads(broadcast_text(json.dumps(encoded), root, group.host))
    if group.host.rank == root:
        found = dict(enumerate(tensors))
        for pack in _packs(encoded):
            where = group.host if pack[0].on_cpu else group.transport
            device = torch.device("cpu") if pack[0].on_cpu else group.device
            where.broadcast(torch.cat([found[leaf.place].reshape(-1).to(device) for leaf in pack]), root)
    else:
        found = {index: t for pack in _packs(encoded) for index, t in _receive(pack, root, group)}
    return _decode(encoded, found)


def broadcast_text(text: str, root: int, host: AbstractTransport) -> str:
    """Returns the text of rank ``root``, at least one character.

    Communication:
        Two broadcasts: its length, then its bytes. By every rank.
    """
    wire = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = host.broadcast(torch.tensor([float(len(wire))], dtype=torch.float64, device="cpu"), root)
    wire = wire if host.rank == root else torch.empty(int(length), dtype=torch.uint8, device="cpu")
    return bytes(host.broadcast(wire, root).tolist()).decode()


class _Leaf(NamedTuple):
    """A tensor, as the encoded values describe it."""

    place: int
    """Among the tensors."""
    dtype: torch.dtype
    shape: torch.Size
    stride: list[int]
    on_cpu: bool


def _leaves(encoded: Any) -> Iterator[_Leaf]:
    if not isinstance(encoded, list):
        return
    if encoded[0] == "tensor":
        _, index, dtype, shape, stride, on_cpu = encoded
        yield _Leaf(index, getattr(torch, dtype.removeprefix("torch.")), torch.Size(shape), stride, on_cpu)
        return
    for item in encoded[1]:
        yield from _leaves(item[1] if encoded[0] in _DICTS else item)


def _packs(encoded: Any) -> Iterator[list[_Leaf]]:
    """Yields the tensors that travel in one broadcast: of one dtype, all on the CPU or none."""
    packs: dict[Any, list[_Leaf]] = {}
    sizes: Counter[Any] = Counter()
    for leaf in _leaves(encoded):
        key, size = (leaf.dtype, leaf.on_cpu), leaf.shape.numel() * leaf.dtype.itemsize
        if key in packs and sizes[key] + size > PACK_BYTES:
            yield packs.pop(key)
            sizes[key] = 0
        packs.setdefault(key, []).append(leaf)
        sizes[key] += size
    yield from packs.values()


def _receive(pack: list[_Leaf], root: int, group: Group) -> Iterator[tuple[int, Tensor]]:
    sizes = [leaf.shape.numel() for leaf in pack]
    device = torch.device("cpu") if pack[0].on_cpu else group.device
    flat = torch.empty(sum(sizes), dtype=pack[0].dtype, device=device)
    (group.host if pack[0].on_cpu else group.transport).broadcast(flat, root)
    for leaf, values in zip(pack, torch.split(flat, sizes), strict=True):
        tensor = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=device)
        yield leaf.place, tensor.copy_(values.view(leaf.shape))


def _decode(encoded: Any, tensors: dict[int, Tensor]) -> Any:
    if not isinstance(encoded, list):
        return encoded
    kind, items = encoded[:2]
    if kind == "tensor":
        return tensors[items]
    if kind in _DICTS:
        return _DICTS[kind]({key: _decode(item, tensors) for key, item in items})
    return _LISTS[kind]([_decode(item, tensors) for item in items])
