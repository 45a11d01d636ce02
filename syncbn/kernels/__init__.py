# SPDX-License-Identifier: BSD-3-Clause
"""The steps on one process's data. ``base.py`` is the contract, ``choose`` picks an implementation."""

from syncbn.kernels.base import AbstractKernels
from syncbn.kernels.dispatch import (
    CHOICES,
    Choice,
    check,
    choose,
    explain,
    explain_device,
    for_call,
    look,
    on_device,
    sound,
)

__all__ = [
    "CHOICES",
    "AbstractKernels",
    "Choice",
    "check",
    "choose",
    "explain",
    "explain_device",
    "for_call",
    "look",
    "on_device",
    "sound",
]
