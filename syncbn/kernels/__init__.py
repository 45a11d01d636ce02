# SPDX-License-Identifier: BSD-3-Clause
"""The steps on one process's data. ``base.py`` is the contract, ``choose`` picks an implementation."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter

from syncbn.kernels.base import AbstractKernels

__all__ = ["CHOICES", "AbstractKernels", "Choice", "choose", "explain"]

CHOICES = ("auto", "host", "torch")
OVERRIDE = "SYNCBN_KERNELS"
PLAIN = (Tensor, Parameter)
"""Classes whose memory is what it seems; a subclass may be a stand-in without any."""


class Choice(NamedTuple):
    """Which kernels CPU tensors get, and why."""

    name: str
    reason: str


def choose(x: Tensor) -> AbstractKernels:
    """Returns the kernels for a tensor, by its device.

    A CPU tensor gets :class:`syncbn.kernels.host_ops.HostKernels`, where they were built, and any other
    :class:`syncbn.kernels.torch_ops.TorchKernels`. ``SYNCBN_KERNELS`` is read once, at the first call.
    """
    return _cpu_kernels() if x.is_cpu and type(x) in PLAIN and not x.is_neg() else _torch_kernels()


@cache
def explain() -> Choice:
    """Says which kernels CPU tensors get in this process, and why.

    Raises:
        ValueError: if ``SYNCBN_KERNELS`` is not one of ``CHOICES``.
        RuntimeError: if it demands the host kernels and they cannot be loaded.
    """
    wanted = os.environ.get(OVERRIDE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{OVERRIDE} must be one of {', '.join(CHOICES)}; received {wanted!r}. Correct or unset it.")
    if wanted == "torch":
        return Choice("torch", f"{OVERRIDE}=torch")
    problem = _host_problem()
    if not problem:
        from syncbn.kernels import _host

        return Choice("host", f"compiled C++ for {_host.instruction_set()}, the best that this processor runs")
    if wanted == "host":
        raise RuntimeError(
            f"{OVERRIDE}=host needs the compiled host kernels; {problem}. "
            f"Install a C++17 compiler and reinstall syncbn, or unset {OVERRIDE}."
        )
    return Choice("torch", f"{problem}; with a C++17 compiler, reinstalling syncbn makes it several times as fast")


def _host_problem() -> str:
    """Says why the host kernels cannot be used; nothing if they can."""
    if importlib.util.find_spec("syncbn.kernels._host") is None:
        return "the compiled host kernels were not built when syncbn was installed"
    try:
        from syncbn.kernels import host_ops  # noqa: F401
    except (ImportError, AttributeError, RuntimeError) as error:  # built for another system, or an older torch
        return f"the compiled host kernels do not load: {error}"
    return ""


@cache
def _cpu_kernels() -> AbstractKernels:
    if explain().name == "torch":
        return _torch_kernels()
    from syncbn.kernels.host_ops import HostKernels

    return HostKernels()


@cache
def _torch_kernels() -> AbstractKernels:
    from syncbn.kernels.torch_ops import TorchKernels

    return TorchKernels()
