# SPDX-License-Identifier: BSD-3-Clause
"""What can be wrong with a call on one rank.

A check whose outcome can differ between ranks returns its error instead of raising it: a status travels with the data,
see ``functional.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import DTYPES

NAME = "SyncBatchNorm"
MAX_DIMS = 32
"""The most dims that the compiled kernels take."""
_STRIDED = torch.strided


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
    if not dims[0] <= x.dim() <= dims[1]:
        remedy = dims.remedy
        if x.dim() < 2:
            remedy = "Add a batch dimension with x.unsqueeze(0), or a channel dimension with x.unsqueeze(1)."
        return ValueError(f"{dims.need}; received {x.dim()}, shape {tuple(x.shape)}. {remedy}")
    if x.layout is not _STRIDED or x.is_meta:
        received = "a meta tensor" if x.is_meta else f"layout {x.layout}"
        return TypeError(
            f"{NAME} needs an input whose values are in memory, one after another; received {received}. "
            "Call x.to_dense(), or make it on a device that holds data."
        )
    if not x.size(1):
        return ValueError(
            f"{NAME} needs an input of at least 1 channel; received shape {tuple(x.shape)}. Leave the layer out where "
            "nothing is left to normalise."
        )
    if num_features is not None and x.size(1) != num_features:
        return ValueError(
            f"{NAME} needs input.size(1) == num_features; received {x.size(1)} channels, shape {tuple(x.shape)}, "
            f"for num_features={num_features}. Channels come second, also in channels_last memory format."
        )
    return None


def call_error(x: object, mask: object, num_features: int, eps: float, dims: Dims = ANY_DIMS) -> Exception | None:
    """Returns the error of the input, the mask or eps of a call, or None."""
    if not eps > 0:
        return ValueError(
            f"{NAME} needs eps > 0 in training, or a constant channel would be divided by 0; received {eps:g}. The "
            "default is 1e-5."
        )
    error = input_error(x, num_features, dims)
    if error is None and mask is not None:
        assert isinstance(x, Tensor)
        error = mask_error(mask, x)
    return error


def parameter_error(parameters: Mapping[str, Tensor | None], x: object, num_features: int) -> Exception | None:
    """Returns the error of a weight, bias or running statistic that a caller passed, or None."""
    for name, p in parameters.items():
        if p is None:
            continue
        if tuple(p.shape) != (num_features,) or not p.is_floating_point():
            return ValueError(
                f"{NAME} needs {name} of shape ({num_features},) and a floating dtype; received shape "
                f"{tuple(p.shape)}, {name_of(p.dtype)}. Make it with torch.ones({num_features}), for example."
            )
        if isinstance(x, Tensor) and p.device != x.device:
            return ValueError(
                f"{NAME} needs {name} on the device of the input, {x.device}; received {p.device}. Move it there."
            )
    return None


def most_common_width(parameters: Mapping[str, Tensor | None], x: object) -> int:
    """Returns the most common C among the parameters and x (ties: the first).

    So every rank sends a wire of the same length, even if one of its tensors has another width.
    """
    widths = [p.numel() for p in parameters.values() if p is not None]
    if isinstance(x, Tensor) and x.dim() >= 2:
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
    if mask.dtype.is_complex:
        return TypeError(
            f"{NAME} needs a mask of booleans or weights >= 0; received {name_of(mask.dtype)}. Call mask.real first."
        )
    whole, spatial = tuple(x.shape), tuple(x.shape[2:])
    if tuple(mask.shape) not in ((whole[0], *spatial), (whole[0], 1, *spatial)):
        return ValueError(
            f"{NAME} needs mask.shape == (N, *spatial) or (N, 1, *spatial); received {tuple(mask.shape)} for an input "
            f"of shape {whole}. One weight counts for all channels."
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


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
