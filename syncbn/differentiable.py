# SPDX-License-Identifier: BSD-3-Clause
"""The layer in plain torch operators around an opaque all-reduce: for compilers, second derivatives and masks.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

The steps and both wires are those of ``functional.py``, so a rank that comes this way and a rank that does not still
meet. A compiler sees all but the all-reduce; autograd differentiates backward again, any number of times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import checks, collective, moments, recomputation, renorm
from syncbn.moments import Running
from syncbn.renorm import RenormLimits


class Layer(NamedTuple):
    """What belongs to a layer rather than to a call."""

    agreed: Tensor | None = None
    """Says whether the settings have been compared, see :func:`collective.all_reduce_moments`."""
    settings: tuple[float, ...] = ()
    owner: Any = None
    """The layer, or a tensor of it, for :mod:`syncbn.recomputation`; None in a compiled graph."""
    renorm: RenormLimits | None = None


def batch_norm(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_features: int,
    running: Running | None,
    eps: float,
    group: int,
    layer: Layer = Layer(),  # noqa: B008 - immutable
    error: Exception | None = None,
) -> Tensor:
    """Normalises x by the statistics of the batch of all ranks. See :func:`syncbn.functional.sync_batch_norm`.

    Args:
        x: this rank's share, (N, C, *spatial).
        mask: (N, *spatial) or (N, 1, *spatial), boolean or weights, or None.
        weight: (C,) or None.
        bias: (C,) or None.
        num_features: C.
        running: moved in place, or None.
        eps: added to the variance.
        group: a number that :mod:`syncbn.collective` gave.
        layer: the layer, if any.
        error: what is wrong with a parameter, or None.

    Communication:
        That of the layer: 2C + 8 float64 values forward and 2C backward, whatever the mask. Where autograd records,
        every rank joins backward, also where no rank has anything that requires a gradient.
    """
    mean = None if running is None else running.mean
    if error is None:  # not `or`: the compiler of torch 2.11 knows no truth of an exception
        error = checks.input_error(x, num_features)
    if error is None:
        error = checks.device_error(x, weight, mean)
    if error is None:
        error = checks.mask_error(mask, x)
    if error is not None:  # joins the all-reduce with no samples, then raises with the others
        x, mask = torch.empty(0, num_features, device=checks.device(x, weight, mean)), None
    mask = None if mask is None else mask.detach().reshape(x.size(0), 1, *x.shape[2:])
    alone = torch.compiler.is_compiling() or layer.owner is None
    if alone or not recomputation.concerns(torch.is_grad_enabled()):
        return _forward(x, mask, weight, bias, running, eps, group, layer, error)
    with recomputation.unseen():
        return _forward(x, mask, weight, bias, running, eps, group, layer, error, checkpointed=True)


def _forward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    group: int,
    layer: Layer,
    error: Exception | None,
    *,
    checkpointed: bool = False,
) -> Tensor:
    grad_enabled = torch.is_grad_enabled()
    wire = local_moments(x.detach(), mask, fault=error is not None, grad_enabled=grad_enabled)
    first = recomputation.first_call(layer.owner, wire, error) if checkpointed else None
    correction, moves = None, None
    if first is not None and first.reduced is not None:
        wire, running, correction, group = first.reduced, None, first.correction, first.group
    else:
        wire, token, moves = collective.all_reduce_moments(
            wire, layer.agreed, mask, group, checks.describe(error), layer.settings
        )
        if layer.agreed is not None:
            layer.agreed.copy_(token)
        if layer.renorm is not None and running is not None:
            correction = renorm_correction(wire, running.mean, running.var, eps, *layer.renorm)
        if first is not None:
            recomputation.keep(layer.owner, first, wire, correction, group=group)
    if correction is not None:
        weight, bias = renorm.corrected(*correction, weight, bias)
    y: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        x, mask, weight, bias, collective.ANCHOR if grad_enabled else None, wire, eps, group, first
    )
    if running is not None and moves is not None:
        with torch.no_grad():
            move_running(running, wire, moves)
    return y


@torch.library.custom_op("syncbn::renorm_correction", mutates_args=())
def renorm_correction(
    wire: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: float, d_max: float
) -> tuple[Tensor, Tensor]:
    """Returns r and d, see :func:`syncbn.renorm.correction`.

    Opaque: a compiler that saw it might form it again in backward, when the running statistics have moved.
    """
    return renorm.correction(wire, Running(running_mean, running_var, None, None), eps, RenormLimits(r_max, d_max))


@renorm_correction.register_fake
def _(
    wire: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: float, d_max: float
) -> tuple[Tensor, Tensor]:
    del running_var, eps, r_max, d_max
    return wire.new_empty(running_mean.numel()), wire.new_empty(running_mean.numel())


collective.keep_order(torch.ops.syncbn.renorm_correction.default)


def local_moments(x: Tensor, mask: Tensor | None, *, fault: bool, grad_enabled: bool) -> Tensor:
    """Sums x and x * x over N and S into a new forward wire; with a mask, weighted by it.

    The verdict about the mask's values is one more number on the wire: nothing here waits for the host.
    """
    votes = moments.DTYPE_VOTES[x.dtype] if x.numel() else moments.NO_VOTE
    tail = x.new_tensor((float(fault), float(grad_enabled), float(grad_enabled), *votes), dtype=torch.float64)
    if mask is None:
        count = x.new_full((1,), x.numel() // x.size(1), dtype=torch.float64)
    else:
        weights = mask.double()
        count = weights.sum().view(1)
        usable = ((weights >= 0) & (weights < torch.inf)).all()
        tail = torch.cat(((~usable).double().view(1), tail[1:]))
    return torch.cat((count, local_sums(x, mask), tail))


def local_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sums x and x * x over N and S: float64 (2C,). What is masked out is not even read, so it may be NaN."""
    dims = _reduced_dims(x)
    x = x.double()
    if mask is None:
        return torch.cat((x.sum(dims), (x * x).sum(dims)))
    x = torch.where(mask > 0, x, 0.0)
    weighted = x * mask
    return torch.cat((weighted.sum(dims), (weighted * x).sum(dims)))


def gradients(
    grad_y: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    wire: Tensor,
    eps: float,
    group: int,
    *,
    bias: torch.dtype | None,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of x, weight and bias.

    With ``create_graph`` they can be differentiated in turn: mean and invstd are then functions of x, of which the
    value is known and the gradient is not.

    Args:
        grad_y: (N, C, *spatial).
        x: (N, C, *spatial).
        mask: (N, 1, *spatial) or None.
        weight: (C,) or None.
        wire: float64 (2C + 8,), summed over the ranks by forward.
        eps: added to the variance.
        group: a number that :mod:`syncbn.collective` gave.
        bias: its dtype, or None where there is none.
        needs_x: whether x wants its gradient.

    Communication:
        One all-reduce of 2C float64 values. In a second derivative two of 2C, and so on.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        known = collective.known_all_reduce(local_sums(x, mask), wire[1 : 2 * x.size(1) + 1], group)
        wire = torch.cat((wire[:1], known, wire[2 * x.size(1) + 1 :]))
    mean, _, invstd = moments.finalize(wire, eps)

    sum_grad_y, sum_grad_y_xhat = backward_sums(grad_y, x, mean, invstd)
    grad_weight = None if weight is None else sum_grad_y_xhat.to(weight.dtype)
    grad_bias = None if bias is None else sum_grad_y.to(bias)

    sums = collective.all_reduce(torch.cat((sum_grad_y, sum_grad_y_xhat)), collective.ANCHOR, group)

    scale = invstd if weight is None else invstd * weight.double()
    grad_x = backward_input(grad_y, x, mask, sums / wire[0].clamp(min=1.0), mean, invstd, scale) if needs_x else None
    return grad_x, grad_weight, grad_bias


def backward_sums(grad_y: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums grad_y and grad_y * xhat over N and S, also where the mask is 0: y depends on the statistics there too."""
    dims = _reduced_dims(x)
    xhat = (x.double() - _broadcast(mean, x)) * _broadcast(invstd, x)
    grad_y = grad_y.double()
    return grad_y.sum(dims), (grad_y * xhat).sum(dims)


def backward_input(
    grad_y: Tensor, x: Tensor, mask: Tensor | None, means: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor
) -> Tensor:
    """Forms the gradient of the input; what is masked out has no part in the statistics, and none of their gradient.

    grad_x = (grad_y - (sum_grad_y / count + xhat * sum_grad_y_xhat / count) * mask) * invstd * weight
    """
    mean_grad_y, mean_grad_y_xhat = means.chunk(2)
    through_statistics = (x - _channels(mean, x)) * _channels(-invstd * mean_grad_y_xhat, x)
    if mask is None:
        grad_x = through_statistics + grad_y - _channels(mean_grad_y, x)
    else:
        masked = (through_statistics - _channels(mean_grad_y, x)) * mask
        grad_x = torch.where(mask > 0, masked, 0.0) + grad_y
    return (grad_x * _channels(scale, x)).to(x.dtype)


def move_running(running: Running, wire: Tensor, moves: Tensor) -> None:
    """Moves the running statistics as :func:`syncbn.moments.update_running` does, without a look at the host.

    Args:
        running: what moves.
        wire: float64 (2C + 8,), summed over the ranks.
        moves: bool (), whether to.
    """
    mean, var, _ = moments.finalize(wire, 0.0)
    count = wire[0]
    any_sample = (count > 0) & moves
    momentum: float | Tensor = 0.0 if running.momentum is None else running.momentum
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(any_sample.to(torch.int64))
        if running.momentum is None:
            momentum = 1.0 / running.num_batches_tracked.double().clamp(min=1.0)
    unbiased = var * (count / (count - 1.0))
    for buffer, batch in ((running.mean, mean), (running.var, unbiased)):
        moved = buffer.double() * (1.0 - momentum) + batch * momentum
        buffer.copy_(torch.where(any_sample, moved, buffer.double()))


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        wire: Tensor,
        eps: float,
        group: int,
        first: recomputation.FirstCall | None,
    ) -> Tensor:
        del anchor
        ctx.first = first  # keeps it as long as the graph lives
        mean, _, invstd = moments.finalize(wire, eps)
        scale = invstd if weight is None else invstd * weight.double()
        y = (x - _channels(mean, x)) * _channels(scale, x)
        if bias is not None:
            y = y + _channels(bias, x)
        ctx.save_for_backward(x, mask, weight, wire)
        ctx.eps, ctx.group, ctx.bias_dtype = eps, group, None if bias is None else bias.dtype
        # Not `to` where it would be y again: torch 2.11 then compiles a backward that gets no gradient.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, wire = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = gradients(
            grad_y, x, mask, weight, wire, ctx.eps, ctx.group, bias=ctx.bias_dtype, needs_x=ctx.needs_input_grad[0]
        )
        return grad_x, None, grad_weight, grad_bias, None, None, None, None, None


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Views (C,) values as (1, C, 1, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Rounds (C,) values once to the dtype of elementwise arithmetic and broadcasts them over x."""
    return _broadcast(values.to(torch.float64 if x.dtype == torch.float64 else torch.float32), x)
