# SPDX-License-Identifier: BSD-3-Clause
"""The skeleton: the data flow, step by step, forward and backward. Every kind of call runs these lines.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

A call (``calls/``) holds what differs: the kernels, and how to reduce. ``calls/eager.py`` has the call of eager mode,
``calls/compiled.py`` those of torch.compile and of second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from syncbn import kernels
from syncbn.calls import compiled, eager
from syncbn.calls.operators import FUNCTION
from syncbn.calls.sites import Layer, plain
from syncbn.checks import inputs, placement
from syncbn.checks.kinds import NAME
from syncbn.kernels.base import Parameters
from syncbn.moments import Running, record
from syncbn.transports.specify import specify

_CPU = torch.device("cpu")
_NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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
        x: this rank's local batch, (N, C, *spatial), any strides, float16, bfloat16, float32 or float64. N may be 0.
        running_mean: (C,), moved in place, or None.
        running_var: (C,), moved in place with the unbiased variance of the global batch, or None.
        weight: (C,) or None.
        bias: (C,) or None.
        momentum: weight of this batch in the running statistics; None averages over ``num_batches_tracked``.
        eps: added to the variance; above 0.
        process_group: None for every rank, a torch ProcessGroup, an mpi4py communicator, or a subgroup of a World.
        num_batches_tracked: one number, counted up in its own dtype where the running statistics move, or None.
        mask: (N, *spatial) or (N, 1, *spatial), boolean or weights >= 0, or None. Where it is 0 a value counts in no
            statistic and gets none of their gradient; it is normalised like the rest.

    Returns:
        y, of x's shape, dtype and layout. If no rank has a sample, an empty y, and mean and variance untouched.

    Communication:
        Forward: one all-reduce of 2C + 15 float64 values. Backward: one of 2C + 7, by every rank of the group, also
        with an empty local batch, whenever any rank needs a gradient. C is the most common one among weight, bias,
        running_mean, running_var and x.

    Raises:
        ValueError, TypeError: on every rank alike, if the input or a parameter of any rank is wrong, if dtypes,
            gradient modes, eps, momentum or C differ, if ranks are in different calls, or if the group has one value
            per channel.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithm 1, over the batch of the group.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    C = inputs.most_common_width(vectors, x)
    weight, bias = (p.resolve_neg() if isinstance(p, Tensor) and p.is_neg() else p for p in (weight, bias))
    tensors = (weight, bias, running_mean, running_var, num_batches_tracked)
    owner = next((t for t in (running_mean, weight, bias) if isinstance(t, Tensor)), None)
    settings = (C, eps, momentum, running_mean is not None and running_var is not None, None)
    return forward(x, mask, tensors, Layer(FUNCTION, settings, specify(process_group), owner))


def forward(
    x: Tensor,
    mask: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    layer: Layer,
    dims: inputs.Dims = inputs.ANY_DIMS,
) -> Tensor:
    """Checks the tensors, then runs the skeleton. See ``sync_batch_norm``.

    Args:
        x: (N, C, *spatial).
        mask: (N, *spatial) or (N, 1, *spatial), or None.
        tensors: weight, bias, running_mean, running_var, num_batches_tracked, each (C,), the last (), or None.
        layer: who calls.
        dims: the numbers of dims that x may have.
    """
    if torch.compiler.is_compiling():
        return _checked(x, mask, tensors, layer, _error(x, mask, tensors, layer, dims))
    C, eps, momentum = layer.settings[:3]
    known = type(eps) is float and (momentum is None or (type(momentum) is float and momentum == momentum))  # noqa: PLR0124
    sound = known and mask is None and eps > 0 and kernels.sound(x, tensors, C)
    if sound and (x.is_inference() or (tensors[0] is not None and tensors[0].is_inference())):
        sound = False
    if sound and (dims is inputs.ANY_DIMS or dims.least <= x.dim() <= dims.most):
        error = None
    else:
        try:
            error = _error(x, mask, tensors, layer, dims)
        except Exception as raised:  # of any kind: on this rank alone, it would leave the others waiting
            received = f"{type(x).__name__}: {type(raised).__name__}: {raised}"
            error = RuntimeError(f"{NAME} needs tensors that it can check; received an input {received:.500}")
    if not known:
        layer = layer._replace(settings=plain(layer.settings))
    if torch._C._are_functorch_transforms_active():  # a tensor that one of them follows is refused: they miss nothing
        with torch._C._DisableFuncTorch(), enable_single_level_autograd_function():
            return _checked(x, mask, tensors, layer, error)
    return _checked(x, mask, tensors, layer, error)


def _checked(
    x: Tensor, mask: Tensor | None, tensors: tuple[Tensor | None, ...], layer: Layer, error: Exception | None
) -> Tensor:
    C, _, momentum, tracks, _ = layer.settings
    weight, bias, mean, var, tracked = tensors
    running = None
    if tracks and mean is not None and var is not None:
        running = record(Running, (mean, var, tracked, momentum))
    if error is not None:  # this rank joins the all-reduce without samples, then raises with the others
        device = placement.device(x, weight, bias, mean, var)
        x, mask, weight, bias = torch.empty(0, C or 1, device=device), None, None, None
    else:
        device = _CPU if x.is_cpu else x.device
    if mask is not None:
        mask = mask.detach().reshape(x.size(0), 1, *x.shape[2:])
    call: eager.Call | compiled.CompiledCall
    if torch.compiler.is_compiling():
        call = compiled.begin(x, mask, running, layer, device, error)
    else:
        call = eager.begin(x, mask, weight, bias, running, layer, device, error)
    if call.hidden is None:
        return batch_norm(x, mask, weight, bias, call)
    with call.hidden:
        return batch_norm(x, mask, weight, bias, call)


def _error(
    x: object, mask: object, tensors: tuple[Tensor | None, ...], layer: Layer, dims: inputs.Dims
) -> Exception | None:
    """Returns what is wrong with a call on this rank, or None."""
    C, eps, momentum = layer.settings[:3]
    of_function, named = layer.site is FUNCTION, dict(zip(_NAMES, tensors, strict=True))
    error = inputs.call_error(x, mask, None if of_function else C, eps, dims, momentum)
    if error is not None:
        return error
    assert isinstance(x, Tensor)
    if of_function:
        return (inputs.widths_error(named, x) if x.size(1) != C else None) or inputs.tensors_error(named, x, x.size(1))
    return placement.device_error(x, tensors[0], tensors[2]) or inputs.tensors_error(named, x, C)


def batch_norm(x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, call: Any) -> Tensor:
    """Normalises a checked x by the statistics of the batch of all ranks.

    Args:
        x: (N, C, *spatial).
        mask: (N, 1, *spatial) or None.
        weight: (C,) or None.
        bias: (C,) or None.
        call: the kernels and the group, see ``calls/eager.py``.
    """
    wire = call.all_reduce(call.local_moments(x, mask))
    weight, bias = call.adjust(wire, weight, bias)
    apply = _Normalize.apply if call.traced else _APPLY
    y: Tensor = apply(x, weight, bias, call.anchor, (wire, mask, call))
    call.finish(wire)
    return y


def _is_batched(grad_y: Tensor) -> bool:
    """Whether a gradient stands for several, in is_grads_batched=True or in a torch.func.vmap around a backward."""
    return torch._C._functorch.is_legacy_batchedtensor(grad_y) or torch._C._functorch.is_batchedtensor(grad_y)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        rest: tuple[Tensor, Tensor | None, Any],
    ) -> Tensor:
        wire, mask, call = rest
        parameters = record(Parameters, (weight, bias, call.eps, call.running))
        y: Tensor
        y, stats = call.steps.normalize(x, wire, parameters, call.message)
        if not call.joins:
            ctx.mark_non_differentiable(y)
        ctx.save_for_backward(x, mask, weight)
        # An attribute costs less than a saved tensor, and needs no version check: nobody else can change these.
        ctx.state = call, wire, stats, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight = ctx.saved_tensors
        call, wire, stats, bias_dtype = ctx.state
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            call, stats = call.differentiable(x, mask, wire)
        elif not call.traced and _is_batched(grad_y):
            call = call.batched()
        message = call.sums_message()

        sums, grad_weight, grad_bias = call.steps.backward_sums(  # these gradients stay local: DDP averages them
            grad_y,
            x,
            stats,
            message.numbers,
            weight.dtype if needs_weight else None,
            bias_dtype if needs_bias else None,
        )
        sums = call.all_reduce_sums(sums, message)
        grad_x = call.steps.backward_input(grad_y, x, mask, sums, weight, stats, message) if needs_x else None
        return grad_x, grad_weight, grad_bias, None, None


_APPLY: Callable[..., Tensor] = super(torch.autograd.Function, _Normalize).apply
"""The C++ base of Function.apply. It skips a 1 us Python wrapper that only torch.func transforms need."""
