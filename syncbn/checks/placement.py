# SPDX-License-Identifier: BSD-3-Clause
"""Where a call joins the others, also one whose input is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.checks.inputs import NAME

_CPU = torch.device("cpu")


def place(x: object, *tensors: Tensor | None) -> tuple[torch.device, Exception | None]:
    """Returns what :func:`device` and :func:`device_error` do, quickly where all is well."""
    if isinstance(x, Tensor) and x.is_cpu:  # a device is an object to make, this is not
        for t in tensors:
            if t is not None and not t.is_cpu:
                return device(x, *tensors), device_error(x, *tensors)
        return _CPU, None
    if isinstance(x, Tensor) and not x.is_meta:
        here = x.device
        for t in tensors:
            if t is not None and t.device != here:
                return device(x, *tensors), device_error(x, *tensors)
        return here, None
    return device(x, *tensors), None


def device_type(x: object, *tensors: Tensor | None) -> str:
    """Returns where most of a layer's tensors and its input live; where they tie, not the CPU.

    It decides by which way a rank joins the others: one with an input left on the CPU, or that is no tensor, still goes
    the way of the group. What holds no values is refused later, together with the other ranks.
    """
    types = [t.device.type for t in (*tensors, x) if isinstance(t, Tensor) and not t.is_meta]
    most = types[0] if types else "cpu"
    for each in types:  # in the words that torch.compile knows
        if types.count(each) > types.count(most) - (most == "cpu"):
            most = each
    return most


def device(x: object, *tensors: Tensor | None) -> torch.device:
    """Returns the device of that type on which a refused call joins the others with an empty share."""
    kind = device_type(x, *tensors)
    for t in (*tensors, x):
        if isinstance(t, Tensor) and t.device.type == kind:
            return t.device
    return torch.device(kind)


def device_error(x: Tensor, *tensors: Tensor | None) -> Exception | None:
    """Returns what is wrong with where a good input x is, beside a layer's tensors, or None."""
    for t in tensors:
        if t is not None and t.device != x.device:
            return ValueError(
                f"{NAME} needs its input on the device of the layer, {t.device}; received {x.device}. Call "
                f"x.to({str(t.device)!r}), or move the layer."
            )
    return None
