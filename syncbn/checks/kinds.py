# SPDX-License-Identifier: BSD-3-Clause
"""Kinds of tensors whose memory the steps cannot read.

C channels.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from syncbn.moments import DTYPES

NAME = "SyncBatchNorm"
MAX_DIMS = 32
"""The most dims that the compiled kernels take."""
COUNTERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *DTYPES)
"""The dtypes of num_batches_tracked, as torch's layer takes them."""
LOWEST = 2**32
"""An address below it may be an offset into memory that has been given back."""
_REMEDIES = {
    "NestedTensor": "Pad it with torch.nested.to_padded_tensor(x, 0.0), and pass a mask of the values that count.",
    "MaskedTensor": "Pass x.get_data(), and a mask without the channel dimension.",
    "DTensor": "Pass x.to_local(): the layer synchronises local batches.",
    "FakeTensor": "Leave the FakeTensorMode, or call model.eval().",
}


def sound(
    x: object,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    C: int,
) -> bool:
    """Whether the steps can take these tensors. A quick answer: if False, there may still be no error."""
    if type(x) is not Tensor:
        return False
    try:
        if x.dtype not in DTYPES or x.layout is not torch.strided or not 2 <= x.dim() <= MAX_DIMS or x.size(1) != C:
            return False
        device, per_channel = x.device, (C,)
        if not C or (x.data_ptr() < LOWEST and x.numel()):
            return False
        for t in (weight, bias, running_mean, running_var):
            if t is not None and (
                t.dtype not in DTYPES or t.shape != per_channel or t.device != device or t.data_ptr() < LOWEST
            ):
                return False
        n = num_batches_tracked
        counts = n is None or (n.dtype is torch.int64 and n.device == device and n.numel() == 1 and n.data_ptr() != 0)
        return counts and (running_mean is None) == (running_var is None)
    except RuntimeError:  # no address, as in torch.func, or no shape, as of a nested tensor
        return False


def kind_error(name: str, t: Tensor) -> Exception | None:
    """Returns the error of a tensor whose memory cannot be read as it is, or None."""
    if t.is_nested or t.layout is not torch.strided or t.is_meta:
        received = "a nested tensor" if t.is_nested else "a meta tensor" if t.is_meta else f"layout {t.layout}"
        remedy = "Call x.to_dense(), or make it on a device that holds data."
        return _unreadable(name, received, _REMEDIES["NestedTensor"] if t.is_nested else remedy)
    if torch.compiler.is_compiling():
        return None
    if t.is_inference() and torch.is_grad_enabled() and name in ("input", "mask", "weight"):
        return ValueError(
            f"{NAME} needs {name} outside torch.inference_mode() if autograd records; received a tensor that was made "
            "inside. Pass a clone of it, or call the layer under torch.no_grad() or in eval mode."
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return TypeError(
            f"{NAME} in training needs {name} outside torch.func; received a tensor of torch.func.grad, vjp, jvp or "
            "vmap. Use backward() or torch.autograd.functional.jacobian(vectorize=True), or call model.eval()."
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[no-untyped-call]
        return TypeError(
            f"{NAME} in training needs {name} without a tangent; received one of forward-mode differentiation. Use "
            "backward() or torch.autograd.functional.jvp, which differentiates twice, or call model.eval()."
        )
    kind = type(t).__name__
    if kind in _REMEDIES:
        return _unreadable(name, f"a {kind}", _REMEDIES[kind])
    if t.numel() and _has_plain_type(name, t) and not _has_memory(t):
        return _unreadable(
            name,
            f"shape {shape_of(t)} and memory that does not hold it",
            "A wrapper has released the memory: call the model through its outermost wrapper, for example the root of "
            "fully_shard.",
        )
    return None


def shape_of(t: Tensor) -> tuple[int, ...]:
    """Returns the shape as numbers, for a text. torch.compile may hold sizes as symbols, which it cannot write down."""
    return tuple([operator.index(n) for n in t.shape])


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def vector_error(name: str, t: object, num_features: int) -> Exception | None:
    """Returns the error of a weight, bias or running statistic, or None; see also ``kind_error``."""
    if not isinstance(t, Tensor):
        return TypeError(
            f"{NAME} needs a torch.Tensor as {name}, or None; received {type(t).__name__}. Make it with "
            f"torch.ones({num_features}), for example."
        )
    if t.is_nested or tuple(t.shape) != (num_features,) or t.dtype not in DTYPES:
        received = "a nested tensor" if t.is_nested else f"shape {shape_of(t)}"
        return ValueError(
            f"{NAME} needs {name} of shape ({num_features},) and a floating dtype; received {received}, "
            f"{name_of(t.dtype)}. Make it with torch.ones({num_features}), for example."
        )
    return None


def counter_error(tracked: object) -> Exception | None:
    """Returns the error of num_batches_tracked, or None."""
    if tracked is None:
        return None
    if not isinstance(tracked, Tensor):
        return TypeError(
            f"{NAME} needs a torch.Tensor as num_batches_tracked, or None; received {type(tracked).__name__}. Make it "
            "with torch.tensor(0)."
        )
    if tracked.dtype not in COUNTERS or tracked.is_nested or tracked.numel() != 1:
        received = "a nested tensor" if tracked.is_nested else f"shape {shape_of(tracked)}"
        return ValueError(
            f"{NAME} needs num_batches_tracked to be one integer or floating-point number; received "
            f"{received}, {name_of(tracked.dtype)}. Make it with torch.tensor(0)."
        )
    return kind_error("num_batches_tracked", tracked)


def _unreadable(name: str, received: str, remedy: str) -> TypeError:
    article = "an input" if name == "input" else name
    return TypeError(
        f"{NAME} needs {article} whose values are in memory, one after another; received {received}. {remedy}"
    )


def _has_plain_type(name: str, t: Tensor) -> bool:
    """Whether a tensor must have memory. An input of a subclass goes to torch's operators, which may do without."""
    return name not in ("input", "mask") or type(t) is Tensor


def _has_memory(t: Tensor) -> bool:
    try:
        end = t.storage_offset() + 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr() != 0 and t.untyped_storage().nbytes() >= end * t.element_size()
    except Exception:  # of any kind: a subclass may raise what it likes
        return False
