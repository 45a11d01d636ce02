# SPDX-License-Identifier: BSD-3-Clause
"""What can be wrong with an argument of a World's method on one rank: returned, since all ranks raise it together."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from syncbn.transports import groups
from syncbn.waits.limits import shown

_LARGEST = 2**53
"""Counts up to it are exact in float64."""


def tensors_of(module: object, what: str, *, buffers: bool) -> tuple[dict[str, Tensor], Exception | None]:
    """Returns the parameters of a module by name, and its buffers, or nothing and what is wrong with it.

    Args:
        module: what a user has passed.
        what: the method.
        buffers: True for all parameters and buffers; False for parameters that require a gradient.
    """
    need = f"{what} needs a torch.nn.Module"
    if not isinstance(module, nn.Module):
        return {}, TypeError(f"{need}; received {type(module).__name__}. Pass the model.")
    try:
        tensors = dict[str, Tensor](module.named_parameters())
        if buffers:
            tensors |= dict(module.named_buffers())
        else:
            tensors = {name: t for name, t in tensors.items() if t.requires_grad}
        wrong = {name: kind for name, t in tensors.items() if (kind := _kind(t))}
    except Exception as error:  # of any kind: a subclass may raise what it likes
        text = f"{type(module).__name__}, of which named_parameters() raised {type(error).__name__}: {error}"
        return {}, TypeError(f"{need} with parameters; received {text:.300}")
    if wrong:
        received = ", ".join(f"{kind} of {name}" for name, kind in wrong.items())
        return {}, ValueError(
            f"{need} whose values are in memory; received {received:.500}. Call a model with lazy layers once before, "
            "or move it to a device that holds data."
        )
    return tensors, None


def _kind(t: Tensor) -> str | None:
    """Names what a tensor is that cannot be packed, or returns None."""
    if is_lazy(t):
        return "the uninitialized values"
    if t.is_meta:
        return "a meta tensor"
    if t.is_nested:
        return "a nested tensor"
    released = type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.numel() and not t.data_ptr()
    return "released memory" if released else None


def root_error(root: object, size: int) -> Exception | None:
    """Returns the error of the rank that sends, or None."""
    if _index(root) in range(size):
        return None
    return ValueError(f"World.broadcast needs a root from 0 to {size - 1}; received {shown(root)}. Pass a rank.")


def count_error(count: object) -> Exception | None:
    """Returns the error of a number of samples, or None."""
    index = _index(count)
    if index is not None and 0 <= index <= _LARGEST:
        return None
    return ValueError(f"World.loss_scale needs an integer count >= 0; received {shown(count)}. Pass len(x).")


def size_error(size: object, ranks: int) -> Exception | None:
    """Returns the error of the size of a subgroup, or None."""
    index = _index(size)
    if index is None:
        return TypeError(f"World.subgroup(size) needs an integer; received {shown(size)}. Pass a number of ranks.")
    try:
        groups.require_divisor(index, ranks, "World.subgroup(size)")
    except ValueError as error:
        return error
    return None


def exception(error: Any) -> Exception | None:
    """Returns an exception or None as it is, else the error for what is neither."""
    if error is None or isinstance(error, BaseException):
        return error  # type: ignore[return-value]
    need = "World.raise_together needs an exception, or None where all is well"
    return TypeError(f"{need}; received {type(error).__name__} {shown(error)}. Pass ValueError(text), for example.")


def _index(value: object) -> int | None:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # of any kind: raised on this rank alone, it would leave the others waiting
        return None


def weighted(value: object, weight: object) -> tuple[tuple[float, float], Exception | None]:
    """Returns weight * value and weight, or zeros and what is wrong with the arguments of ``World.average``."""
    nothing = (0.0, 0.0)
    number, error = _number(value)
    if error is not None:
        need = f"World.average needs one real number; received {error}"
        return nothing, TypeError(f"{need}. Pass loss.item(), for example.")
    counts, error = _number(weight)
    if error is not None or not 0 <= counts < float("inf"):
        need = f"World.average needs a finite weight >= 0; received {error or f'{counts:g}'}"
        return nothing, ValueError(f"{need}. Pass len(x), for example.")
    return (number * counts if counts else 0.0, counts), None


def _number(given: object) -> tuple[float, str | None]:
    """Returns a number and None, or 0 and what was given instead. Whatever converting it raises must not leave here."""
    try:
        if isinstance(given, Tensor) and (given.numel() != 1 or given.is_complex()):
            return 0.0, f"a tensor of shape {tuple(given.shape)}, {str(given.dtype).removeprefix('torch.')}"
        if not isinstance(given, Tensor) and (isinstance(given, str) or not hasattr(given, "__float__")):
            return 0.0, f"{type(given).__name__} {shown(given, 60)}"
        return float(given.item() if isinstance(given, Tensor) else given), None
    except Exception as error:  # of any kind: raised on this rank alone, it would leave the others waiting
        return 0.0, f"{type(given).__name__}, of which float() raised {type(error).__name__}: {error}"[:200]
