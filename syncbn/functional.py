# SPDX-License-Identifier: BSD-3-Clause
"""The autograd function. Its two methods are the data flow, step by step.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import checks, groups, kernels, moments, transports
from syncbn.moments import Running, Status
from syncbn.transports.base import AbstractTransport

# An input that always requires a gradient: where any rank needs backward, every rank records it and joins.
_ANCHOR = torch.zeros((), requires_grad=True)


class Call(NamedTuple):
    """What a forward call needs beside its tensors."""

    running: Running | None
    eps: float
    transport: AbstractTransport
    grad_enabled: bool
    error: Exception | None


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalises x by the statistics of the batch of all ranks, as in training.

    y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        x: this rank's share, (N, C, *spatial), any strides, float16, bfloat16, float32 or float64. N may be 0.
        running_mean: (C,), moved in place, or None.
        running_var: (C,), moved in place with the unbiased variance of the global batch, or None.
        weight: (C,) or None.
        bias: (C,) or None.
        momentum: weight of this batch in the running statistics; None averages over ``num_batches_tracked``.
        eps: added to the variance.
        process_group: None for every rank, a torch ProcessGroup, an mpi4py communicator, or a subgroup of a World.
        num_batches_tracked: int64 (), counted up where the running statistics move, or None.

    Returns:
        y, of x's shape, dtype and layout. If no rank has a sample, an empty y, and the buffers untouched.

    Communication:
        Forward: one all-reduce of 2C + 8 float64 values. Backward: one of 2C, by every rank of the group, also
        by an empty share, whenever any rank needs a gradient. C, which is that of weight, bias or running_mean, or
        of x where there is none of them, must be equal on all ranks: nothing compares it, as the layer does.

    Raises:
        ValueError, TypeError: on every rank alike, if the input of any rank is wrong, if dtypes or gradient
            modes differ, or if the group has one value per channel.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1, over the batch of the group.
    """
    given = [p.numel() for p in (weight, bias, running_mean) if p is not None]
    C = given[0] if given else x.size(1)
    weight, bias = (None if p is None else p.resolve_neg() for p in (weight, bias))
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    transport = transports.choose(groups.specify(process_group), checks.device_type(x))
    return apply(x, weight, bias, C, running, eps, transport)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_features: int,
    running: Running | None,
    eps: float,
    transport: AbstractTransport,
) -> Tensor:
    """Runs the autograd function over a transport. See :func:`sync_batch_norm`."""
    error = checks.input_error(x, num_features)
    if error is not None:  # joins the all-reduce with no samples, then raises with the others
        x = torch.empty(0, num_features, device=checks.device_type(x))
    call = Call(running, eps, transport, torch.is_grad_enabled(), error)
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    wanted = wanted or (bias is not None and bias.requires_grad)
    y: Tensor = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, None if wanted else _ANCHOR, call
    )
    return y


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor | None, call: Call
    ) -> Tensor:
        transport = call.transport
        steps = kernels.choose(x) if x.is_cpu else kernels.on_device(x, transport)
        needs_grad = call.grad_enabled and anchor is None
        votes = moments.DTYPE_VOTES[x.dtype] if x.numel() else moments.NO_VOTE
        status = Status(call.error is not None, call.grad_enabled, needs_grad, *votes)

        wire = steps.local_moments(x, status)
        wire = transport.all_reduce(wire)
        count_global, status = steps.read_status(wire)
        checks.raise_if_disagreed(
            count_global, status, transport, x=x, error=call.error, grad_enabled=call.grad_enabled
        )
        running = call.running if count_global > 0 else None
        y: Tensor
        y, stats = steps.normalize(x, wire, weight, bias, running, call.eps, count_global)

        if not status.needs_grad:
            ctx.mark_non_differentiable(y)
        ctx.save_for_backward(x, weight)
        # Beside the saved tensors, at a fraction of their cost: nobody else can change the statistics.
        ctx.state = steps, transport, stats, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = _SyncBatchNorm.backward(ctx, grad_y)
            refused: tuple[Tensor | None, ...] = _OnceDifferentiable.apply(_ANCHOR, *gradients)  # type: ignore[no-untyped-call]
            return refused
        x, weight = ctx.saved_tensors
        steps, transport, stats, bias_dtype = ctx.state
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad

        wire, grad_weight, grad_bias = steps.backward_sums_and_gradients(  # local, as DDP expects: it averages them
            grad_y, x, stats, weight.dtype if needs_weight else None, bias_dtype if needs_bias else None
        )
        wire = transport.all_reduce(wire)

        grad_x = steps.backward_input(grad_y, x, wire, weight, stats) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated, also where grad_y is a constant.

    torch's decorator of that purpose attaches its refusal only where grad_y itself requires a gradient: for a loss
    that is linear in y a second derivative would be dropped in silence.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        del ctx, anchor
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, ...]:
        del ctx, grad
        raise RuntimeError(
            f"{checks.NAME} needs to be differentiated once; received a second derivative, as of a gradient penalty. "
            "Call model.eval() for it, or use a norm without batch statistics there."
        )
