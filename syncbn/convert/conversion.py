# SPDX-License-Identifier: BSD-3-Clause
"""Conversion to SyncBatchNorm and back, without loss.

A layer changes its class in place: Parameter objects, buffers, hooks, flags, the training mode and every
reference to the layer stay as they are, so a shared layer stays shared and an optimizer stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calls.sites import Site, site_of
from syncbn.convert import classes, known, obstacles, replacement, selection
from syncbn.convert.lazy import LazySyncBatchNorm
from syncbn.convert.replacement import Functions
from syncbn.convert.selection import Only
from syncbn.convert.standing import is_batch_norm
from syncbn.convert.summary import warn_of_local
from syncbn.layer import SyncBatchNorm
from syncbn.transports import groups
from syncbn.transports.groups import GroupSpec
from syncbn.transports.specify import specify, specify_blocks
from syncbn.waits.limits import shown


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: Any = None,
    *,
    group_size: int | Literal["node"] | None = None,
    only: Only = None,
    replace: Functions | None = None,
) -> nn.Module:
    """Converts every batch norm of torch and timm in a model to a ``SyncBatchNorm``, in place.

    A layer becomes a class that is still an instance of its own: a torch.nn.BatchNorm2d a ``syncbn.SyncBatchNorm2d``,
    and a timm.layers.BatchNormAct2d a ``syncbn.SyncBatchNormAct2d``. Only a torch.nn.SyncBatchNorm becomes a plain
    ``SyncBatchNorm``, since DistributedDataParallel refuses its class on CPU.

    Args:
        module: a model, or one layer.
        process_group: the ranks to synchronise over; None keeps the group that a torch.nn.SyncBatchNorm has.
        group_size: instead of ``process_group``, the number of consecutive ranks to synchronise over. It must divide
            the number of all ranks. "node" is the ranks of one host, as many on each.
        only: the layers to convert: a name with wildcards such as ``"backbone.*"``, a sequence of them, or a function
            of (name, layer) that returns whether to convert the layer. The other layers stay as they are.
        replace: for classes that cannot convert, ``{TheirNorm: function}``. The function takes a layer of exactly this
            class and returns the module that takes its place everywhere; batch norms in that module are then converted.

    Returns:
        ``module`` itself, or what replaces it.

    Raises:
        TypeError: if a layer cannot be converted without loss. It names every such layer and the reason. Nothing is
            changed then.
        ValueError: if a pattern of ``only`` matches no batch norm.

    Warns:
        UserWarning: once, with names and reasons, if modules stay that use the local batch alone. See
            ``syncbn.summary``.

    Communication:
        None.
    """
    selection.require_module(module, "convert_sync_batchnorm")
    functions, becomes = replacement.checked(replace), known.table()
    chosen = selection.choose(module, only, lambda layer: is_batch_norm(layer) or type(layer) in functions)
    old = {name: layer for name, layer in chosen.items() if type(layer) in functions}
    spec = specify_blocks(process_group, group_size)
    made = replacement.make(module, old, functions)
    with replacement.put(module, made) as model:
        found = _within(model, {*chosen.values(), *_parts(made.values())}, is_batch_norm)
        skipped = obstacles.skipped(model)
        reasons = {
            name: reason
            for name, layer in found.items()
            if (reason := skipped.get(layer, "") or obstacles.to_ours(layer, becomes))
        }
        _refuse(found, reasons, _CONVERT)
        for layer in found.values():
            if spec is None and isinstance(layer, nn.SyncBatchNorm):
                specify(layer.process_group)  # raises before anything is changed
    replacement.remember(made)
    for layer in found.values():
        _convert(layer, spec, becomes)
    if only is None:
        name_layers(model)
        warn_of_local(model)
    else:
        _name(model, found.values())
        warn_of_local(model, ignore=[layer for layer in model.modules() if is_batch_norm(layer)])
    return model


def _convert(layer: Any, spec: GroupSpec | None, becomes: classes.Table) -> None:
    if isinstance(layer, SyncBatchNorm):
        layer.process_group = spec if spec is not None else layer.process_group
        return
    original = type(layer)
    kept_group = layer.__dict__.pop("process_group", None)
    layer.__class__ = becomes[original]
    layer._site = Site("SyncBatchNorm", specify(kept_group) if spec is None else spec)
    site_of(layer).converted_from = original


def name_layers(model: nn.Module) -> nn.Module:
    """Gives every SyncBatchNorm its qualified name in a model. Errors use it, and ranks tell layers apart by it.

    ``convert_sync_batchnorm`` calls this. A layer without a name is called by its class, C and the order of its first
    use. A copy keeps the name. Every rank must name its layers alike.

    Args:
        model: a model, or one layer.

    Returns:
        ``model`` itself.

    Communication:
        None.
    """
    selection.require_module(model, "name_layers")
    return _name(model, model.modules())


def _name(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    chosen = set(layers)
    for name, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm) and layer in chosen:
            site_of(layer).name = name.replace("_orig_mod.", "")  # of torch.compile: a compiled model is the same model
    return model


def revert_sync_batchnorm(
    module: nn.Module, *, otherwise: type[_BatchNorm] | None = None, only: Only = None
) -> nn.Module:
    """Restores the original class of every converted layer of a model, in place, and every replaced layer.

    A replaced layer comes back with the Parameter objects and buffers that its replacement has by now.

    Args:
        module: a model, or one layer.
        otherwise: the class for layers that were created as SyncBatchNorm, for example torch.nn.BatchNorm2d.
        only: the layers to revert, as in ``convert_sync_batchnorm``. The other layers stay as they are.

    Returns:
        ``module`` itself, or what it replaces.

    Raises:
        TypeError: if a layer cannot be reverted without loss, for example one that was created as SyncBatchNorm if
            ``otherwise`` is not given, or one that replaces a layer and has parameters of other names. It names every
            such layer and the reason. Nothing is changed then.
        ValueError: if a pattern of ``only`` matches no layer.

    Communication:
        None.
    """
    becomes = known.table()
    selection.require_module(module, "revert_sync_batchnorm")
    if otherwise is not None and not (isinstance(otherwise, type) and otherwise in classes.TORCH):
        received = otherwise.__qualname__ if isinstance(otherwise, type) else shown(otherwise, 60)
        raise TypeError(
            f"otherwise= needs a batch norm class of torch, such as torch.nn.BatchNorm2d; received {received}. A layer "
            "that was created as SyncBatchNorm has only what these have."
        )
    chosen = selection.choose(module, only, lambda layer: _is_ours(layer) or replacement.original(layer) is not None)
    news = {name: layer for name, layer in chosen.items() if replacement.original(layer) is not None}
    _refuse(chosen, {name: why for name, new in news.items() if (why := replacement.obstacle(new))}, _REVERT)
    back = {new: old for new in news.values() if (old := replacement.original(new)) is not None}
    with replacement.put(module, back) as model:
        found = _within(model, {*chosen.values(), *_parts(back.values())}, _is_ours)
        originals = {name: known.original_of(layer, becomes) or otherwise for name, layer in found.items()}
        reasons = {
            name: reason
            for name, layer in found.items()
            if (reason := obstacles.to_original(layer, originals[name], becomes))
        }
        _refuse(found, reasons, _REVERT)
    replacement.restore(news.values())
    for name, layer in found.items():
        _revert(layer, originals[name])
    return model


def _revert(layer: SyncBatchNorm, original: type | None) -> None:
    assert original is not None
    if original in classes.LAZY and not isinstance(layer, LazySyncBatchNorm):
        original = original.cls_to_become  # type: ignore[attr-defined]  # it has seen an input since
    spec = layer.__dict__.pop("_site").group
    layer.__class__ = original
    if isinstance(layer, nn.SyncBatchNorm):
        layer.process_group = None if spec is None else groups.handle(spec)


SyncBatchNorm.converter = staticmethod(convert_sync_batchnorm)


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, SyncBatchNorm)


def _parts(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield from module.modules()


def _within(model: nn.Module, chosen: Collection[nn.Module], kind: Callable[[nn.Module], bool]) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if layer in chosen and kind(layer)}


_CONVERT = "convert_sync_batchnorm must lose nothing; {} of {} layers would lose something"
_REVERT = "revert_sync_batchnorm must restore each layer without loss; it cannot for {} of {} layers"


def _refuse(found: Mapping[str, nn.Module], reasons: Mapping[str, str], text: str) -> None:
    if reasons:
        lines = "\n".join(f"  {name or '(the module itself)'}: {reason}" for name, reason in reasons.items())
        raise TypeError(f"{text.format(len(reasons), len(found))}, and nothing was changed:\n{lines}")
