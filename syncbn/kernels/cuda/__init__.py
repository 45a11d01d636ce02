# SPDX-License-Identifier: BSD-3-Clause
"""The steps in CUDA, for GPU tensors: a file a step, compiled by CuPy at first use."""
