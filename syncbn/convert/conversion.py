# SPDX-License-Identifier: BSD-3-Clause
"""Conversion to SyncBatchNorm and back, without loss.

A layer changes its class in place: Parameter objects, buffers, hooks, flags, the training mode and every
reference to the layer stay as they are, so a shared layer stays shared and an optimizer stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calls.sites import Site
from syncbn.convert import obstacles
from syncbn.convert.summary import warn_of_local
from syncbn.layer import LazySyncBatchNorm, SyncBatchNorm
from syncbn.transports import groups
from syncbn.transports.specify import specify, specify_blocks

_LAZY = obstacles.LAZY
_BECOMES: dict[type, type] = {cls: cls.cls_to_become for cls in _LAZY}


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None, *, group_size: int | None = None) -> nn.Module:
    """Converts every torch batch norm of a model to a :class:`SyncBatchNorm`, in place.

    Args:
        module: a model, or one layer.
        process_group: the ranks to synchronise over; None keeps the group that a torch.nn.SyncBatchNorm has.
        group_size: instead of ``process_group``, the number of consecutive ranks to synchronise over. It must divide
            the number of all ranks.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: if a layer cannot be converted without loss. It names every such layer and the reason. Nothing is
            changed then.

    Warns:
        UserWarning: once, with names and reasons, if modules stay that use the local batch alone. See
            :func:`syncbn.summary`.

    Communication:
        None.
    """
    found = {name: layer for name, layer in module.named_modules() if _is_batch_norm(layer)}
    reasons = {name: reason for name, layer in found.items() if (reason := obstacles.to_ours(layer))}
    _refuse(found, reasons, "SyncBatchNorm")
    spec = specify_blocks(process_group, group_size)
    for layer in found.values():
        if spec is None and type(layer) is nn.SyncBatchNorm:
            specify(layer.process_group)  # raises before anything is changed
    for layer in found.values():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = spec if spec is not None else layer.process_group
            continue
        original = type(layer)
        kept_group = layer.__dict__.pop("process_group", None)
        layer.__class__ = LazySyncBatchNorm if original in _LAZY else SyncBatchNorm
        layer._site = Site("SyncBatchNorm", specify(kept_group) if spec is None else spec)
        layer._site.converted_from = original
    name_layers(module)
    warn_of_local(module)
    return module


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
    for name, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm):
            layer._site.name = name.replace("_orig_mod.", "")  # of torch.compile: a compiled model is the same model
    return model


def revert_sync_batchnorm(module: nn.Module, *, otherwise: type[_BatchNorm] | None = None) -> nn.Module:
    """Restores the original class of every converted layer of a model, in place.

    Args:
        module: a model, or one layer.
        otherwise: the class for layers that were created as SyncBatchNorm, for example torch.nn.BatchNorm2d.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: if a layer cannot be reverted without loss, for example one that was created as SyncBatchNorm if
            ``otherwise`` is not given. It names every such layer and the reason. Nothing is changed then.

    Communication:
        None.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, SyncBatchNorm)}
    reasons = {
        name: reason
        for name, layer in found.items()
        if (reason := obstacles.to_original(layer, layer.converted_from or otherwise))
    }
    _refuse(found, reasons, "its original class")
    for layer in found.values():
        original = layer.converted_from or otherwise
        assert original is not None
        if original in _LAZY and not isinstance(layer, LazySyncBatchNorm):
            original = _BECOMES[original]  # it is lazy no more: it has seen an input since
        spec = layer.__dict__.pop("_site").group
        layer.__class__ = original  # type: ignore[assignment]
        if original is nn.SyncBatchNorm:
            layer.process_group = None if spec is None else groups.handle(spec)
    return module


SyncBatchNorm.converter = staticmethod(convert_sync_batchnorm)


def _is_batch_norm(layer: nn.Module) -> bool:
    scripted = isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in str(layer.original_name)
    return isinstance(layer, _BatchNorm) or scripted


def _refuse(found: Mapping[str, nn.Module], reasons: Mapping[str, str], target: str) -> None:
    if reasons:
        lines = "\n".join(f"  {name or '(the module itself)'}: {reason}" for name, reason in reasons.items())
        raise TypeError(
            f"Conversion to {target} must lose nothing; {len(reasons)} of {len(found)} layers would lose something, "
            f"and nothing was changed:\n{lines}"
        )
