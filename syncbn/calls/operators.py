# SPDX-License-Identifier: BSD-3-Clause
"""The all-reduce as registered operators: opaque to a compiler, ordered, differentiable any number of times.

N batch, C channels, S product of the spatial dims, W ranks.

A compiled graph holds no communicator and no layer, only numbers: that of a group, see ``keys.py``, and that of a
layer's site. An operator looks both up when it runs. The public operators
``syncbn::all_reduce`` and ``syncbn::all_reduce_moments`` decompose into chained ones, see ``order.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from syncbn import moments
from syncbn.calls import keys, order, renorm, sites
from syncbn.calls.renorm import RenormLimits
from syncbn.calls.sites import Site
from syncbn.checks import problems
from syncbn.moments import FORWARD, Message
from syncbn.transports import gather

ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
"""An input that always requires a gradient. With it every rank records backward, and joins if any rank needs it."""
FUNCTION = Site("sync_batch_norm", compares=False)
"""Stands for the caller of ``functional.sync_batch_norm``, which has no layer."""

_library: Any = torch.library.Library("syncbn", "FRAGMENT")  # type: ignore[no-untyped-call]


def pack_identity(number: int, speaks: int, serial: int, hash: tuple[int, int]) -> Tensor:
    """Packs the identity of a forward for its backward: int64 (5,), on the CPU."""
    return torch.tensor((number, speaks, serial, *hash), dtype=torch.int64, device="cpu")


@torch.library.custom_op("syncbn::chained_all_reduce", mutates_args=())
def chained_all_reduce(
    wire: Tensor, anchor: Tensor | None, identity: Tensor, group: int, direction: int, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``all_reduce``. Runs after the collective that returned ``before``."""
    del anchor, before
    transport = keys.transport_of(group)
    number, speaks, serial, *hash = identity.tolist()
    numbers = moments.numbers(serial, (hash[0], hash[1]), direction) if speaks else moments.ABSTAINS
    site = sites.of_number(number)
    message = Message(numbers, transport.size, "a dropped layer" if site is None else site.label, direction, serial)
    wire = wire.clone(memory_format=torch.contiguous_format)
    wire[: moments.CALL] = wire.new_tensor(moments.head(numbers))
    wire = gather.all_reduce(wire, transport, message)
    if not moments.same_call(wire[: moments.CALL].tolist(), numbers):
        raise gather.calls_differ(message, gather.no_notes, transport)
    return wire, identity.clone()


@torch.library.custom_op("syncbn::chained_all_reduce_moments", mutates_args=())
def chained_all_reduce_moments(
    wire: Tensor,
    site: Tensor | None,
    mask: Tensor | None,
    group: int,
    fault: str,
    settings: Sequence[float],
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``all_reduce_moments``. Runs after the collective that returned ``before``."""
    del before
    transport = keys.transport_of(group)
    caller = FUNCTION if site is None else sites.of_number(int(site)) or FUNCTION
    repeated = site is not None and caller.replays and torch._C._current_graph_task_id() != -1
    if repeated and tuple(settings[-2:]) != renorm.OFF:
        raise RuntimeError(_RENORM_IS_REPEATED)
    own = sites.of_floats(settings)
    sites.agree_once(caller, own, transport)
    hash, serial = caller.hash(own, transport.group_id), transport.serial
    message = Message(moments.numbers(serial, hash, FORWARD), transport.size, caller.label, FORWARD, serial)
    summed = wire.clone()
    summed[: moments.CALL] = wire.new_tensor(moments.head(message.numbers))
    notes = partial(caller.notes, own, transport.group_id)
    summed = gather.all_reduce(summed, transport, message, notes)
    transport.serial += 1  # even if this rank raises below: with deferred kernels, others may not
    problems.raise_if_wires_disagree(summed, wire, message, notes, transport, fault=fault, mask=mask)
    identity = pack_identity(int(caller.number), 1, serial, hash)
    return summed, identity, torch.tensor(not repeated, device=wire.device)


_RENORM_IS_REPEATED = (
    "A compiled SyncBatchNorm with renorm_limits needs the running statistics of its first forward; received a forward "
    "that activation checkpointing repeats, after they have moved. Leave the layer out of the checkpointed part, or "
    "run it eagerly."
)


@chained_all_reduce.register_fake
def _(
    wire: Tensor, anchor: Tensor | None, identity: Tensor, group: int, direction: int, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    del anchor, group, direction, before
    return torch.empty_like(wire, memory_format=torch.contiguous_format), torch.empty_like(identity)


@chained_all_reduce_moments.register_fake
def _(
    wire: Tensor,
    site: Tensor | None,
    mask: Tensor | None,
    group: int,
    fault: str,
    settings: Sequence[float],
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    del site, mask, group, fault, settings, before
    identity = torch.empty(5, dtype=torch.int64, device="cpu")
    return torch.empty_like(wire), identity, wire.new_empty((), dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    del output
    _, anchor, identity, ctx.group, ctx.direction, _ = inputs
    ctx.save_for_backward(anchor, identity)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    anchor, identity = ctx.saved_tensors
    return all_reduce(grad, anchor, identity, ctx.group, ctx.direction + 2), None, None, None, None, None


chained_all_reduce.register_autograd(_gradient, setup_context=_save)
order.keep(torch.ops.syncbn.chained_all_reduce.default)
order.keep(torch.ops.syncbn.chained_all_reduce_moments.default)


def _all_reduce(wire: Tensor, anchor: Tensor | None, identity: Tensor, group: int, direction: int) -> Tensor:
    summed, same = torch.ops.syncbn.chained_all_reduce(wire, anchor, identity, group, direction, order.before())
    order.after(same)
    return summed  # type: ignore[no-any-return]


def _all_reduce_moments(
    wire: Tensor, site: Tensor | None, mask: Tensor | None, group: int, fault: str, settings: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    summed, identity, moves = torch.ops.syncbn.chained_all_reduce_moments(
        wire, site, mask, group, fault, settings, order.before()
    )
    order.after(identity)
    return summed, identity, moves


_library.define("all_reduce(Tensor wire, Tensor? anchor, Tensor identity, int group, int direction) -> Tensor")
_library.impl("all_reduce", _all_reduce, "CompositeImplicitAutograd")
_library.define(
    "all_reduce_moments(Tensor wire, Tensor? site, Tensor? mask, int group, str fault, float[] settings)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("all_reduce_moments", _all_reduce_moments, "CompositeImplicitAutograd")


def _all_reduce_each(
    info: Any,
    in_dims: tuple[int | None, ...],
    wire: Tensor,
    anchor: Tensor | None,
    identity: Tensor,
    group: int,
    direction: int,
) -> tuple[Tensor, int]:
    """Sends a message for each wire of a vmap, as a loop would: its length does not depend on how many there are."""
    assert in_dims[0] is not None
    return torch.stack([all_reduce(w, anchor, identity, group, direction) for w in wire.unbind(in_dims[0])]), 0


torch.library.register_vmap("syncbn::all_reduce", _all_reduce_each, lib=_library)


def all_reduce(wire: Tensor, anchor: Tensor | None, identity: Tensor, group: int, direction: int) -> Tensor:
    """Sums a wire over the ranks. Its gradient is the sum of the gradients of all ranks.

    Args:
        wire: float64, of the same shape on every rank. It begins with the call slots, which are filled in here.
        anchor: ``ANCHOR``, which makes every rank record the backward, or None.
        identity: int64 (5,) of the forward, see ``pack_identity``.
        group: a number that ``syncbn.calls.keys.key_of_transport`` or ``key_of_spec`` returned.
        direction: of the message, see ``syncbn.moments.Message``.

    Returns:
        A new tensor, with the same bits on every rank.

    Communication:
        One all-reduce of ``wire``, by every rank of the group; one of its gradient in backward.

    Raises:
        ValueError: on every rank, if some are in another call.
    """
    return torch.ops.syncbn.all_reduce(wire, anchor, identity, group, direction)  # type: ignore[no-any-return]


def all_reduce_moments(
    wire: Tensor, site: Tensor | None, mask: Tensor | None, group: int, fault: str, settings: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums a forward wire over the ranks. If it shows an error on any rank, all ranks raise it.

    Args:
        wire: float64 (2C + 15,), see ``syncbn.moments``. The call slots are filled in here.
        site: int64 (), the number of the layer's site; None for no layer.
        mask: the mask, for an error about its values; or None.
        group: a number that ``syncbn.calls.keys.key_of_transport`` or ``key_of_spec`` returned.
        fault: what is wrong with this rank's input, see ``syncbn.checks.problems.describe``; or an empty string.
        settings: the layer's settings, from ``syncbn.calls.sites.as_floats``.

    Returns:
        The summed wire; the identity of the forward, see ``pack_identity``; and whether running statistics may
        move, bool (): False if activation checkpointing repeats a compiled layer.

    Communication:
        One all-reduce of ``wire``, by every rank. The first time in a group, one comparison of settings before it.

    Raises:
        ValueError, TypeError: on every rank of the group.
        RuntimeError: if activation checkpointing repeats a compiled layer with ``renorm_limits``.
    """
    return torch.ops.syncbn.all_reduce_moments(wire, site, mask, group, fault, settings)  # type: ignore[no-any-return]


def replayed_all_reduce(local: Tensor, summed: Tensor, identity: Tensor, group: int) -> Tensor:
    """Returns the known result of an all-reduce of forward sums. Sends nothing forward; its gradient is all-reduced.

    Args:
        local: float64 (2C,), this rank's ``[sum_x, sum_x2]``.
        summed: float64 (2C,), the sums of all ranks.
        identity: int64 (5,) of that forward, see ``pack_identity``.
        group: the number of its group.
    """
    known: Tensor = _ReplayedAllReduce.apply(local, summed, ANCHOR, identity, group)  # type: ignore[no-untyped-call]
    return known


class _ReplayedAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, summed: Tensor, anchor: Tensor, identity: Tensor, group: int) -> Tensor:
        del local, anchor
        ctx.identity, ctx.group = identity, group
        return summed.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wire = torch.cat((grad.new_zeros(moments.CALL), grad))
        summed = all_reduce(wire, ANCHOR, ctx.identity, ctx.group, FORWARD + 2)
        return summed[moments.CALL :], None, None, None, None


@torch.library.custom_op("syncbn::renorm_correction", mutates_args=())
def renorm_correction(
    wire: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: float, d_max: float
) -> tuple[Tensor, Tensor]:
    """Returns r and d, see ``syncbn.calls.renorm.correction``.

    It is opaque, since a compiler could otherwise recompute it in backward, after the running statistics have moved.
    """
    return renorm.correction(wire, running_mean, running_var, eps, RenormLimits(r_max, d_max))


@renorm_correction.register_fake
def _(
    wire: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: float, d_max: float
) -> tuple[Tensor, Tensor]:
    del running_var, eps, r_max, d_max
    return wire.new_empty(running_mean.numel()), wire.new_empty(running_mean.numel())


order.keep(torch.ops.syncbn.renorm_correction.default)
