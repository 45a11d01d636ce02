# SPDX-License-Identifier: BSD-3-Clause
"""Every user-facing check of the layer and its message.

*The requirement. What was received, with values and rank. What to do.* A check whose outcome can differ
between ranks returns its error instead of raising it: the verdict travels with the data, see ``functional.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from syncbn.agreement import by_rank, gather_notes, raise_gathered
from syncbn.moments import DTYPES, Status
from syncbn.transports.base import AbstractTransport

NAME = "SyncBatchNorm"
MAX_DIMS = 32
"""What the compiled kernels take."""
_STRIDED = torch.strided


def input_error(x: object, num_features: int | None) -> Exception | None:
    """Returns what is wrong with an input of a layer of ``num_features`` channels (None: of any), or None."""
    if not isinstance(x, Tensor):
        return TypeError(f"{NAME} needs a torch.Tensor; received {type(x).__name__}. Convert the input.")
    if x.dtype not in DTYPES:
        names = ", ".join(_name(d) for d in DTYPES)
        return TypeError(
            f"{NAME} needs a floating-point input ({names}); received {_name(x.dtype)}. Call x.float() first."
        )
    if not 2 <= x.dim() <= MAX_DIMS:
        remedy = (
            "Add a batch dimension with x.unsqueeze(0), or a channel dimension with x.unsqueeze(1)."
            if x.dim() < 2
            else "Join spatial dimensions with x.flatten(2)."
        )
        return ValueError(
            f"{NAME} needs input.dim() >= 2, (N, C, *spatial), and at most {MAX_DIMS}; received {x.dim()}, "
            f"shape {tuple(x.shape)}. {remedy}"
        )
    if x.layout is not _STRIDED or x.is_meta:
        received = "a meta tensor" if x.is_meta else f"layout {x.layout}"
        return TypeError(
            f"{NAME} needs an input whose values are in memory, one after another; received {received}. "
            "Call x.to_dense(), or make it on a device that holds data."
        )
    if num_features is not None and x.size(1) != num_features:
        return ValueError(
            f"{NAME} needs input.size(1) == num_features; received {x.size(1)} channels, shape {tuple(x.shape)}, "
            f"for num_features={num_features}. Channels come second, also in channels_last memory format."
        )
    return None


def parameter_error(parameters: Mapping[str, Tensor | None], x: object, num_features: int) -> Exception | None:
    """Returns what is wrong with a weight, a bias or running statistics that a caller gave, or None."""
    for name, p in parameters.items():
        if p is None:
            continue
        if tuple(p.shape) != (num_features,) or not p.is_floating_point():
            return ValueError(
                f"{NAME} needs {name} of shape ({num_features},) and a floating dtype; received shape "
                f"{tuple(p.shape)}, {_name(p.dtype)}. Make it with torch.ones({num_features}), for example."
            )
        if isinstance(x, Tensor) and p.device != x.device:
            return ValueError(
                f"{NAME} needs {name} on the device of the input, {x.device}; received {p.device}. Move it there."
            )
    return None


def agreed_width(parameters: Mapping[str, Tensor | None], x: object) -> int:
    """Returns C as most of the tensors have it; where they tie, as the first does, and x last.

    Every rank must send a wire of one length: a rank with one tensor of another width still finds the others' C.
    """
    widths = [p.numel() for p in parameters.values() if p is not None]
    if isinstance(x, Tensor) and x.dim() >= 2:
        widths.append(x.size(1))
    return Counter(widths).most_common(1)[0][0] if widths else 1


def device_type(x: object) -> str:
    """Returns where an input lives; what holds no values is refused later, together with the other ranks."""
    return x.device.type if isinstance(x, Tensor) and not x.is_cpu and not x.is_meta else "cpu"


def is_recorded(x: object) -> bool:
    """Whether an input stands for others: in torch.jit.trace, in torch.fx, or on the meta device."""
    tracing = bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
    return tracing or isinstance(x, torch.fx.Proxy) or (isinstance(x, Tensor) and x.is_meta)


def raise_if_disagreed(
    count_global: float,
    status: Status,
    transport: AbstractTransport,
    *,
    x: Tensor,
    error: Exception | None,
    grad_enabled: bool,
) -> None:
    """Raises, alike on every rank, what the all-reduced counters of a forward call reveal.

    Args:
        count_global: samples per channel in the global batch.
        status: counters summed over the ranks.
        transport: the group.
        x: this rank's input.
        error: what is wrong with it, or None.
        grad_enabled: whether autograd records on this rank.

    Communication:
        None if all is well. One all-reduce of texts if not, on every rank, since all read the same counters.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    if status.faults:
        raise_gathered(error, transport)
    if status.dtypes > 1:
        notes = gather_notes(_name(x.dtype) if x.numel() else "an empty share", transport)
        raise TypeError(
            f"{NAME} needs input of one dtype on every rank; received {by_rank(notes, transport.ranks)}. "
            "Cast the input, or use the same autocast settings on every rank."
        )
    if 0 < status.grad_enabled < transport.size:
        notes = gather_notes(f"{grad_enabled}", transport)
        raise ValueError(
            f"{NAME} needs torch.is_grad_enabled() to be equal on every rank, or backward would wait forever; "
            f"received {by_rank(notes, transport.ranks)}. Use torch.no_grad() on all ranks or on none, or model.eval()."
        )
    if count_global == 1:
        shapes = by_rank(gather_notes(f"shape {tuple(x.shape)}", transport), transport.ranks)
        raise ValueError(
            f"{NAME} needs at least 2 values per channel in the group to estimate a variance; received 1 over "
            f"{transport.size} rank{'s' if transport.size > 1 else ''}: {shapes}. "
            "Give each rank more samples or call model.eval()."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
