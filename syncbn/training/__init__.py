# SPDX-License-Identifier: BSD-3-Clause
"""Features for training: freeze, no_sync, recalibrate, join, drift."""
