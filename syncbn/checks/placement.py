# SPDX-License-Identifier: BSD-3-Clause
"""On which device a rank takes part in a call, even if its input is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.checks.kinds import NAME


def device_type(x: object, *tensors: Tensor | None) -> str:
    """Returns the majority device type of a layer's tensors and its input (ties: not CPU).

    It selects the transport, so a rank whose input stayed on the CPU still joins the group and reports its error. A
    meta tensor does not count; it is refused later, on all ranks.
    """
    types = [t.device.type for t in (*tensors, x) if isinstance(t, Tensor) and not t.is_meta]
    most = types[0] if types else "cpu"
    for each in types:  # a loop, since torch.compile traces this
        if types.count(each) > types.count(most) - (most == "cpu"):
            most = each
    return most


def device(x: object, *tensors: Tensor | None) -> torch.device:
    """Returns the device, of ``device_type``, on which a refused call takes part with an empty local batch."""
    kind = device_type(x, *tensors)
    for t in (*tensors, x):
        if isinstance(t, Tensor) and t.device.type == kind:
            return t.device
    return torch.device(kind)


def device_error(x: Tensor, *tensors: Tensor | None) -> Exception | None:
    """Returns the error of a good input x on another device than a layer's tensors, or None."""
    for t in tensors:
        if t is not None and t.device != x.device:
            return ValueError(
                f"{NAME} needs its input on the device of the layer, {t.device}; received {x.device}. Call "
                f"x.to({str(t.device)!r}), or move the layer."
            )
    return None
