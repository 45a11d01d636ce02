# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels a tensor gets, and why."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from syncbn.checks import kinds
from syncbn.kernels.base import AbstractKernels
from syncbn.kernels.cuda import geometry
from syncbn.transports.base import AbstractTransport

if TYPE_CHECKING:
    from syncbn.kernels.cuda.launch import CupyLauncher


CHOICES = ("auto", "host", "torch")
OVERRIDE, ISA = "SYNCBN_KERNELS", "SYNCBN_HOST_ISA"
OLDEST = (8, 0)
"""The lowest compute capability that has the kernels' instructions, those for bfloat16 above all."""
PLAIN = (Tensor, Parameter)
"""Classes whose data pointer can be used. A subclass may have no memory."""


class Choice(NamedTuple):
    """Which kernels tensors get, and why."""

    name: str
    reason: str


def for_call(x: Tensor, masked: bool, transport: AbstractTransport) -> AbstractKernels:
    """Returns the kernels for a call in a group. With a mask these are the readable ones, which alone take it."""
    if masked:
        return _torch_kernels()
    return choose(x) if x.is_cpu else on_device(x, transport)


def choose(x: Tensor) -> AbstractKernels:
    """Returns the kernels for a CPU tensor.

    These are ``syncbn.kernels.host.ops.HostKernels`` if they were built. Without them, and for any other tensor,
    they are ``syncbn.kernels.torch_ops.TorchKernels``. ``SYNCBN_KERNELS`` is read once, at the first call.
    """
    return _cpu_kernels() if x.is_cpu and type(x) in PLAIN and not x.is_neg() else _torch_kernels()


def on_device(x: Tensor, transport: AbstractTransport) -> AbstractKernels:
    """Returns the kernels for a tensor that is not on the CPU, in a group of ranks.

    A CUDA tensor gets ``syncbn.kernels.cuda.ops.CupyKernels`` if CuPy is installed. Without it it gets the
    readable kernels, and one warning says so. A plane of 2^31 values gets the readable kernels, too.
    """
    if not x.is_cuda or type(x) not in PLAIN or x.is_neg():
        return _torch_kernels()
    if x.numel() > geometry.MOST and prod(x.shape[2:]) > geometry.MOST:
        return _torch_kernels()
    return cuda_kernels(transport.host_synchronous)


def sound(x: object, tensors: tuple[Tensor | None, ...], C: int) -> bool:
    """Whether the steps can take the tensors of a call. A quick answer: if False, there may still be no error.

    Args:
        x: (N, C, *spatial), or what was passed as input.
        tensors: weight, bias, running_mean, running_var and num_batches_tracked, or None.
        C: the channels of the layer.
    """
    if forward_ad._current_level >= 0:  # one of them may have a tangent
        return False
    quick: Callable[..., bool] = _sound_on_cpu() if isinstance(x, Tensor) and x.is_cpu else kinds.sound
    return quick(x, *tensors, C)


@cache
def _sound_on_cpu() -> Callable[..., bool]:
    if explain().name == "torch":
        return kinds.sound
    from syncbn.kernels.host.ops import sound

    return sound


def look(device: torch.device) -> None:
    """Raises the deferred error of a CUDA device, if there is one. Does not wait for the device."""
    if explain_device().name == "cupy":
        launcher().deferred_errors(torch.empty(0, device=device)).look()


def check(device: torch.device) -> None:
    """Waits for a device and raises its deferred error, if there is one. Call it at the end of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        look(device)


@cache
def explain_device() -> Choice:
    """Says which kernels CUDA tensors get in this process, and why. Does not import CuPy."""
    if os.environ.get(OVERRIDE, "auto") == "torch":
        return Choice("torch", f"{OVERRIDE}=torch")
    if torch.version.cuda is None:
        return Choice("torch", "this torch is not built for CUDA")
    if importlib.util.find_spec("cupy") is None:
        major = torch.version.cuda.split(".")[0]
        return Choice(
            "torch", f'CuPy is not installed; `pip install "syncbn[cuda{major}]"` brings it, and kernels for the GPU'
        )
    old = [capability for capability in capabilities() if capability < OLDEST]
    if old:
        return Choice(
            "torch",
            f"the GPU kernels need compute capability {OLDEST[0]}.{OLDEST[1]}; this machine has a GPU of "
            f"{old[0][0]}.{old[0][1]}. Hide it with CUDA_VISIBLE_DEVICES if there is a newer one",
        )
    return Choice("cupy", "CuPy compiles them at first use")


def capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of each GPU that this process sees."""
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


@cache
def explain() -> Choice:
    """Says which kernels CPU tensors get in this process, and why.

    Raises:
        ValueError: if ``SYNCBN_KERNELS`` is not one of ``CHOICES``, or ``SYNCBN_HOST_ISA`` no instruction set that this
            processor runs.
        RuntimeError: if the first is "host" and the host kernels cannot be loaded.
    """
    wanted = os.environ.get(OVERRIDE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{OVERRIDE} must be one of {', '.join(CHOICES)}; received {wanted!r}. Correct or unset it.")
    if wanted == "torch":
        return Choice("torch", f"{OVERRIDE}=torch")
    problem = _host_problem()
    if not problem:
        from syncbn.kernels.host import _host

        isa = os.environ.get(ISA)
        if not isa:
            return Choice("host", f"compiled C++ for {_host.instruction_set()}, the best that this processor runs")
        if isa not in _host.instruction_sets():
            known = ", ".join(_host.instruction_sets())
            raise ValueError(f"{ISA} must be one of {known} on this processor; received {isa!r}. Correct or unset it.")
        _host.use_instruction_set(isa)
        return Choice("host", f"compiled C++ for {isa}, by {ISA}")
    if wanted == "host":
        raise RuntimeError(
            f"{OVERRIDE}=host needs the compiled host kernels; {problem}. "
            f"Install a C++17 compiler and reinstall syncbn, or unset {OVERRIDE}."
        )
    return Choice("torch", f"{problem}; with a C++17 compiler, reinstalling syncbn makes it several times as fast")


def _host_problem() -> str:
    """Says why the host kernels cannot be used. Empty if they can."""
    if importlib.util.find_spec("syncbn.kernels.host._host") is None:
        return "the compiled host kernels were not built when syncbn was installed"
    try:
        from syncbn.kernels.host import ops  # noqa: F401
    except (ImportError, AttributeError, RuntimeError) as error:  # built for another system, or an older torch
        return f"the compiled host kernels do not load: {error}"
    return ""


@cache
def _cpu_kernels() -> AbstractKernels:
    if explain().name == "torch":
        return _torch_kernels()
    from syncbn.kernels.host.ops import HostKernels

    return HostKernels()


@cache
def _torch_kernels() -> AbstractKernels:
    from syncbn.kernels.torch_ops import TorchKernels

    return TorchKernels()


@cache
def cuda_kernels(host_synchronous: bool) -> AbstractKernels:
    """Returns the kernels for CUDA tensors; ``host_synchronous`` where the host waits for sums anyway."""
    choice = explain_device()
    if choice.name == "torch":
        if not choice.reason.startswith(OVERRIDE):
            warnings.warn(f"syncbn runs on torch's operators for CUDA tensors: {choice.reason}", stacklevel=2)
        return _torch_kernels()
    from syncbn.kernels.cuda.ops import CupyKernels

    return CupyKernels(launcher(), host_synchronous=host_synchronous)


@cache
def launcher() -> CupyLauncher:
    """Returns what compiles and launches the kernels of a GPU."""
    from syncbn.kernels.cuda.launch import CupyLauncher

    return CupyLauncher()
