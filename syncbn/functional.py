# SPDX-License-Identifier: BSD-3-Clause
"""The autograd function. Its two methods are the data flow, step by step.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import checks, collective, differentiable, groups, kernels, moments, recomputation, transports
from syncbn.kernels import AbstractKernels
from syncbn.moments import Running, Status
from syncbn.renorm import RenormKernels, RenormLimits, corrected
from syncbn.transports.base import AbstractTransport

# An input that always requires a gradient: where any rank needs backward, every rank records it and joins.
_ANCHOR = torch.zeros((), device="cpu", requires_grad=True)


class Call(NamedTuple):
    """What a forward call needs beside its tensors."""

    running: Running | None
    eps: float
    transport: AbstractTransport
    grad_enabled: bool
    error: Exception | None
    renorm: RenormLimits | None
    owner: Any
    """The layer, where this forward may be one that activation checkpointing repeats; else None."""


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
    mask: Tensor | None = None,
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
        mask: (N, *spatial) or (N, 1, *spatial), boolean or weights >= 0, or None. Where it is 0 a value counts in no
            statistic and gets none of their gradient; it is normalised like the rest.

    Returns:
        y, of x's shape, dtype and layout. If no rank has a sample, an empty y, and the buffers untouched.

    Communication:
        Forward: one all-reduce of 2C + 8 float64 values. Backward: one of 2C, by every rank of the group, also
        by an empty share, whenever any rank needs a gradient. C must be equal on all ranks: nothing compares it, as
        the layer does. It is what most of weight, bias, running_mean, running_var and x say, else the first of them.

    Raises:
        ValueError, TypeError: on every rank alike, if the input or a parameter of any rank is wrong, if dtypes or
            gradient modes differ, or if the group has one value per channel.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1, over the batch of the group.
    """
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    C = checks.agreed_width(parameters, x)
    error = checks.input_error(x, C)
    error = checks.parameter_error(parameters, x, C) if error is None else error
    weight, bias = (None if p is None else p.resolve_neg() for p in (weight, bias))
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    spec, where = groups.specify(process_group), checks.device_type(x, *parameters.values())
    device = None if error is None else checks.device(x, *parameters.values())
    owner = next((t for t in (running_mean, weight, bias) if t is not None), recomputation.NOBODY)
    if mask is not None or torch.compiler.is_compiling():
        group = collective.key_for(spec, where)
        return differentiable.batch_norm(
            x, mask, weight, bias, C, running, eps, group, differentiable.Layer(owner=owner), error, device=device
        )
    transport = transports.choose(spec, where)
    return apply(x, weight, bias, C, running, eps, transport, owner, error=error, device=device)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_features: int,
    running: Running | None,
    eps: float,
    transport: AbstractTransport,
    owner: Any,
    renorm: RenormLimits | None = None,
    error: Exception | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Runs the autograd function over a transport, that of ``device``. See :func:`sync_batch_norm`."""
    error = checks.input_error(x, num_features) or error
    if error is not None:  # joins the all-reduce with no samples, then raises with the others
        x = torch.empty(0, num_features, device=checks.device(x) if device is None else device)
    grad_enabled = torch.is_grad_enabled()
    checkpointed = recomputation.concerns(grad_enabled)
    call = Call(running, eps, transport, grad_enabled, error, renorm, owner if checkpointed else None)
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    wanted = wanted or (bias is not None and bias.requires_grad)
    anchor = None if wanted else _ANCHOR
    if not checkpointed:
        return _apply()(x, weight, bias, anchor, call)
    with recomputation.unseen():
        return _apply()(x, weight, bias, anchor, call)


def _apply() -> Callable[..., Tensor]:
    """Finds the way into the autograd function: past its wrapper, a microsecond, unless torch.func transforms."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return _SyncBatchNorm.apply if transformed else _APPLY


def _steps(x: Tensor, limits: RenormLimits | None, transport: AbstractTransport) -> AbstractKernels:
    steps = kernels.choose(x) if x.is_cpu else kernels.on_device(x, transport)
    return steps if limits is None else RenormKernels(steps, limits)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor | None, call: Call
    ) -> Tensor:
        transport = call.transport
        steps = _steps(x, call.renorm, transport)
        needs_grad = call.grad_enabled and anchor is None
        votes = moments.DTYPE_VOTES[x.dtype] if x.numel() else moments.NO_VOTE
        status = Status(call.error is not None, call.grad_enabled, needs_grad, *votes)

        wire = steps.local_moments(x, status)
        first = None  # under activation checkpointing, the forward that this one repeats, or that may be repeated
        if call.owner is not None:
            first = recomputation.first_call(call.owner, wire, call.error)
        known = None if first is None else first.reduced
        if first is not None and known is not None:
            transport = first.group  # no_sync may have begun or ended since
            steps = _steps(x, call.renorm, transport)  # a GPU's count the ranks that the wire is of
        wire = transport.all_reduce(wire) if known is None else known
        count_global, status = steps.read_status(wire)
        checks.raise_if_disagreed(
            count_global, status, transport, x=x, error=call.error, grad_enabled=call.grad_enabled
        )
        if first is not None and isinstance(steps, RenormKernels):
            steps.correction = first.correction  # the running statistics that it was made of have moved since
        running = call.running if count_global > 0 and known is None else None
        y: Tensor
        y, stats = steps.normalize(x, wire, weight, bias, running, call.eps, count_global)
        if first is not None and known is None:
            correction = steps.correction if isinstance(steps, RenormKernels) else None
            recomputation.keep(call.owner, first, wire, correction, group=transport)

        # A first forward under no_grad could not say who needs a gradient: its repetition records on every rank.
        unneeded = not status.needs_grad and (status.grad_enabled or not call.grad_enabled)
        if unneeded and not checks.is_late(x, transport):  # ranks whose GPU read the counters could not know
            ctx.mark_non_differentiable(y)
        ctx.save_for_backward(x, weight)
        # Beside the saved tensors, at a fraction of their cost: nobody else can change the statistics.
        ctx.state = steps, transport, stats, None if bias is None else bias.dtype, first, wire, call.eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the same wire, in operators that autograd differentiates again
            return _differentiable_backward(ctx, grad_y)
        x, weight = ctx.saved_tensors
        steps, transport, stats, bias_dtype, _, _, _ = ctx.state
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad

        wire, grad_weight, grad_bias = steps.backward_sums_and_gradients(  # local, as DDP expects: it averages them
            grad_y, x, stats, weight.dtype if needs_weight else None, bias_dtype if needs_bias else None
        )
        wire = transport.all_reduce(wire)

        grad_x = steps.backward_input(grad_y, x, wire, weight, stats) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None


def _differentiable_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    steps, transport, _, bias_dtype, _, wire, eps = ctx.state
    needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
    correction = steps.correction if isinstance(steps, RenormKernels) else None
    effective = weight if correction is None else corrected(*correction, weight, None)[0]
    grad_x, grad_weight, sum_grad_y = differentiable.gradients(
        grad_y, x, None, effective, wire, eps, collective.key_of(transport), bias=torch.float64, needs_x=needs_x
    )
    assert sum_grad_y is not None
    if correction is not None and grad_weight is not None:
        r, d = correction
        grad_weight = r * grad_weight + d * sum_grad_y
    grad_weight = grad_weight.to(weight.dtype) if grad_weight is not None and needs_weight else None
    return grad_x, grad_weight, sum_grad_y.to(bias_dtype) if needs_bias else None, None, None


_APPLY: Callable[..., Tensor] = super(torch.autograd.Function, _SyncBatchNorm).apply
