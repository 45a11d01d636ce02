# SPDX-License-Identifier: BSD-3-Clause
"""The steps on one process's data. ``base.py`` is the contract, ``choose`` picks an implementation."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from syncbn.kernels.base import AbstractKernels

__all__ = ["AbstractKernels", "choose"]


def choose(x: Tensor) -> AbstractKernels:
    """Returns the kernels for a tensor, by its device.

    Today every device runs :class:`syncbn.kernels.torch_ops.TorchKernels`; a faster room is added here.
    """
    del x
    return _torch_kernels()


@cache
def _torch_kernels() -> AbstractKernels:
    from syncbn.kernels.torch_ops import TorchKernels

    return TorchKernels()
