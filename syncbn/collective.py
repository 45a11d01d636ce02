# SPDX-License-Identifier: BSD-3-Clause
"""The all-reduce as two registered operators: opaque to a compiler, ordered, and differentiable any number of times.

N batch, C channels, S product of the spatial dims, W ranks.

A compiled graph holds no communicator, only a number: :func:`key_for` gives a group specification one, and the
operator resolves it when it runs, as the layer does. Both operators have an ordered effect: collectives have no names,
so branches that do not depend on each other must communicate in one order on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn import checks, renorm, transports
from syncbn.groups import GroupSpec
from syncbn.transports.base import AbstractTransport

ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
"""An input that always requires a gradient: where any rank needs backward, every rank records it and joins."""

_resolvers: dict[int, Callable[[], AbstractTransport]] = {}
_keys: dict[object, int] = {}
_numbers = itertools.count()


def key_for(spec: GroupSpec | None, device_type: str) -> int:
    """Returns the number of a group specification for reducing on a type of device, also while a graph is traced."""
    fields = () if spec is None else (spec.kind, spec.ranks, spec.label, spec.size)
    key: int = _key_of_spec(fields, device_type)
    return key


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _key_of_spec(fields: tuple[Any, ...], device_type: str) -> int:
    """Takes values: an object would be compared by identity, and every layer of a model be compiled anew."""
    spec = GroupSpec(*fields) if fields else None
    return _key((spec, device_type), lambda: transports.choose(spec, device_type))


def key_of(transport: AbstractTransport) -> int:
    """Returns the number of a live transport in this process."""
    return _key(transport, lambda: transport)


def forget(transport: AbstractTransport) -> None:
    """Ends the number of a transport, and lets go of it. No graph may still need it."""
    if transport in _keys:
        del _resolvers[_keys.pop(transport)]


def _key(name: object, resolver: Callable[[], AbstractTransport]) -> int:
    if name not in _keys:
        _keys[name] = next(_numbers)
        _resolvers[_keys[name]] = resolver
    return _keys[name]


@torch.library.custom_op("syncbn::all_reduce", mutates_args=())
def all_reduce(wire: Tensor, anchor: Tensor | None, group: int) -> Tensor:
    """Sums a tensor over the ranks. Its gradient is the sum of the gradients of all ranks.

    Args:
        wire: float64 or float32, of the same shape on every rank.
        anchor: :data:`ANCHOR`, which makes every rank record the backward, or None.
        group: a number that :func:`key_of` or :func:`key_for` returned.

    Returns:
        A new tensor, with the same bits on every rank.

    Communication:
        One all-reduce of ``wire``, by every rank of the group; one of its gradient in backward.
    """
    del anchor
    return _resolvers[group]().all_reduce(wire.clone(memory_format=torch.contiguous_format))


@torch.library.custom_op("syncbn::all_reduce_moments", mutates_args=())
def all_reduce_moments(
    wire: Tensor,
    agreed: Tensor | None,
    mask: Tensor | None,
    group: int,
    fault: str,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums a forward wire over the ranks, and raises on all of them what its counters reveal.

    Args:
        wire: float64 (2C + 8,), as :mod:`syncbn.moments` lays it out.
        agreed: int64 (), on CPU: the token of the group that has compared the layer's settings; None for no layer.
        mask: what the error about a mask is to describe.
        group: a number that :func:`key_of` or :func:`key_for` returned.
        fault: what is wrong with this rank's input, led by the letter of its kind, or nothing.
        settings: the layer's, as :func:`syncbn.checks.require_same_settings` compares them.

    Returns:
        The summed wire, the token of the group, int64 (), and whether running statistics may move, bool (): not where
        activation checkpointing repeats a compiled layer.

    Communication:
        One all-reduce of ``wire``, by every rank. Before it one of 6 W, where ``agreed`` is another group's token.

    Raises:
        ValueError, TypeError: on every rank of the group.
        RuntimeError: where a compiled layer that renormalizes is repeated.
    """
    transport = _resolvers[group]()
    repeated = agreed is not None and torch._C._current_graph_task_id() != -1
    if repeated and tuple(settings[-2:]) != renorm.OFF:
        raise RuntimeError(_RENORM_IS_REPEATED)
    if agreed is not None and agreed.item() != transport.token:
        checks.require_same_settings(settings, transport)
    summed = transport.all_reduce(wire.clone())
    checks.raise_if_wires_disagree(summed, wire, transport, fault=fault, mask=mask)
    token = torch.tensor(transport.token, dtype=torch.int64, device="cpu")
    return summed, token, torch.tensor(not repeated, device=wire.device)


_RENORM_IS_REPEATED = (
    "A compiled SyncBatchNorm with renorm_limits needs its running statistics as they were in the first forward; "
    "received a forward that activation checkpointing repeats, when they have moved. Leave the layer out of the "
    "checkpointed part, or run it eagerly."
)


@all_reduce.register_fake
def _(wire: Tensor, anchor: Tensor | None, group: int) -> Tensor:
    del anchor, group
    return torch.empty_like(wire, memory_format=torch.contiguous_format)


@all_reduce_moments.register_fake
def _(
    wire: Tensor, agreed: Tensor | None, mask: Tensor | None, group: int, fault: str, settings: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    del agreed, mask, group, fault, settings
    token = torch.empty((), dtype=torch.int64, device="cpu")
    return torch.empty_like(wire), token, wire.new_empty((), dtype=torch.bool)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, anchor, ctx.group = inputs
    ctx.save_for_backward(anchor)


def _all_reduce_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return all_reduce(grad, *ctx.saved_tensors, ctx.group), None, None


all_reduce.register_autograd(_all_reduce_gradient, setup_context=_keep)


def keep_order(operator: Any) -> None:
    """Makes compilers run an operator once, in forward, and in its place among the others that have an order.

    The interface is torch's, but not public yet.
    """
    from torch._higher_order_ops import effects

    effects._register_effectful_op(operator, effects._EffectType.ORDERED)


keep_order(torch.ops.syncbn.all_reduce.default)
keep_order(torch.ops.syncbn.all_reduce_moments.default)


def known_all_reduce(local: Tensor, summed: Tensor, group: int) -> Tensor:
    """Returns what :func:`all_reduce` of ``local`` gave before; differentiates like it, and sends nothing forward."""
    known: Tensor = _KnownAllReduce.apply(local, summed, ANCHOR, group)  # type: ignore[no-untyped-call]
    return known


class _KnownAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, summed: Tensor, anchor: Tensor, group: int) -> Tensor:
        del local, anchor
        ctx.group = group
        return summed.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_reduce(grad, ANCHOR, ctx.group), None, None, None
