# SPDX-License-Identifier: BSD-3-Clause
"""Compiles and launches kernels: CuPy compiles ``cuda/*.cu`` at first use and launches on torch's current stream.

Tests use other launchers: one runs the same source on a CPU, one records.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from abc import ABC, abstractmethod
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from syncbn.kernels.cuda.errors import DeferredErrors

OPTIONS = ("--std=c++17", "--fmad=false")  # with fused operations an element's bits would depend on its place
FLOAT32_TO_FLOAT64 = 87
"""cudaDevAttrSingleToDoublePrecisionPerfRatio: how many float32 operations take as long as one in float64."""
EXPANSION_PAYS = 8
"""The ratio from which float32 expansions (13 to 22 operations) are used. It is 2 on A100, H100 and B200, 32 or 64 on
GeForce, A10, L4 and L40."""
TICKETS, STORED = 4096, 64
"""The usual number of tickets, and how many captures get theirs without a fill."""
REMEDY = "SYNCBN_KERNELS=torch runs torch's own operators instead."


class Scratch(NamedTuple):
    """Memory of a sum over several blocks, see ``reduce.cuh``. Whoever launches holds it until then."""

    partials: Tensor
    """float64, of any values."""
    tickets: Tensor
    """uint32, zeros between launches."""
    addresses: tuple[int, int]

    @classmethod
    def make(cls, x: Tensor, partials: int, tickets: Tensor) -> Scratch:
        """Allocates partial sums beside tickets."""
        memory = x.new_empty(partials, dtype=torch.float64)
        return cls(memory, tickets, (memory.data_ptr(), tickets.data_ptr()))


class AbstractLauncher(ABC):
    """Launches kernels, and holds the memory that outlives a launch."""

    @abstractmethod
    def launch(
        self, kernel: str, grid: int, block: tuple[int, int], layout: struct.Struct, values: tuple[Any, ...], x: Tensor
    ) -> None:
        """Launches on the current stream of a device, without waiting.

        Args:
            kernel: step and template arguments, as in ``local_moments<float, Planes>``.
            grid: number of blocks.
            block: threads (x, y).
            layout: the layout of the struct that is the kernel's only argument.
            values: the fields of the struct.
            x: a tensor on the device.
        """

    @abstractmethod
    def slow_float64(self, x: Tensor) -> bool:
        """Whether float64 additions are so slow on the device of x that float32 expansions are faster (``sum.cuh``)."""

    @abstractmethod
    def scratch(self, x: Tensor, partials: int, groups: int) -> Scratch:
        """Returns memory for partial sums and tickets. No other stream and no other graph uses it at the same time."""

    @abstractmethod
    def deferred_errors(self, x: Tensor) -> DeferredErrors:
        """Returns the memory in which the device of x leaves an error for the host."""


@final
class CupyLauncher(AbstractLauncher):
    """Compiles and launches with CuPy, with memory and streams of torch."""

    def __init__(self) -> None:
        try:
            import cupy
            from cupy_backends.cuda.api import driver
        except (ImportError, OSError) as error:  # OSError: CuPy makes its cache folder when it is imported
            raise RuntimeError(
                f"The GPU kernels need a CuPy that loads; received {type(error).__name__}: {error}. Set CUPY_CACHE_DIR "
                f"to a folder that can be written, if that was the reason, or install CuPy again. {REMEDY}"
            ) from error
        self._cupy, self._driver = cupy, driver
        self._slow: dict[int, bool] = {}
        self._functions: dict[tuple[str, int], int] = {}
        self._loaded: list[Any] = []  # keeps the functions of _functions loaded, even after cupy.clear_memo()
        self._scratch: dict[tuple[int, int], Scratch] = {}
        self._captured: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._store: dict[int, list[Tensor]] = {}
        self._stored: list[Tensor] = []
        self._deferred_errors: dict[int, DeferredErrors] = {}
        self._local = threading.local()  # forward and backward launch from different threads

    def launch(
        self, kernel: str, grid: int, block: tuple[int, int], layout: struct.Struct, values: tuple[Any, ...], x: Tensor
    ) -> None:
        """See ``AbstractLauncher.launch``. The raw launch takes a fifth of the time of CuPy's own call."""
        device = x.get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.launch(kernel, grid, block, layout, values, x)
        function = self._functions.get((kernel, device)) or self.compile(kernel, device)
        try:
            buffer, pointers = self._local.argument
        except AttributeError:
            buffer, pointers = self._argument()
        layout.pack_into(buffer, 0, *values)
        stream = torch._C._cuda_getCurrentRawStream(device)
        width, height = block
        self._driver.launchKernel(function, grid, 1, 1, width, height, 1, 0, stream, pointers, 0)

    def slow_float64(self, x: Tensor) -> bool:
        """See ``AbstractLauncher.slow_float64``. Asks the driver."""
        device = x.get_device()
        if device not in self._slow:
            ratio = self._cupy.cuda.runtime.deviceGetAttribute(FLOAT32_TO_FLOAT64, device)
            self._slow[device] = ratio > EXPANSION_PAYS
        return self._slow[device]

    def scratch(self, x: Tensor, partials: int, groups: int) -> Scratch:
        """See ``AbstractLauncher.scratch``. A stream keeps its own, and a launch there waits for the one before.

        A capture gets its own for each of its streams: a graph may run beside the stream, its branches in parallel.
        """
        device = x.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        if torch.cuda.is_current_stream_capturing():
            return Scratch.make(x, partials, self._captured_tickets(x, stream, groups))
        found = self._scratch.get((device, stream))
        if found is None or found.tickets.numel() < groups:
            found = Scratch.make(x, partials, self._zeros(x, groups))
        elif found.partials.numel() < partials:
            found = Scratch.make(x, partials, found.tickets)
        else:
            return found
        self._scratch[device, stream] = found
        return found

    def _zeros(self, x: Tensor, groups: int) -> Tensor:
        """Returns new tickets. The first ones of a device also fill the store for captures."""
        device = x.get_device()
        if device not in self._store:
            stored = torch.zeros(STORED, TICKETS, dtype=torch.int32, device=x.device)
            torch.cuda.current_stream(x.device).synchronize()  # a graph may be replayed on any stream
            self._stored.append(stored)  # never freed: graphs that are replayed use it
            self._store[device] = list(stored)
        return torch.zeros(max(groups, TICKETS), dtype=torch.int32, device=x.device)

    def _captured_tickets(self, x: Tensor, stream: int, groups: int) -> Tensor:
        """Returns the tickets of a capture, from the store: filling them would be one more node of the graph."""
        key, capture = (x.get_device(), stream), capture_id(stream)
        found = self._captured.get(key)
        if found is None or found[0] != capture or found[1].numel() < groups:
            store = self._store.get(x.get_device())
            if store and groups <= TICKETS:
                tickets = store.pop()
            else:
                tickets = torch.zeros(max(groups, TICKETS), dtype=torch.int32, device=x.device)
            found = self._captured[key] = capture, tickets
        return found[1]

    def deferred_errors(self, x: Tensor) -> DeferredErrors:
        """See ``AbstractLauncher.deferred_errors``. Pinned memory has one address for host and device."""
        found = self._deferred_errors.get(x.get_device())
        if found is None:
            self._refuse_capture("the first training step")
            memory = torch.zeros(DeferredErrors.SIZE, dtype=torch.float64, device="cpu").pin_memory()
            found = self._deferred_errors[x.get_device()] = DeferredErrors(
                memory, torch.cuda.is_current_stream_capturing
            )
        return found

    def _argument(self) -> tuple[Any, int]:
        """Makes this thread's memory for a kernel's argument, and the address of the array that points to it."""
        buffer = ctypes.create_string_buffer(512)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        self._cupy.cuda.runtime.setDevice(torch.cuda.current_device())  # the driver needs a context in this thread
        self._local.keep = pointers
        self._local.argument = argument = buffer, ctypes.addressof(pointers)
        return argument

    def compile(self, kernel: str, device: int) -> int:
        """Compiles one instance of a template, or takes it from CuPy's cache on disk."""
        self._refuse_capture(f"the first use of {kernel}")
        try:
            self._cupy.cuda.runtime.setDevice(device)  # CuPy compiles for its own current GPU
            module = self._cupy.RawModule(
                code=source(kernel.partition("<")[0]), options=OPTIONS, name_expressions=(kernel,)
            )
            loaded = module.get_function(kernel).kernel
        except Exception as error:
            raise RuntimeError(explain_failure(kernel, error, self._cupy)) from error
        function: int = loaded.ptr
        self._loaded.append(loaded)
        self._functions[kernel, device] = function
        return function

    def _refuse_capture(self, what: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"A CUDA graph can hold only what has run before; received a capture that contains {what}. "
                "Run one training step, forward and backward, before the capture."
            )


def source(step: str) -> str:
    """Returns a step's source with its headers inlined, so that CuPy's cache notices a change in a header."""
    return _with_headers(f"{step}.cu", set())


def _with_headers(name: str, seen: set[str]) -> str:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    text = resources.files("syncbn.kernels.cuda").joinpath(name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith('#include "'):
            header = line.split('"')[1]
            lines += [] if header in seen else [_with_headers(header, seen), f'#line {number + 1} "{name}"']
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines)


def explain_failure(kernel: str, error: Exception, cupy: Any) -> str:
    """Words the error for a kernel that does not compile: what to install, and what the compiler said."""
    major = (torch.version.cuda or "13").split(".")[0]
    try:
        version = cupy.cuda.runtime.runtimeGetVersion()
        theirs = f"CuPy {cupy.__version__} for CUDA {version // 1000}.{version % 1000 // 10}"
    except Exception as unknown:  # CuPy may miss the library that it asks
        theirs = f"CuPy {cupy.__version__}, whose CUDA does not load: {unknown}"
    return (
        f"The GPU kernels need a CuPy that compiles for this GPU; received a failure at {kernel}, with {theirs} beside "
        f"torch {torch.__version__} for CUDA {torch.version.cuda}. Install the pair that fits with: pip install "
        f'"syncbn[cuda{major}]", and NVRTC with: pip install "nvidia-cuda-nvrtc{"" if int(major) > 12 else "-cu12"}"; '
        f"{REMEDY} The compiler said:\n{error}"
    )


@cache
def _capture_info() -> Any:
    """Returns the driver's function for the number of a capture, in its first version."""
    ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo
    ask.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_uint64))
    return ask


def capture_id(stream: int) -> int:
    """Returns a number that no other capture of this process has."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    if _capture_info()(stream, ctypes.byref(status), ctypes.byref(number)):
        raise RuntimeError("The CUDA driver did not name the capture that it is in. Capture with torch.cuda.graph().")
    return number.value + 1
