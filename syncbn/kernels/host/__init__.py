# SPDX-License-Identifier: BSD-3-Clause
"""The steps in compiled C++, for CPU tensors: a file a step, compiled once for each instruction set."""
