# SPDX-License-Identifier: BSD-3-Clause
"""A CUDA device made of host memory, so that a machine without a GPU runs what CUDA tensors run.

SYNCBN_TEST_DEVICE=fake-cuda python -m pytest tests/test_layer.py

``device.cpp`` gives a CPU build of torch the device: tensors of it are CUDA tensors for torch and for syncbn. They go
through the GPU's kernels, which tests/cuda_on_cpu runs from their own source, through pinned memory and through the
deferred errors. ``install`` adds what torch's Python asks of CUDA.

Refused as on a GPU: an operator that meets tensors of two devices, ``numpy()`` of a CUDA tensor, a generator of another
device, and a kernel that is given the address of anything but memory of the device or pinned memory. Not found: what
is missing between two streams, or what one GPU's compiler makes of the kernels.
"""

import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from syncbn import kernels
from syncbn.kernels.cuda.launch import AbstractLauncher
from tests.cuda_on_cpu import EmulatedLauncher
from tests.processes import patience

NAME = "fake-cuda"
SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall")


@cache
def build():
    """Compiles the device against torch's headers; once for each source and torch on this host."""
    if shutil.which("g++") is None:
        raise RuntimeError(f"SYNCBN_TEST_DEVICE={NAME} needs a compiler; received no g++. Install one.")
    root = Path(torch.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.?pp")))
    key = hashlib.sha256(repr((FLAGS, torch.__version__)).encode() + sources).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"syncbn-fake-cuda-{key}.so")
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        torch_words = ["-isystem", root / "include", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        subprocess.run(["g++", *FLAGS, abi, SOURCE, *torch_words, "-o", made], check=True, timeout=patience(300))
        made.replace(library)
    return library


class CheckedLauncher(AbstractLauncher):
    """Runs kernels on the fake device, and refuses an address that a GPU could not reach."""

    def __init__(self):
        self.emulated = EmulatedLauncher(device="cuda:0")

    def launch(self, kernel, grid, block, layout, values, x):
        for kind, value in zip(_fields(layout.format), values, strict=True):
            if kind == "Q" and value and not torch.ops.fake_cuda.reaches(value):
                raise RuntimeError(f"CUDA error: {kernel} got {value:#x}, an illegal memory access")
        self.emulated.launch(kernel, grid, block, layout, values, x)

    def slow_float64(self, x):
        return self.emulated.slow_float64(x)

    def scratch(self, x, partials, groups):
        return self.emulated.scratch(x, partials, groups)

    def deferred_errors(self, x):
        return self.emulated.deferred_errors(x)


@cache
def _fields(layout):
    """Writes out a format of struct: one letter for each value."""
    letters, count = "", ""
    for sign in layout.lstrip("="):
        letters, count = (letters, count + sign) if sign.isdigit() else (letters + sign * int(count or 1), "")
    return letters


class Stream:
    """The one stream. What was asked for is done when the call returns."""

    device, device_index, device_type, stream_id, cuda_stream = torch.device("cuda:0"), 0, 1, 0, 0

    def __init__(self, *args, **options):
        pass

    def nothing(self, *args):
        return self

    synchronize = wait_event = wait_stream = record_event = nothing

    def query(self):
        return True


class Event:
    """A mark in the one stream, always passed."""

    def __init__(self, *args, **options):
        pass

    def nothing(self, *args):
        pass

    synchronize = wait = record = nothing

    def query(self):
        return True


@contextmanager
def _in_stream(stream):
    yield


def _storage(cls, *args, device=None, **options):
    """Makes a storage on the device too, of which copies and files of tensors are made."""
    if device is None or torch.device(device).type != "cuda":
        return torch._C.StorageBase.__new__(cls, *args, device=device, **options)
    return torch.empty(args[0] if args else 0, dtype=torch.uint8, device=device).untyped_storage()


@cache
def install():
    """Gives this process the device. Once, before anything asks torch for CUDA.

    Returns:
        The device's name.
    """
    if torch.version.cuda is not None:
        raise RuntimeError(f"SYNCBN_TEST_DEVICE={NAME} needs a torch without CUDA; received {torch.__version__}.")
    torch.ops.load_library(build())
    for name, answer in {"DeviceCount": 1, "Device": 0, "CurrentRawStream": 0}.items():
        setattr(torch._C, f"_cuda_get{name}", lambda *args, answer=answer: answer)
    for name in ("setDevice", "synchronize", "set_sync_debug_mode", "emptyCache", "setStream"):
        setattr(torch._C, f"_cuda_{name}", lambda *args, **options: None)
    cuda = torch.cuda
    cuda._initialized, cuda.default_generators = True, (torch.ops.fake_cuda.default_generator(),)
    cuda._exchange_device = lambda device: 0  # one function for each name: torch.compile keeps a list of them
    cuda._maybe_exchange_device = lambda device: 0
    cuda._is_in_bad_fork = lambda: False
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name=NAME,
        uuid="00000000-0000-0000-0000-000000000001",
        major=9,
        minor=0,
        total_memory=1 << 30,
        L2_cache_size=1 << 20,
    )
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, _in_stream
    cuda.current_stream = lambda device=None: Stream()
    cuda.default_stream = lambda device=None: Stream()
    torch.version.cuda = "13.0"
    torch.UntypedStorage.__new__ = staticmethod(_storage)
    cupy = ModuleType("cupy", "Found, so that CUDA tensors get the GPU's kernels; never used.")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    sys.modules["cupy"] = cupy
    launcher = CheckedLauncher()
    kernels.dispatch.launcher = lambda: launcher
    return "cuda:0"
