# SPDX-License-Identifier: BSD-3-Clause
"""Copies the state of optimizers, LR schedulers and GradScalers from one rank to all.

W ranks.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from syncbn.training.join import nested_values
from syncbn.training.join.nested_values import Encoder, Group
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport

Source = Optimizer | LRScheduler | GradScaler
"""What has state that changes with each training step."""


def as_tuple(optimizer: Any) -> tuple[Any, ...]:
    """Returns the argument of `join` as a tuple; nothing in it has been checked yet."""
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns the parameters of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def names_of(model: nn.Module) -> dict[int, str]:
    """Returns the name of each parameter by its ``id``. A compiled model has the names of the model."""
    return {id(p): name.replace("_orig_mod.", "") for name, p in model.named_parameters()}


def require_same(
    sources: Sequence[Any], model: nn.Module, transport: AbstractTransport, error: Exception | None = None
) -> None:
    """Raises on every rank unless all have the same kinds, over the same parameters in the same order.

    Args:
        sources: what was passed to `join`.
        model: where the names of the parameters come from.
        transport: the group.
        error: an error of this rank that all ranks raise, or None.

    Communication:
        One all-reduce of 2 W float64 values; one more of texts if there is an error.

    Raises:
        TypeError: on every rank, if any rank passed something else.
        ValueError: on every rank, if they differ.
    """
    if wrong := [type(each).__name__ for each in sources if not isinstance(each, Source)]:
        error = TypeError(
            "syncbn.join needs an optimizer, or a list of optimizers, LR schedulers and GradScalers; received "
            f"{', '.join(wrong)}. Write syncbn.join(model, optimizer)."
        )
    names = names_of(model)
    checksum = zlib.crc32(repr([] if wrong else [_layout(each, names) for each in sources]).encode())
    row = torch.tensor([float(checksum), float(error is not None)], dtype=torch.float64, device="cpu")
    checksums, errors = gather.gather(row, transport).T.tolist()
    if any(errors):
        gather.raise_gathered(error, transport)
    if len(set(checksums)) > 1:
        text = f"{', '.join(map(_describe, sources)) or 'no optimizer'} (checksum {checksum:08x})"
        received = gather.by_rank(gather.gather_notes(text, transport), transport.ranks)
        raise ValueError(
            "syncbn.join needs the same optimizers on every rank, over the same parameters in the same order; "
            f"received {received}. Make them alike, and pass them in one order."
        )


def broadcast(sources: Sequence[Source], model: nn.Module, root: int, group: Group) -> None:
    """Copies state and settings from rank ``root`` to every rank. Entries that ``root`` lacks are removed.

    For an optimizer this is ``state`` and ``param_groups`` without the parameters, so that a rank that made no step
    gets all of it. For a scheduler and a scaler it is the ``state_dict()``. If no scheduler was passed, a rank whose
    settings, such as ``lr``, were different warns.

    Communication:
        One comparison, two broadcasts of text, then one for every 64 MB of one dtype. By every rank.

    Raises:
        TypeError: on every rank, if the state holds anything but tensors, numbers, text and containers of these.
        ValueError: on every rank, if the optimizers differ.
    """
    if not sources:  # on no rank
        return
    encoder, encoded, error = Encoder(), None, None
    if group.host.rank == root:
        try:
            encoded = ["list", [encoder.encode(_read(each), type(each).__name__) for each in sources]]
        except TypeError as found:
            error = TypeError(
                "syncbn.join(model, optimizer) needs state of tensors, numbers, text, and dicts, lists and tuples of "
                f"these, since it copies it to the ranks that ended early; received {found}. Take it out of the state, "
                "or give every rank the same number of steps."
            )
    require_same(sources, model, group.host, error)
    values = nested_values.broadcast(encoded, encoder.tensors, root, group)
    if group.host.rank != root:
        scheduled = any(isinstance(each, LRScheduler) for each in sources)
        for each, value in zip(sources, values, strict=True):
            if isinstance(each, Optimizer) and not scheduled:
                _warn_of_settings(each, value["param_groups"])
            _write(each, value)


def _read(source: Source) -> dict[Any, Any]:
    if not isinstance(source, Optimizer):
        state: dict[Any, Any] = source.state_dict()
        return state
    # Not its state_dict(): load_state_dict() would cast float32 state of a bfloat16 parameter.
    index = {id(p): i for i, p in enumerate(params_of(source))}
    return {
        "state": {index.get(id(key), key): value for key, value in source.state.items()},
        "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in source.param_groups],
    }


def _write(source: Source, values: dict[Any, Any]) -> None:
    if not isinstance(source, Optimizer):
        source.load_state_dict(values)
        return
    params = params_of(source)
    source.state.clear()
    source.state.update({params[k] if isinstance(k, int) else k: v for k, v in values["state"].items()})
    for group, new in zip(source.param_groups, values["param_groups"], strict=True):
        group.update(new)


def _warn_of_settings(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    for own, new in zip(optimizer.param_groups, groups, strict=True):
        if moved := [key for key, value in new.items() if repr(own.get(key)) != repr(value)]:
            changes = ", ".join(f"{key} {own.get(key)} where the rank that went on has {new[key]}" for key in moved)
            warnings.warn(
                "syncbn.join needs the scheduler that changes an optimizer's settings, or it falls behind on ranks "
                f"that ended early; received {changes}. The settings were copied. Pass the scheduler too: "
                "syncbn.join(model, [optimizer, scheduler]).",
                RuntimeWarning,
                stacklevel=2,
            )
            return


def _layout(source: Source, names: Mapping[int, str]) -> list[Any]:
    groups = [group["params"] for group in source.param_groups] if isinstance(source, Optimizer) else []
    described = [[(names.get(id(p), ""), tuple(p.shape), str(p.dtype)) for p in group] for group in groups]
    return [type(source).__module__, type(source).__qualname__, described]


def _describe(source: Source) -> str:
    of = f" of {len(params_of(source))} parameters" if isinstance(source, Optimizer) else ""
    return f"{type(source).__name__}{of}"
