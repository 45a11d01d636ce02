# SPDX-License-Identifier: BSD-3-Clause
"""What can be wrong with a call on one rank.

A check whose outcome can differ between ranks returns its error instead of raising it: a status travels with the data,
see ``functional.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.checks.kinds import MAX_DIMS, NAME, counter_error, kind_error, name_of, shape_of, vector_error
from syncbn.moments import DTYPES
from syncbn.waits.limits import shown


class Dims(NamedTuple):
    """The numbers of dims that a layer takes, and the words for another one."""

    least: int
    most: int
    need: str
    remedy: str = "Reshape the input. syncbn.SyncBatchNorm takes any number of spatial dimensions."


ANY_DIMS = Dims(
    2,
    MAX_DIMS,
    f"{NAME} needs input.dim() >= 2, (N, C, *spatial), and at most {MAX_DIMS}",
    "Join spatial dimensions with x.flatten(2).",
)


def input_error(x: object, num_features: int | None, dims: Dims = ANY_DIMS) -> Exception | None:
    """Returns the error of an input of a layer of ``num_features`` channels (None: any number), or None."""
    if not isinstance(x, Tensor):
        return TypeError(f"{NAME} needs a torch.Tensor; received {type(x).__name__}. Convert the input.")
    if x.dtype not in DTYPES:
        names = ", ".join(name_of(d) for d in DTYPES)
        return TypeError(
            f"{NAME} needs a floating-point input ({names}); received {name_of(x.dtype)}. Call x.float() first."
        )
    if x.is_nested:
        return kind_error("input", x)
    if not dims[0] <= x.dim() <= dims[1]:
        remedy = dims.remedy
        if x.dim() < 2:
            remedy = "Add a batch dimension with x.unsqueeze(0), or a channel dimension with x.unsqueeze(1)."
        return ValueError(f"{dims.need}; received {x.dim()}, shape {shape_of(x)}. {remedy}")
    if x.layout is not torch.strided or x.is_meta:
        return kind_error("input", x)
    if not x.size(1):
        return ValueError(
            f"{NAME} needs an input of at least 1 channel; received shape {shape_of(x)}. Leave the layer out where "
            "nothing is left to normalise."
        )
    if num_features is not None and x.size(1) != num_features:
        return ValueError(
            f"{NAME} needs input.size(1) == num_features; received {shape_of(x)[1]} channels, shape {shape_of(x)}, "
            f"for num_features={num_features}. Channels come second, also in channels_last memory format."
        )
    return None


def require_features(num_features: object, dtype: object) -> None:
    """Raises for a number of channels, or a dtype, of which torch's constructor complains in words of its own.

    Raises:
        TypeError, ValueError: on the rank that makes the layer.
    """
    try:
        found = -1 if isinstance(num_features, bool) else operator.index(num_features)  # type: ignore[arg-type]
    except TypeError:
        found = -1
    if found < 0:
        raise ValueError(
            f"{NAME} needs an integer num_features >= 1, the channels of its input; received {shown(num_features)}. "
            "Pass x.size(1)."
        )
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(f"torch.{name_of(d)}" for d in DTYPES)
        raise TypeError(f"{NAME} needs a floating dtype ({names}), or None; received {shown(dtype)}. Pass one of them.")


def number(value: object) -> float:
    """Returns what stands for a number as a float; NaN for anything else."""
    try:
        return math.nan if isinstance(value, (str, bytes, bytearray)) else float(value)  # type: ignore[arg-type]
    except Exception:  # of any kind: raised on this rank alone, it would leave the others waiting
        return math.nan


def is_number(value: object) -> bool:
    """Returns whether something stands for a number that is not NaN.

    Not by ``math.isnan``, which would end the graph of a compiler to which numbers are symbols.
    """
    found = number(value)
    return found == found  # noqa: PLR0124 - NaN does not


def settings_error(eps: object, momentum: object) -> Exception | None:
    """Returns the error of eps or momentum in training, or None."""
    value = number(eps)
    if not value > 0:
        received = value if is_number(eps) else shown(eps)  # a compiler knows no format of a symbol
        return ValueError(
            f"{NAME} needs eps > 0 in training, or a constant channel would be divided by 0; received {received}. The "
            "default is 1e-5."
        )
    if momentum is not None and not is_number(momentum):
        return ValueError(
            f"{NAME} needs a number as momentum, or None to average over all batches; received {shown(momentum)}. The "
            "default is 0.1."
        )
    return None


def call_error(
    x: object, mask: object, num_features: int | None, eps: object, dims: Dims = ANY_DIMS, momentum: object = None
) -> Exception | None:
    """Returns the error of the settings, the input (of ``num_features`` channels, None: any) or the mask, or None."""
    error = settings_error(eps, momentum) or input_error(x, num_features, dims)
    if error is not None:
        return error
    assert isinstance(x, Tensor)
    error = kind_error("input", x) or mask_error(mask, x)
    return error if error is not None or mask is None else kind_error("mask", mask)  # type: ignore[arg-type]


def widths_error(tensors: Mapping[str, object], x: Tensor) -> Exception | None:
    """Returns the error of parameters of which most do not fit a good input of the function, or None.

    Nothing says which is wrong, they or the input, so the error names all.
    """
    vectors = {name: t for name, t in tensors.items() if name != "num_batches_tracked" and isinstance(t, Tensor)}
    lengths = {name: t.numel() for name, t in vectors.items() if not t.is_nested and t.dim() == 1}
    if all(length == x.size(1) for length in lengths.values()):
        return None
    received, shape = ", ".join(f"{name} of {length}" for name, length in lengths.items()), shape_of(x)
    return ValueError(
        f"{NAME} needs input.size(1) values in each parameter and running statistic; received {received}, and an input "
        f"of {shape[1]} channels, shape {shape}. Channels come second, also in channels_last memory format; if the "
        f"input is right, make the others with torch.ones({shape[1]}), for example."
    )


def tensors_error(tensors: Mapping[str, object], x: Tensor, num_features: int) -> Exception | None:
    """Returns the error of a parameter or buffer for a good input x, or None.

    Args:
        tensors: weight, bias, running_mean, running_var and num_batches_tracked, by name.
        x: (N, C, *spatial).
        num_features: C.
    """
    for name, t in tensors.items():
        if t is None or name == "num_batches_tracked":
            continue
        error = vector_error(name, t, num_features)
        if error is not None:
            return error
        assert isinstance(t, Tensor)
        if t.device != x.device:
            return ValueError(
                f"{NAME} needs {name} on the device of the input, {x.device}; received {t.device}. Move it there."
            )
        error = kind_error(name, t)
        if error is not None:
            return error
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    if (mean is None) != (var is None):
        missing, there = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        return ValueError(
            f"{NAME} needs running_mean and running_var, or neither; received {there} without {missing}. Set both to "
            "None to train without them."
        )
    return counter_error(tensors.get("num_batches_tracked"))


def most_common_width(parameters: Mapping[str, object], x: object) -> int:
    """Returns the most common C among the parameters and x (ties: the first).

    So every rank sends a wire of the same length, even if one of its tensors has another width.
    """
    widths = [p.numel() for p in parameters.values() if isinstance(p, Tensor) and not p.is_nested]
    if isinstance(x, Tensor) and x.dim() >= 2 and not x.is_nested:
        widths.append(x.size(1))
    most = widths[0] if widths else 1
    for width in widths:  # a loop, since torch.compile traces this
        if widths.count(width) > widths.count(most):
            most = width
    return most


def mask_error(mask: object, x: Tensor) -> Exception | None:
    """Returns the error of a mask of a good input x, or None. Does not look at its values."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return TypeError(f"{NAME} needs a torch.Tensor as mask; received {type(mask).__name__}. Convert the mask.")
    if mask.is_nested:
        return kind_error("mask", mask)
    if mask.dtype.is_complex:
        return TypeError(
            f"{NAME} needs a mask of booleans or weights >= 0; received {name_of(mask.dtype)}. Call mask.real first."
        )
    whole, spatial = tuple(x.shape), tuple(x.shape[2:])
    if tuple(mask.shape) not in ((whole[0], *spatial), (whole[0], 1, *spatial)):
        return ValueError(
            f"{NAME} needs mask.shape == (N, *spatial) or (N, 1, *spatial); received {shape_of(mask)} for an input "
            f"of shape {shape_of(x)}. One weight counts for all channels."
        )
    if mask.requires_grad:
        return ValueError(
            f"{NAME} needs a mask without a gradient; received mask.requires_grad=True. Pass mask.detach()."
        )
    if mask.device != x.device:
        return ValueError(f"{NAME} needs mask.device == input.device; received {mask.device} for {x.device}. Move it.")
    return None


def is_recorded(x: object) -> bool:
    """Whether an input stands for other values: in torch.export, torch.jit.trace, torch.fx, or on the meta device."""
    tracing = torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
    return tracing or isinstance(x, torch.fx.Proxy) or (isinstance(x, Tensor) and x.is_meta)


def mask_values_error(mask: Tensor | None) -> Exception | None:
    """Returns the error of the values of a mask, or None. Called only after a fault has been found."""
    if mask is None:
        return None
    values = mask.double()
    if bool(((values >= 0) & (values < torch.inf)).all()):
        return None
    return ValueError(
        f"{NAME} needs finite mask values >= 0; received values from {values.nan_to_num().min().item():g} to "
        f"{values.nan_to_num(posinf=torch.inf).max().item():g}, {int(values.isnan().sum())} of them NaN. "
        "Use booleans, or weights that are never negative."
    )
