# SPDX-License-Identifier: BSD-3-Clause
"""Refuses the next step of an optimizer whose state a `join` left out of date on some ranks."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from syncbn.training.join import nested_values
from syncbn.training.join.optimizer_state import names_of, params_of
from syncbn.transports.base import AbstractTransport

_refused: weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def refuse(
    stepped: Iterable[Optimizer],
    handed_over: Sequence[Any],
    model: nn.Module,
    root: int,
    *,
    received: str,
    host: AbstractTransport,
) -> None:
    """Makes the next ``step()`` of every stale optimizer an error, on every rank.

    An optimizer is stale if it made a step on ``root`` in the join, has state for a parameter of the model there, and
    was not copied. Its counterpart on another rank may have made no step there, so it is found by its class and the
    names of its parameters. An optimizer that is made later, or loads a state by ``load_state_dict``, is not refused.

    Args:
        stepped: the optimizers that have made a step in the join on this rank.
        handed_over: the optimizers whose state has been copied, see ``optimizer_state.broadcast``.
        model: the model, not wrapped.
        root: the rank that the parameters came from.
        received: the numbers of forwards by rank, for the message.
        host: the group.

    Communication:
        Two broadcasts: the length of a text, and that text. By every rank.
    """
    names = names_of(model)
    handed = {id(each.state) for each in handed_over if isinstance(each, Optimizer)}  # a wrapper shares it
    for optimizer in list(_refused):
        if id(optimizer.state) in handed:
            _let_through(optimizer)
    seen = [each for each in stepped if id(each.state) not in handed]
    text = json.dumps(sorted({_key(each, names) for each in seen if _has_state(each, names)}))
    stale = set(json.loads(nested_values.broadcast_text(text, root, host)))
    if stale:  # the search of all objects takes 0.1 s
        for optimizer in {*seen, *_existing()}:
            if id(optimizer.state) not in handed and _key(optimizer, names) in stale:
                _refuse(optimizer, received)


def _let_through(optimizer: Optimizer) -> None:
    for hook in _refused.pop(optimizer, []):
        hook.remove()


def _refuse(optimizer: Optimizer, received: str) -> None:
    _let_through(optimizer)

    def fail(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() needs the same optimizer state on every rank, but ranks made different "
            f"numbers of steps in a syncbn.join that did not copy it; received {received}. Write "
            "syncbn.join(model, optimizer). Or make a new optimizer, or load one state on every rank with "
            "load_state_dict."
        )

    step = optimizer.register_step_pre_hook(fail)
    # It removes only the other hook: torch iterates over the hooks of this kind while it calls this one.
    load = optimizer.register_load_state_dict_post_hook(lambda _: step.remove())
    _refused[optimizer] = [step, load]


def _has_state(optimizer: Optimizer, names: dict[int, str]) -> bool:
    """Whether it keeps state for a parameter of the model. A plain SGD does not."""
    held = (value for key, value in optimizer.state.items() if id(key) in names)
    return any(item is not None for values in held for item in dict(values).values())


def _key(optimizer: Optimizer, names: dict[int, str]) -> str:
    kind = type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__} {[names.get(id(p), '') for p in params_of(optimizer)]}"


def _existing() -> Iterator[Optimizer]:
    """Yields every optimizer of this process, except those that ``gc.freeze`` hides."""
    for each in gc.get_objects():
        # type() and not isinstance(), which may run code of a proxy. A wrapper without __init__ has no hooks.
        if issubclass(type(each), Optimizer) and {"param_groups", "_optimizer_step_pre_hooks"} <= vars(each).keys():
            yield each
