# SPDX-License-Identifier: BSD-3-Clause
"""The classes that convert, and what they become: a class that is still an instance of theirs.

The torch class comes last, so that forward, train and the rest are those of SyncBatchNorm. A layer of
torch.nn.SyncBatchNorm becomes a plain SyncBatchNorm: DistributedDataParallel refuses instances of that class on CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from syncbn.checks.inputs import Dims
from syncbn.convert.lazy import LazySyncBatchNorm
from syncbn.layer import SyncBatchNorm

_NEEDS = "SyncBatchNorm{}d needs input.dim() {}, as torch.nn.BatchNorm{}d does"


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """A ``SyncBatchNorm`` that is a torch.nn.BatchNorm1d, and takes (N, C) or (N, C, L)."""

    __module__ = "syncbn"
    dims = Dims(2, 3, _NEEDS.format(1, "2 or 3, (N, C) or (N, C, L)", 1))


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """A ``SyncBatchNorm`` that is a torch.nn.BatchNorm2d, and takes (N, C, H, W)."""

    __module__ = "syncbn"
    dims = Dims(4, 4, _NEEDS.format(2, "== 4, (N, C, H, W)", 2))


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """A ``SyncBatchNorm`` that is a torch.nn.BatchNorm3d, and takes (N, C, D, H, W)."""

    __module__ = "syncbn"
    dims = Dims(5, 5, _NEEDS.format(3, "== 5, (N, C, D, H, W)", 3))


class LazySyncBatchNorm1d(LazySyncBatchNorm, nn.LazyBatchNorm1d):
    """A ``LazySyncBatchNorm`` that becomes a ``SyncBatchNorm1d``."""

    __module__ = "syncbn"
    cls_to_become = SyncBatchNorm1d  # type: ignore[assignment]
    dims = SyncBatchNorm1d.dims


class LazySyncBatchNorm2d(LazySyncBatchNorm, nn.LazyBatchNorm2d):
    """A ``LazySyncBatchNorm`` that becomes a ``SyncBatchNorm2d``."""

    __module__ = "syncbn"
    cls_to_become = SyncBatchNorm2d  # type: ignore[assignment]
    dims = SyncBatchNorm2d.dims


class LazySyncBatchNorm3d(LazySyncBatchNorm, nn.LazyBatchNorm3d):
    """A ``LazySyncBatchNorm`` that becomes a ``SyncBatchNorm3d``."""

    __module__ = "syncbn"
    cls_to_become = SyncBatchNorm3d  # type: ignore[assignment]
    dims = SyncBatchNorm3d.dims


Table = Mapping[type, type[SyncBatchNorm]]
"""What each class becomes."""
LAZY: Table = {
    nn.LazyBatchNorm1d: LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: LazySyncBatchNorm3d,
}
TORCH: Table = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    **LAZY,
}
