# SPDX-License-Identifier: BSD-3-Clause
"""Conversion to SyncBatchNorm and back, without loss.

``obstacles.py`` finds what would be lost, ``summary.py`` what stays local.
"""

from syncbn.convert.conversion import convert_sync_batchnorm, name_layers, revert_sync_batchnorm

__all__ = ["convert_sync_batchnorm", "name_layers", "revert_sync_batchnorm"]
