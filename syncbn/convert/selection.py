# SPDX-License-Identifier: BSD-3-Clause
"""Which layers ``only`` selects: those whose name matches a pattern, or for which a function says so."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

Predicate = Callable[[str, nn.Module], bool]
Only = str | Iterable[str] | Predicate | None
"""A pattern, several of them, a function of (name, layer), or None for all layers."""


def require_module(model: object, what: str) -> None:
    """Raises unless a model is one.

    Raises:
        TypeError: with the name of the function ``what``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{what} needs a torch.nn.Module; received {type(model).__name__}. Pass the model, or one layer; for a "
            "list of them, call it for each."
        )


def choose(model: nn.Module, only: Only, candidate: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Returns the selected candidates of a model, once each, under their first name.

    Args:
        model: a model, or one layer.
        only: see ``syncbn.convert_sync_batchnorm``.
        candidate: whether a module can be selected.

    Raises:
        TypeError: if ``only`` is of another type.
        ValueError: if a pattern matches the name of no candidate.
    """
    found = {_plain(name): module for name, module in model.named_modules() if candidate(module)}
    if only is None:
        return found
    named = [(_plain(n), m) for n, m in model.named_modules(remove_duplicate=False) if candidate(m)]
    if isinstance(model, DistributedDataParallel) and not callable(only):  # names in the model inside are right, too
        named += [(name.removeprefix("module."), module) for name, module in named]
    matches = _matcher(only, [name for name, _ in named])
    selected = {id(module) for name, module in named if _says(matches, name, module)}
    return {name: module for name, module in found.items() if id(module) in selected}


def _plain(name: str) -> str:
    """Returns the name of a layer without the parts that torch.compile adds: a compiled model is the same model."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def _matcher(only: str | Iterable[str] | Predicate, names: list[str]) -> Predicate:
    patterns = [only] if isinstance(only, str) else only
    if isinstance(patterns, nn.Module | type):
        raise _type_error(only)
    if callable(patterns):
        return patterns
    if not isinstance(patterns, Iterable):
        raise _type_error(only)
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"only= needs patterns as str; received {pattern!r:.60} among them.")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(_no_match(pattern, names))
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def _says(matches: Predicate, name: str, module: nn.Module) -> bool:
    try:
        return bool(matches(name, module))
    except Exception as error:
        error.add_note(f"raised by the function of only= for {name!r}; it takes (name, layer)")
        raise


def _type_error(only: object) -> TypeError:
    hint = " For a class, pass lambda name, layer: isinstance(layer, cls)." if isinstance(only, type) else ""
    hint = " For a part of the model, pass its name and '.*'." if isinstance(only, nn.Module) else hint
    return TypeError(
        "only= needs a pattern such as 'layer1.*', a sequence of patterns, or a function of (name, layer); received "
        f"{only if isinstance(only, type) else type(only).__name__}.{hint}"
    )


def _no_match(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    listed = ", ".join(repr(name) for name in close)
    near = f"Names that are close: {listed}." if names else "The model has none."
    return (
        f"only= needs patterns that match the name of a layer to change; received {pattern!r}, which matches none of "
        f"{len(names)}. {near} A pattern matches a whole name, and * also matches dots."
    )
