# SPDX-License-Identifier: BSD-3-Clause
"""Other modules in place of layers, and back: what ``replace`` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

Functions = Mapping[type, Callable[[nn.Module], nn.Module]]
MARK = "_syncbn_replaces"
"""The attribute of a replacement that holds the original. It is no submodule, so a state_dict does not contain it."""


def checked(replace: Functions | None) -> Functions:
    """Returns the functions of ``replace``.

    Raises:
        TypeError: if ``replace`` is not a dict from module classes to functions.
    """
    if replace is None:
        return {}
    need = "replace= needs a dict of {class: function}, where the function takes the old layer and returns the new one"
    if not isinstance(replace, Mapping):
        raise TypeError(f"{need}; received {type(replace).__name__}. For example, {{TheirNorm: make_mine}}.")
    for cls, function in replace.items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{need}; received the key {cls!r}. Pass a class of torch.nn.Module.")
        if not callable(function) or isinstance(function, nn.Module | type):
            received = f"{'the class ' if isinstance(function, type) else ''}{_name(function)} for {cls.__name__}"
            raise TypeError(f"{need}; received {received}. Pass a function that makes a module for each layer.")
    return replace


def _name(thing: object) -> str:
    return thing.__name__ if isinstance(thing, type) else type(thing).__name__


def make(model: nn.Module, layers: Mapping[str, nn.Module], functions: Functions) -> dict[nn.Module, nn.Module]:
    """Calls the functions. Returns the replacement of each layer, in the layer's training mode.

    Args:
        model: holds the layers.
        layers: those to replace, outer ones before inner ones, which go with them.
        functions: of ``replace``.

    Raises:
        TypeError: if a function returns something else than a module.
        ValueError: if it returns a module that the model has already.
    """
    made: dict[nn.Module, nn.Module] = {}
    covered: set[nn.Module] = set()
    for name, old in layers.items():
        if old in covered:
            continue
        inside = set(old.modules())
        covered |= inside
        try:
            new = functions[type(old)](old)
        except Exception as error:
            error.add_note(f"raised by the function of replace= for {name!r}, a {type(old).__name__}")
            raise
        what = f"replace= needs a new module for each {type(old).__name__}; received"
        if not isinstance(new, nn.Module):
            raise TypeError(f"{what} {type(new).__name__} for {name!r}. Return the module that takes its place.")
        if new is old or new in made.values() or (new in set(model.modules()) - inside):
            raise ValueError(f"{what} for {name!r} one that the model has already. Make one module for each layer.")
        made[old] = new
        for module in set(new.modules()) - inside:
            module.training = old.training
    return made


@contextmanager
def put(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Puts modules in the places of others, and back if the body raises.

    Args:
        model: a model, or one layer.
        made: from each old module to the new one.

    Yields:
        ``model``, or what takes its place.
    """
    places = [
        (owner, name, child)
        for owner in (model.modules() if made else ())
        for name, child in owner._modules.items()
        if child is not None and child in made
    ]
    for owner, name, old in places:
        owner._modules[name] = made[old]
    try:
        yield made.get(model, model)
    except BaseException:
        for owner, name, old in places:
            owner._modules[name] = old
        raise


def original(module: nn.Module) -> nn.Module | None:
    """Returns what a module replaces, or None."""
    found: nn.Module | None = vars(module).get(MARK)
    return found


def remember(made: Mapping[nn.Module, nn.Module]) -> None:
    """Keeps each original in its replacement."""
    for old, new in made.items():
        new.__dict__[MARK] = vars(old).pop(MARK, old)  # an assignment would make it a submodule


def obstacle(new: nn.Module) -> str:
    """Says why the original of a replacement cannot come back. Empty if it can."""
    old = original(new)
    assert old is not None
    mine, theirs = ({name for name, _, _ in _tensors(module)} for module in (new, old))
    if mine == theirs:
        return ""
    differ = ", ".join(sorted(mine ^ theirs)[:4])
    return f"it replaces a {type(old).__name__}, and its parameters and buffers have other names ({differ})"


def restore(news: Collection[nn.Module]) -> None:
    """Gives the originals the parameters, buffers and training mode that their replacements have by now."""
    for new in reversed(list(news)):  # inner ones first: an outer one holds the originals of those in it by now
        old = original(new)
        assert old is not None
        held = {name: tables[leaf] for name, tables, leaf in _tensors(new)}
        for name, tables, leaf in _tensors(old):
            tables[leaf] = held[name]
        for module in set(old.modules()) - set(new.modules()):
            module.training = new.training
        del new.__dict__[MARK]


def _tensors(module: nn.Module) -> Iterator[tuple[str, dict[str, object], str]]:
    """Yields the name of each parameter and buffer, where it is held, and under which key."""
    for prefix, part in module.named_modules():
        for tables in (part._parameters, part._buffers):
            for leaf, tensor in tables.items():
                if tensor is not None:
                    yield f"{prefix}.{leaf}".lstrip("."), tables, leaf
