# SPDX-License-Identifier: BSD-3-Clause
"""Stretches of a run in which layers do something else: frozen statistics, or statistics of the own share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from syncbn.layer import SyncBatchNorm
from syncbn.transports import groups


def layers_of(model: nn.Module) -> list[SyncBatchNorm]:
    """Lists the SyncBatchNorm layers of a model, a shared one once."""
    return [layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)]


def freeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Makes every SyncBatchNorm use its running statistics from now on, also after ``model.train()``.

    Args:
        model: a model, or one layer.
        affine: whether weight and bias stop learning too: ``requires_grad_(False)``. An optimizer that has them
            then skips them, as it skips whatever has no gradient.

    Returns:
        ``model`` itself.

    Communication:
        None, and a frozen layer makes none. Every rank must freeze the same layers.
    """
    for layer in layers_of(model):
        layer._site.frozen = True
        layer.eval()
        if affine:
            layer.requires_grad_(False)
    return model


def unfreeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Undoes :func:`freeze`: every frozen SyncBatchNorm follows ``train()`` and ``eval()`` again.

    Args:
        model: a model, or one layer. Frozen layers take its mode; a layer alone needs ``layer.train()``.
        affine: whether weight and bias of the frozen layers learn again: ``requires_grad_(True)``.

    Returns:
        ``model`` itself.

    Communication:
        None.
    """
    for layer in layers_of(model):
        if not layer._site.frozen:
            continue
        layer._site.frozen = False
        layer.train(model.training)
        if affine:
            layer.requires_grad_(True)
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Makes every SyncBatchNorm use the statistics of this rank's share alone, for the length of a block.

    A backward does what its forward did, wherever it is called: that of a forward inside the block stays local
    after it, and that of an earlier forward communicates inside it. Running statistics move by the own share,
    so they differ between ranks afterwards: see ``World.broadcast`` and :func:`syncbn.recalibrate`. A copy that is made
    inside is synchronised.

    Args:
        model: a model, or one layer.

    Communication:
        None inside. Ranks need not enter it alike, so long as each makes the same synchronised calls in between.

    Raises:
        ValueError: inside, on this rank alone, for a share of one value per channel: nobody waits for it there.
    """
    sites = [layer._site for layer in layers_of(model)]
    for site in sites:
        site.enter(groups.ALONE)
    try:
        yield
    finally:
        for site in sites:
            site.leave()
