# SPDX-License-Identifier: BSD-3-Clause
"""Why conversion, or its reverse, refuses a layer: what the change of class would lose.

A layer that changes class keeps the attributes of the instance and gets those of its new class. Three things can be
lost: the class itself, if it is not one that converts; a patch on a class that the new class does not inherit;
and an attribute of the instance that has the name of an attribute of the new class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.convert import classes
from syncbn.convert.lazy import LazySyncBatchNorm
from syncbn.layer import SyncBatchNorm

_CALLS_SUPER = frozenset({"train", "initialize_parameters", "__setstate__"})
"""Our methods that call the method they override, so that a patch on a base class still runs."""
_ABOUT_CLASSES = frozenset({"__init__", "__new__", "__init_subclass__", "convert_sync_batchnorm", "converter"})
"""An existing layer does not use these. Some users patch torch's convert_sync_batchnorm to call ours."""
_MISSING = object()


def to_ours(layer: nn.Module, becomes: classes.Table) -> str:
    """Says what conversion to SyncBatchNorm would lose. Empty if nothing."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is a compiled ScriptModule; convert before torch.jit.script"
    if isinstance(layer, SyncBatchNorm):  # its class stays
        return _replaced(["forward"], SyncBatchNorm) if "forward" in vars(layer) else ""
    _learn(becomes)
    target = becomes.get(type(layer), SyncBatchNorm)
    return (
        _class_obstacle(layer, becomes, "convert")
        or _patch_obstacle(type(layer), target)
        or _attribute_obstacle(layer, target)
    )


def skipped(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the batch norms that their owner does not call with every input, and the reason.

    The BatchNorm of torch_geometric does so: with at most one node it does not call its ``module``.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        layer = getattr(owner, "module", None) if vars(owner).get("allow_single_element") else None
        if isinstance(layer, _BatchNorm):
            name = f"{type(owner).__module__}.{type(owner).__qualname__}"
            found[layer] = (
                f"its owner, a {name}, skips it on a rank with at most one element, and the others would wait; "
                "set allow_single_element=False there: with several ranks, one element on one of them is enough"
            )
    return found


def to_original(layer: SyncBatchNorm, original: type[_BatchNorm] | None, becomes: classes.Table) -> str:
    """Says what the change from SyncBatchNorm back to ``original`` would lose. Empty if nothing."""
    if original is None:
        cls, lazy = type(layer), isinstance(layer, LazySyncBatchNorm)
        made = {SyncBatchNorm, LazySyncBatchNorm, *becomes.values()}
        return _class_obstacle(layer, made, "revert") or (
            f"it was created as {cls.__name__}, and which class it was to be is not known; pass "
            f"otherwise=torch.nn.{'Lazy' * lazy}BatchNorm2d, for example"
        )
    if isinstance(layer, LazySyncBatchNorm) and not issubclass(original, LazyModuleMixin):
        return (
            f"it is lazy and {original.__name__} is not; run one batch first, or pass a lazy class, for example "
            "otherwise=torch.nn.LazyBatchNorm2d"
        )
    if original in classes.LAZY and not isinstance(layer, LazySyncBatchNorm):
        original = original.cls_to_become  # type: ignore[attr-defined]
    assert original is not None
    _learn(becomes)
    spec = layer.process_group
    if issubclass(original, nn.SyncBatchNorm) and spec is not None and spec.kind != "torch":
        return f"torch.nn.SyncBatchNorm cannot have its process_group ({spec}); assign None or a torch group first"
    return (
        _class_obstacle(layer, {SyncBatchNorm, LazySyncBatchNorm, *becomes.values()}, "revert")
        or _patch_obstacle(type(layer), original)
        or _attribute_obstacle(layer, original)
    )


def _class_obstacle(layer: nn.Module, convertible: Collection[type], verb: str) -> str:
    """Refuses a subclass, including one that torch made for this layer."""
    cls = type(layer)
    if cls in convertible:
        return ""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if any(base.__module__.startswith("torch.distributed.") for base in cls.__mro__):
        return f"fully_shard or replicate changed its class ({name}); {verb} before that"
    if parametrize.is_parametrized(layer):
        return (
            f"it is parametrized, which changed its class ({name}); {verb} before that, or after "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    base = next((base for base in cls.__mro__ if base in convertible), _BatchNorm)
    lost = "class and methods" if _attributes(cls)["forward"] is _attributes(base)["forward"] else "forward"
    advice = (
        f"pass replace={{{cls.__name__}: function}}, or leave it out by only=" if verb == "convert" else "replace it"
    )
    return f"its {lost} ({name}) would be lost; {advice}"


def _patch_obstacle(source: type, target: type) -> str:
    """Refuses a class that was patched after import, if the patch does not act on the target."""
    now, before, new = _attributes(source), _AT_IMPORT[source], _attributes(target)
    lost = []
    for name in sorted(now.keys() | before.keys()):
        value, owner = now.get(name, _MISSING), _owner(source, name)
        unchanged = value is before.get(name, _MISSING) or name in _ABOUT_CLASSES
        inherited = value is new.get(name, _MISSING) or (name in _CALLS_SUPER and owner in target.__mro__)
        bookkeeping = name.startswith("__") and not callable(value)  # such as __slotnames__, which a copy caches
        if not (unchanged or inherited or bookkeeping):
            lost.append(f"{owner.__name__}.{name}")
    if not lost:
        return ""
    return (
        f"its class is patched ({', '.join(lost)}), and {target.__name__} would not use the patch; undo the patch, or "
        "replace the layer by hand"
    )


def _attribute_obstacle(layer: nn.Module, target: type) -> str:
    """Refuses attributes of the instance that replace a method, or whose name only the target uses."""
    old, new = _attributes(type(layer)), _attributes(target)
    own = _INSTANCE_KEYS[type(layer)]  # such as the process_group of torch.nn.SyncBatchNorm
    added = new.keys() | _INSTANCE_KEYS.get(target, frozenset())
    names = [name for name in _names(layer) if name not in own]
    methods = [name for name in names if callable(old.get(name)) and old[name] is not new.get(name)]
    if methods:
        return _replaced(methods, target)
    clashing = [name for name in names if name not in old and name in added]
    if clashing:
        return f"{target.__name__} uses the names of its attributes {', '.join(clashing)}; rename or delete these"
    return ""


def _replaced(methods: Sequence[str], target: type) -> str:
    unsynchronised = "forward" in methods and issubclass(target, SyncBatchNorm)
    effect = "go on unsynchronised" if unsynchronised else f"not fit {target.__name__}"
    return f"its {', '.join(methods)} was replaced on the instance, and would {effect}; delete the replacement first"


def _names(layer: nn.Module) -> Iterator[str]:
    for attributes in (vars(layer), layer._parameters, layer._buffers, layer._modules):
        yield from attributes


def _attributes(cls: type) -> dict[str, Any]:
    """Returns every attribute of a class as it is stored, including descriptors."""
    return {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}


def _owner(cls: type, name: str) -> type:
    return next((base for base in cls.__mro__ if name in vars(base)), cls)


def _unpatched(cls: type) -> dict[str, Any]:
    """Returns the attributes of a class, without a forward that was patched before its attributes were first read."""
    attributes = _attributes(cls)
    module = getattr(attributes["forward"], "__globals__", {}).get("__name__", "")  # functools.wraps cannot set it
    if module.split(".")[0] not in ("torch", "syncbn", cls.__module__.split(".")[0]):
        del attributes["forward"]
    return attributes


def _instance_keys(cls: type) -> frozenset[str]:
    """Returns the attributes of a new instance. It is made on meta, since an import must not touch a GPU."""
    lazy = issubclass(cls, LazyModuleMixin)
    return frozenset(vars(cls(device="meta") if lazy else cls(1, device="meta")))


_AT_IMPORT: dict[type, dict[str, Any]] = {}
_INSTANCE_KEYS: dict[type, frozenset[str]] = {}


def _learn(becomes: classes.Table) -> None:
    """Notes classes as they are now, unless they are known."""
    for cls in {*becomes, *becomes.values()} - _AT_IMPORT.keys():
        _AT_IMPORT[cls], _INSTANCE_KEYS[cls] = _unpatched(cls), _instance_keys(cls)


_learn({**classes.TORCH, nn.LazyBatchNorm1d: LazySyncBatchNorm})
_learn(classes.TORCH)
