# SPDX-License-Identifier: BSD-3-Clause
"""Every user-facing check of the layer and its message.

*The requirement. What was received, with values and rank. What to do.* A check whose outcome can differ
between ranks returns its error instead of raising it: the verdict travels with the data, see ``functional.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from syncbn import kernels, moments
from syncbn.agreement import by_rank, gather_notes, raise_gathered, require_equal
from syncbn.moments import DTYPES, Status
from syncbn.renorm import RenormLimits
from syncbn.transports.base import AbstractTransport

NAME = "SyncBatchNorm"
MAX_DIMS = 32
"""What the compiled kernels take."""
_STRIDED = torch.strided
SETTINGS = ("num_features", "eps", "momentum (-1 is None)", "track_running_stats", *RenormLimits._fields)


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
    most = widths[0] if widths else 1
    for width in widths:  # in the words that torch.compile knows
        if widths.count(width) > widths.count(most):
            most = width
    return most


def mask_error(mask: object, x: Tensor) -> Exception | None:
    """Returns what is wrong with a mask of a good input x, but for its values, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return TypeError(f"{NAME} needs a torch.Tensor as mask; received {type(mask).__name__}. Convert the mask.")
    if mask.dtype.is_complex:
        return TypeError(
            f"{NAME} needs a mask of booleans or weights >= 0; received {_name(mask.dtype)}. Call mask.real first."
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


def place(x: object, *tensors: Tensor | None) -> tuple[str, Exception | None]:
    """Returns what :func:`device_type` and :func:`device_error` do, quickly where all is well."""
    if isinstance(x, Tensor) and not x.is_meta:
        here = x.device
        for t in tensors:
            if t is not None and t.device != here:
                return device_type(x, *tensors), device_error(x, *tensors)
        return here.type, None
    return device_type(x, *tensors), None


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
    if 0 < count_global <= 1:  # with a mask, a sum of weights
        shapes = by_rank(gather_notes(f"shape {tuple(x.shape)}", transport), transport.ranks)
        raise ValueError(
            f"{NAME} needs at least 2 values per channel in the group to estimate a variance; received "
            f"{count_global:g} over {transport.size} rank{'s' if transport.size > 1 else ''}: {shapes}. "
            "Give each rank more samples or call model.eval()."
        )
    if error is not None:  # a GPU tells the others later, see kernels/cuda_verdict.py
        raise error


def describe(error: Exception | None) -> str:
    """Turns an error into a text that a compiled graph can hold; nothing into nothing."""
    if error is None:
        return ""
    return ("T" if isinstance(error, TypeError) else "V") + str(error.args[0])


def raise_if_wires_disagree(
    wire: Tensor, own: Tensor, transport: AbstractTransport, *, fault: str, mask: Tensor | None
) -> None:
    """Does what :func:`raise_if_disagreed` does where only wires are at hand, as inside an operator.

    Args:
        wire: float64 (2C + 8,), summed over the ranks.
        own: float64 (2C + 8,), what this rank gave.
        transport: the group.
        fault: :func:`describe` of what is wrong with this rank's input.
        mask: this rank's mask, for the error about its values.

    Communication:
        As :func:`raise_if_disagreed`.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    count_global, status = kernels.choose(wire).read_status(wire)
    unanimous = status.faults == 0 and status.dtypes <= 1 and status.grad_enabled in (0, transport.size)
    if unanimous and not 0 < count_global <= 1:
        return
    count_local, local = moments.read_status(own)
    error: Exception | None = None
    if local.faults:
        error = (TypeError if fault[0] == "T" else ValueError)(fault[1:]) if fault else _mask_values_error(mask)
    dtype = next((d for d in DTYPES if getattr(local, _name(d))), torch.float32)
    samples = int(min(max(count_local, 0.0), 2.0**31)) if math.isfinite(count_local) else 0  # a mask may hold anything
    C = (wire.numel() - 1 - len(local)) // 2
    share = torch.empty(samples, C, dtype=dtype, device="meta")  # what is known of it: (N * S, C)
    raise_if_disagreed(count_global, status, transport, x=share, error=error, grad_enabled=bool(local.grad_enabled))


def _mask_values_error(mask: Tensor | None) -> Exception:
    assert mask is not None
    values = mask.double()
    return ValueError(
        f"{NAME} needs finite mask values >= 0; received values from {values.nan_to_num().min().item():g} to "
        f"{values.nan_to_num(posinf=torch.inf).max().item():g}, {int(values.isnan().sum())} of them NaN. "
        "Use booleans, or weights that are never negative."
    )


def require_same_settings(settings: Sequence[float], transport: AbstractTransport) -> None:
    """Compares the settings of a layer over the ranks: another C would give the wire another length.

    Args:
        settings: as :data:`SETTINGS` names them.
        transport: the group.

    Communication:
        One all-reduce of 6 W float64 values, by every rank of the group.

    Raises:
        ValueError: on every rank.
    """
    require_equal(dict(zip(SETTINGS, settings, strict=True)), transport, NAME, "Build the same model on every rank.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
