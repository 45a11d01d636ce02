# SPDX-License-Identifier: BSD-3-Clause
"""Modules that torch does not know, since they are in a plain Python container, or hidden from registration."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from syncbn.convert.replacement import MARK

_LEVELS = 2
"""How deep containers are searched: ``self.layers = [{"norm": BatchNorm2d(3)}]`` has two levels."""
_ENTRIES = 1000
"""How many entries of a container are searched."""


class Unregistered(NamedTuple):
    """A module that is no submodule of the model, and where it was found."""

    name: str
    """Its path from the model, for example ``blocks.0.layers[2].norm``."""
    module: nn.Module
    where: str
    """The attribute that holds it, as the end of a sentence."""


def find(model: nn.Module) -> Iterator[Unregistered]:
    """Yields the modules in Python attributes of a model and its submodules that are not registered, each once.

    A module that holds the model itself, such as a reference to its parent, is left out.
    """
    seen = {id(module) for module in model.modules()}
    for owner_name, owner in model.named_modules():
        if isinstance(owner, torch.jit.ScriptModule):  # it keeps parts of itself
            continue
        for attribute, value in vars(owner).items():
            if attribute in _OF_EVERY_MODULE:
                continue
            path = f"{owner_name}.{attribute}" if owner_name else attribute
            for name, root in _modules_in(value, path, _LEVELS):
                if id(root) in seen or any(module is model for module in root.modules()):
                    continue
                held = "attribute " if isinstance(value, nn.Module) else f"Python {type(value).__name__} "
                where = f"in the {held}`{attribute}` of {owner_name or 'the model'}"
                for inner, module in root.named_modules():
                    if id(module) not in seen:
                        seen.add(id(module))
                        yield Unregistered(f"{name}.{inner}" if inner else name, module, where)


def _modules_in(value: Any, path: str, levels: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif levels and isinstance(value, dict):
        for key, entry in islice(value.items(), _ENTRIES):
            yield from _modules_in(entry, f"{path}[{key!r}]", levels - 1)
    elif levels and isinstance(value, (list, tuple)):
        for index, entry in enumerate(islice(value, _ENTRIES)):
            yield from _modules_in(entry, f"{path}[{index}]", levels - 1)


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {MARK}
