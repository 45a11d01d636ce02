# SPDX-License-Identifier: BSD-3-Clause
"""Freeze statistics, or use only the local batch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from syncbn.calls.sites import site_of
from syncbn.convert.selection import require_module
from syncbn.layer import SyncBatchNorm
from syncbn.transports import groups
from syncbn.waits.limits import shown


def layers_of(model: nn.Module) -> list[SyncBatchNorm]:
    """Lists the SyncBatchNorm layers of a model, a shared one once."""
    return [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]


def freeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Makes every SyncBatchNorm use its running statistics from now on, even after ``model.train()``.

    Args:
        model: a model, or one layer.
        affine: whether to stop training weight and bias too, by ``requires_grad_(False)``. Their optimizer then skips
            them, since they have no gradient.

    Returns:
        ``model`` itself.

    Communication:
        None. A frozen layer does not communicate, so every rank must freeze the same layers.

    Raises:
        TypeError: if an argument is of another type.
    """
    require_module(model, "syncbn.freeze")
    _require_bool(affine, "syncbn.freeze")
    for layer in layers_of(model):
        site_of(layer).frozen = True
        layer.eval()
        if affine:
            layer.requires_grad_(False)
    return model


def _require_bool(affine: object, what: str) -> None:
    if not isinstance(affine, bool):
        raise TypeError(
            f"{what} needs affine=True or False; received {shown(affine)}. It says whether weight and bias are meant "
            "too; name layers by passing a part of the model."
        )


def unfreeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Undoes ``freeze``: every frozen SyncBatchNorm follows ``train()`` and ``eval()`` again.

    Args:
        model: a model, or one layer. Frozen layers take its mode; a layer alone needs ``layer.train()``.
        affine: whether to train weight and bias of the frozen layers again, by ``requires_grad_(True)``.

    Returns:
        ``model`` itself.

    Communication:
        None.

    Raises:
        TypeError: if an argument is of another type.
    """
    require_module(model, "syncbn.unfreeze")
    _require_bool(affine, "syncbn.unfreeze")
    for layer in layers_of(model):
        if not site_of(layer).frozen:
            continue
        site_of(layer).frozen = False
        layer.train(model.training)
        if affine:
            layer.requires_grad_(True)
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Makes every SyncBatchNorm use the statistics of the local batch alone, inside a ``with`` block.

    A backward does what its forward did, wherever it is called: the backward of a forward inside the block stays
    local after the block, and that of an earlier forward communicates inside it. Running statistics move by the local
    batch, so they differ between ranks afterwards: see ``World.broadcast`` and ``syncbn.recalibrate``. A copy of a
    layer made inside is synchronised.

    Args:
        model: a model, or one layer.

    Communication:
        None inside. Ranks may enter it at different times, if all make the same synchronised calls in between.

    Raises:
        ValueError: inside, on this rank alone, if the local batch has one value per channel.
        TypeError: if ``model`` is no module.
    """
    require_module(model, "syncbn.no_sync")
    sites = [site_of(layer) for layer in layers_of(model)]
    for site in sites:
        site.enter(groups.ALONE)
    try:
        yield
    finally:
        for site in sites:
            site.leave()
