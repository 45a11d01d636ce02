# SPDX-License-Identifier: BSD-3-Clause
"""The batch norms of timm, which have drop and activation inside. Imported only where the program has imported timm."""

from __future__ import annotations

from typing import Any, Literal

from timm.layers import norm_act
from torch import Tensor, nn

from syncbn.calls import traced
from syncbn.calls.sites import Site
from syncbn.convert.classes import SyncBatchNorm2d, Table
from syncbn.layer import SyncBatchNorm
from syncbn.transports.specify import specify_blocks


class SyncBatchNormAct2d(SyncBatchNorm2d, norm_act.BatchNormAct2d):  # type: ignore[misc]
    """A ``SyncBatchNorm`` that is a timm.layers.BatchNormAct2d: ``act(drop(batch_norm(x)))``.

    Args:
        num_features: C.
        process_group: the ranks to synchronise over.
        group_size: the number of consecutive ranks to synchronise over, or "node".
        renorm_limits: ``(r_max, d_max)`` of batch renormalization.
        replays: True if a forward inside backward is one that activation checkpointing repeats.
        options: those of timm.layers.BatchNormAct2d.
    """

    __module__ = "syncbn"

    def __init__(
        self,
        num_features: int,
        *args: Any,
        process_group: Any = None,
        group_size: int | Literal["node"] | None = None,
        renorm_limits: tuple[float, float] | None = None,
        replays: bool = True,
        **options: Any,
    ) -> None:
        norm_act.BatchNormAct2d.__init__(self, num_features, *args, **options)
        self._site = Site("SyncBatchNorm", specify_blocks(process_group, group_size), replays=replays)
        self.renorm_limits = renorm_limits

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """See ``SyncBatchNorm.forward``."""
        if traced.is_proxy(input) and traced.is_leaf(self, SyncBatchNormAct2d.forward):
            return _traced(self, input, mask)
        return _activate(self, super().forward(input, mask))


class SyncBatchNormAct(SyncBatchNorm):
    """A ``SyncBatchNorm`` that was a timm.layers.SyncBatchNormAct: ``act(drop(batch_norm(x)))``."""

    __module__ = "syncbn"

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """See ``SyncBatchNorm.forward``."""
        if traced.is_proxy(input) and traced.is_leaf(self, SyncBatchNormAct.forward):
            return _traced(self, input, mask)
        return _activate(self, super().forward(input, mask))


def _traced(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = traced.call(layer, x, mask)
    return y


def _activate(layer: nn.Module, y: Tensor) -> Tensor:
    for name in ("drop", "act"):  # timm gives them to a SyncBatchNormAct after it is made
        module = layer._modules.get(name)
        y = y if module is None else module(y)
    return y


TIMM: Table = {
    norm_act.BatchNormAct2d: SyncBatchNormAct2d,
    norm_act.SyncBatchNormAct: SyncBatchNormAct,
}
