# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.gpu``: a training step beside torch's layers, on one GPU."""
