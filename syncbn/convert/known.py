# SPDX-License-Identifier: BSD-3-Clause
"""Every class that converts: torch's, and timm's where the program has imported timm."""

from __future__ import annotations

import sys

from syncbn.convert.classes import TORCH, Table
from syncbn.layer import SyncBatchNorm


def table() -> Table:
    """Returns what each class becomes, with the classes of timm if the program has imported it."""
    if sys.modules.get("timm.layers.norm_act") is None:
        return TORCH
    from syncbn.convert import timm_layers

    return {**TORCH, **timm_layers.TIMM}


def original_of(layer: SyncBatchNorm, becomes: Table) -> type | None:
    """Returns the class that a layer was converted from, or that it is an instance of; None for a SyncBatchNorm."""
    named = next((theirs for theirs, ours in becomes.items() if ours is type(layer) is not SyncBatchNorm), None)
    return layer.converted_from or named


def optional_class(name: str) -> type:
    """Returns a class of ``syncbn`` that needs timm.

    Raises:
        AttributeError: if there is none of this name.
    """
    if name in ("SyncBatchNormAct", "SyncBatchNormAct2d"):
        from syncbn.convert import timm_layers

        found: type = getattr(timm_layers, name)
        return found
    raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
