# SPDX-License-Identifier: BSD-3-Clause
"""Every user-facing check of the layer and its message.

*The requirement. What was received, with values and rank. What to do.* A check whose outcome can differ
between ranks returns its error instead of raising it: the verdict travels with the data, see ``functional.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from syncbn import moments
from syncbn.agreement import Notes, by_rank, calls_differ, gather_notes, raise_gathered
from syncbn.moments import DTYPES, Counters, Message, Status
from syncbn.transports.base import AbstractTransport

NAME = "SyncBatchNorm"
MAX_DIMS = 32
"""What the compiled kernels take."""
_STRIDED, _CPU = torch.strided, torch.device("cpu")


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


def call_error(x: object, mask: object, num_features: int, eps: float) -> Exception | None:
    """Returns what is wrong with the input, the mask or eps of a call, or None."""
    if not eps > 0:
        return ValueError(
            f"{NAME} needs eps > 0 in training, or a constant channel would be divided by 0; received {eps:g}. The "
            "default is 1e-5."
        )
    error = input_error(x, num_features)
    if error is None and mask is not None:
        assert isinstance(x, Tensor)
        error = mask_error(mask, x)
    return error


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


def most_common_width(parameters: Mapping[str, Tensor | None], x: object) -> int:
    """Returns the most common C among the parameters and x; ties: the first.

    So every rank sends a wire of the same length, also one of whose tensors one has another width.
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


def is_recorded(x: object) -> bool:
    """Whether an input stands for others: in torch.export, torch.jit.trace, torch.fx, or on the meta device."""
    tracing = torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
    return tracing or isinstance(x, torch.fx.Proxy) or (isinstance(x, Tensor) and x.is_meta)


def raise_problem(
    counters: Counters,
    message: Message,
    notes: Notes,
    transport: AbstractTransport,
    *,
    x: Tensor,
    error: Exception | None,
    grad_enabled: bool,
    late: bool,
) -> None:
    """Raises, alike on every rank, what a reduced forward wire says is wrong. Or see :func:`is_late`.

    Args:
        counters: read from the wire.
        message: the identity of this rank's call.
        notes: of its layer.
        transport: the group.
        x: this rank's input.
        error: what is wrong with it, or None.
        grad_enabled: whether autograd records on this rank.
        late: whether nobody may be asked, see :func:`is_late`.

    Communication:
        None if all is well. One all-reduce of texts if not, on every rank, since all read the same counters.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    problem, what = counters.problem(transport.size), f"{_name(x.dtype)} {tuple(x.shape)}"
    if problem and late:
        own_error = None if error is None else alone(error, transport)
        raise own_error or deferred_error(problem, counters, message, what, LATE_ELSEWHERE)
    if problem == "call":
        transport.serial = message.serial  # no forward was agreed on: after this error the ranks are in step
        raise calls_differ(message, notes, transport)
    if problem == "input":
        raise_gathered(error, transport)
    if problem:
        own = {"dtype": _name(x.dtype) if x.numel() else "an empty local batch", "grad_enabled": f"{grad_enabled}"}
        received = by_rank(gather_notes(own.get(problem, f"shape {tuple(x.shape)}"), transport), transport.ranks)
        over = f"{counters.samples:g} over {_ranks(transport.size)}: " if problem == "count" else ""
        raise problem_error(problem, over + received)


def is_late(x: Tensor, transport: AbstractTransport) -> bool:
    """Whether ranks of a group may learn of a fault at different times: the host waits for no all-reduce of a GPU.

    Some do read the counters: with a mask, in a compiled graph, without CuPy. They cannot know whether the others do.
    So in such a group nobody asks the others about a fault, and every rank whose autograd records joins backward.
    """
    return x.is_cuda and transport.size > 1 and not transport.on_host


def alone(error: Exception, transport: AbstractTransport) -> Exception:
    """Returns an error that this rank raises without a word to the others, led by its rank."""
    return type(error)(by_rank([str(error)], (transport.ranks[transport.rank],), skip_empty=True))


def problem_error(problem: str, received: str, remark: str = "") -> Exception:
    """Words a problem of :meth:`syncbn.moments.Counters.problem`."""
    needs, remedy, kind = _PROBLEMS[problem]
    return kind(f"{needs}; received {received}. {remedy}{remark}")


_PROBLEMS: dict[str, tuple[str, str, type[Exception]]] = {
    "call": (
        "All ranks must be in one call",
        "Ranks took different branches, ran backward passes in another order, or one of them changed settings.",
        ValueError,
    ),
    "input": (f"{NAME} needs a right input on every rank", "Those ranks say what was wrong with theirs.", ValueError),
    "dtype": (
        f"{NAME} needs input of one dtype on every rank",
        "Cast the input, or use the same autocast settings on every rank.",
        TypeError,
    ),
    "grad_enabled": (
        f"{NAME} needs torch.is_grad_enabled() to be equal on every rank, or backward would wait forever",
        "Use torch.no_grad() on all ranks or on none, or model.eval().",
        ValueError,
    ),
    "count": (
        f"{NAME} needs at least 2 values per channel in the group to estimate a variance",
        "Give each rank more samples or call model.eval().",
        ValueError,
    ),
}
LATE_ELSEWHERE = "Other ranks may find it later, as a GPU is not waited for. End all processes."


def deferred_error(problem: str, counters: Counters, message: Message, what: str, remark: str) -> Exception:
    """Words a problem for which nobody is asked any more: in numbers of ranks, with this rank's call and input.

    Args:
        problem: of the counters.
        counters: of the reduced wire.
        message: the identity of this rank's call.
        what: its input.
        remark: when and where else it is found.
    """
    W, status = message.ranks, Status._make(counters.status)
    votes = ", ".join(f"{_name(d)} on {n:g}" for d, n in zip(DTYPES, status[3:], strict=True) if n)
    received = {
        "call": f"{message} here and another one on some of {_ranks(W)}",
        "input": f"a wrong one on {status.faults:g} of {_ranks(W)}",
        "dtype": f"{votes} of {_ranks(W)}",
        "grad_enabled": f"True on {status.grad_enabled:g} of {_ranks(W)}",
        "count": f"{counters.samples:g} over {_ranks(W)}",
    }[problem]
    return problem_error(problem, received, f" This rank was in {message}, with input {what}. {remark}")


def describe(error: Exception | None) -> str:
    """Turns an error into a text that a compiled graph can hold; nothing into nothing."""
    if error is None:
        return ""
    return ("T" if isinstance(error, TypeError) else "V") + str(error.args[0])


def raise_if_wires_disagree(
    wire: Tensor,
    own: Tensor,
    message: Message,
    notes: Notes,
    transport: AbstractTransport,
    *,
    fault: str,
    mask: Tensor | None,
) -> None:
    """Does what :func:`raise_problem` does where only wires are at hand, as inside an operator.

    Args:
        wire: float64 (2C + 15,), summed over the ranks.
        own: float64 (2C + 15,), what this rank gave.
        message: the identity of this rank's call.
        notes: of its layer.
        transport: the group.
        fault: :func:`describe` of what is wrong with this rank's input.
        mask: this rank's mask, for the error about its values.

    Communication:
        As :func:`raise_problem`.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    counters = moments.read_counters(wire, message.numbers)
    if not counters.problem(transport.size):
        return
    local = moments.read_counters(own, message.numbers)
    error: Exception | None = None
    status = Status._make(local.status)
    if status.faults:
        error = (TypeError if fault[0] == "T" else ValueError)(fault[1:]) if fault else mask_values_error(mask)
    dtype = next((d for d in DTYPES if getattr(status, _name(d))), torch.float32)
    samples = (
        int(min(max(local.samples, 0.0), 2.0**31)) if math.isfinite(local.samples) else 0
    )  # a mask may hold anything
    known = torch.empty(samples, moments.channels(wire), dtype=dtype, device="meta")  # of the input: (N * S, C)
    raise_problem(
        counters,
        message,
        notes,
        transport,
        x=known,
        error=error,
        grad_enabled=bool(status.grad_enabled),
        late=is_late(wire, transport),
    )


def mask_values_error(mask: Tensor | None) -> Exception | None:
    """Returns what is wrong with the values of a mask, which travel as a fault before anyone looks at them, or None."""
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


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
