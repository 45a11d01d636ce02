# SPDX-License-Identifier: BSD-3-Clause
"""How CuPy is asked: a CuPy and a CUDA that only take notes."""

import ctypes
import gc
import struct
import sys
import weakref
from math import prod
from types import ModuleType, SimpleNamespace

import pytest
import torch

from syncbn import kernels
from syncbn.kernels.cuda import launch
from syncbn.kernels.cuda.launch import CupyLauncher

LAYOUT, X = struct.Struct("=qd"), torch.zeros(3)


ALIVE = weakref.WeakSet()


class Function:
    """A kernel that is loaded; CuPy unloads it when nothing holds this."""

    def __init__(self, name):
        self.ptr = len(name)
        ALIVE.add(self)


class Notes:
    """What was asked of CUDA, and what it says of itself."""

    def __init__(self):
        self.launches, self.compiled, self.devices, self.ratio = [], [], [], 2
        self.stream, self.capturing, self.capture, self.failure = 77, False, 5, None

    def launch_kernel(self, function, *arguments):
        *sizes, shared, stream, pointers, extra = arguments
        address = ctypes.c_void_p.from_address(pointers).value
        argument = LAYOUT.unpack(ctypes.string_at(address, LAYOUT.size))
        self.launches.append((function, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream, argument, extra))

    def raw_module(self, code, options, name_expressions):
        self.compiled.append((code, options, name_expressions))
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=Function(name)))


@pytest.fixture
def notes(monkeypatch):
    notes = Notes()
    runtime = SimpleNamespace(setDevice=notes.devices.append, runtimeGetVersion=lambda: 13020)
    runtime.deviceGetAttribute = lambda attribute, device: {(87, -1): notes.ratio}[attribute, device]
    cupy = ModuleType("cupy")
    cupy.__version__, cupy.RawModule, cupy.cuda = "14.2.0", notes.raw_module, SimpleNamespace(runtime=runtime)
    api = ModuleType("cupy_backends.cuda.api")
    api.driver = SimpleNamespace(launchKernel=notes.launch_kernel)
    for name, module in {"cupy": cupy, "cupy_backends": ModuleType("b"), "cupy_backends.cuda": ModuleType("c")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", api)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # get_device() of a CPU tensor
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: notes.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: notes.stream, raising=False)
    monkeypatch.setattr(launch, "capture_id", lambda stream: notes.capture)
    return notes


def test_a_launch_passes_one_struct_on_the_current_stream(notes):
    launcher = CupyLauncher()
    for number in (3, 4):
        launcher.launch("normalize<float, Rows>", 12, (32, 8), LAYOUT, (number, 0.5), X)
    handle = len("normalize<float, Rows>")
    assert notes.launches == [(handle, (12, 1, 1), (32, 8, 1), 0, 77, (n, 0.5), 0) for n in (3, 4)]
    assert notes.devices == [-1, -1], "for the compiler, and a context once a thread"


def test_a_kernel_is_compiled_once_with_its_headers_and_without_contraction(notes):
    launcher = CupyLauncher()
    for _ in range(2):
        launcher.launch("backward_sums<double, Planes>", 1, (1, 1), LAYOUT, (0, 0.0), X)
    ((code, options, names),) = notes.compiled
    assert code == launch.source("backward_sums")
    assert options == ("--std=c++17", "--fmad=false")
    assert names == ("backward_sums<double, Planes>",)


def test_a_kernel_stays_loaded_as_long_as_its_launcher(notes):
    ALIVE.clear()
    launcher = CupyLauncher()
    launcher.launch("normalize<float, Rows>", 1, (1, 1), LAYOUT, (0, 0.0), X)
    gc.collect()
    assert len(ALIVE) == 1
    del launcher
    gc.collect()
    assert len(ALIVE) == 0


def test_a_kernel_that_does_not_compile_says_what_to_install_and_what_the_compiler_said(notes):
    notes.failure = OSError("libnvrtc.so.13: cannot open shared object file")
    with pytest.raises(RuntimeError, match="cannot open shared object file") as caught:
        CupyLauncher().launch("normalize<float, Rows>", 1, (1, 1), LAYOUT, (0, 0.0), X)
    for part in (
        "normalize<float, Rows>",
        "CuPy 14.2.0 for CUDA 13.2",
        'pip install "syncbn[cuda',
        "nvidia-cuda-nvrtc",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(("ratio", "slow"), [(2, False), (4, False), (32, True), (64, True)])
def test_the_driver_says_whether_float64_is_slow(notes, ratio, slow):
    notes.ratio = ratio
    launcher = CupyLauncher()
    assert launcher.slow_float64(X) is slow
    notes.ratio = 66 - ratio
    assert launcher.slow_float64(X) is slow, "asked once for each device"


def test_a_cupy_that_may_not_write_its_cache_says_where_it_could(notes, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise PermissionError("[Errno 13] Permission denied: '/.cupy'")

    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"Permission denied: '/.cupy'.*CUPY_CACHE_DIR"):
        CupyLauncher()


def test_a_capture_that_holds_a_first_use_is_refused(notes):
    launcher = CupyLauncher()
    notes.capturing = True
    with pytest.raises(RuntimeError, match="Run one training step, forward and backward, before the capture"):
        launcher.launch("normalize<float, Rows>", 1, (1, 1), LAYOUT, (0, 0.0), X)
    with pytest.raises(RuntimeError, match="a capture that contains the first training step"):
        launcher.deferred_errors(X)
    assert notes.compiled == []


def test_no_two_streams_and_no_two_captures_share_tickets(notes):
    launcher = CupyLauncher()

    def tickets(groups=10):
        return launcher.scratch(X, 100, groups).tickets

    first = tickets()
    assert tickets() is first
    notes.stream = 78
    assert tickets() is not first
    notes.capturing = True
    captured = tickets()
    assert tickets(20) is captured
    notes.stream = 79
    assert tickets() is not captured, "a branch of the same graph may run beside it"
    notes.stream, notes.capture = 78, 6
    assert tickets() is not captured
    notes.capturing, notes.stream = False, 77
    assert tickets() is first
    assert tickets(5000).numel() >= 5000


def test_a_stream_keeps_its_partial_sums_and_a_capture_has_new_ones_for_each_launch(notes):
    launcher = CupyLauncher()
    first = launcher.scratch(X, 100, 10)
    assert first.addresses == (first.partials.data_ptr(), first.tickets.data_ptr())
    assert launcher.scratch(X, 50, 10) is first
    larger = launcher.scratch(X, 200, 10)
    assert (larger.partials.numel(), larger.tickets is first.tickets) == (200, True)
    assert launcher.scratch(X, 100, 10) is larger
    notes.stream = 78
    assert launcher.scratch(X, 100, 10).partials is not larger.partials
    notes.stream, notes.capturing = 77, True
    captured = [launcher.scratch(X, 100, 10).partials.data_ptr() for _ in range(2)]
    assert larger.addresses[0] not in captured


def test_the_tickets_of_a_graph_are_never_given_to_another_and_never_freed(notes):
    launcher, found = CupyLauncher(), []
    launcher.scratch(X, 100, 10)
    notes.capturing = True
    for notes.capture in range(launch.STORED + 5):
        found.append(launcher.scratch(X, 100, 10).tickets)
    assert len({tickets.data_ptr() for tickets in found}) == launch.STORED + 5
    stored = weakref.ref(found[0].untyped_storage())
    del found
    gc.collect()
    assert stored() is not None, "graphs that are still replayed use it"


def test_the_deferred_errors_of_a_device_are_in_one_place(notes, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    launcher = CupyLauncher()
    with torch.device("meta"):  # a default device that a person has set
        assert launcher.deferred_errors(X).memory.is_cpu
    assert launcher.deferred_errors(X) is launcher.deferred_errors(X)


@pytest.mark.parametrize(
    ("version", "cupy", "override", "expected"),
    [
        (None, True, "auto", ("torch", "not built for CUDA")),
        ("13.0", False, "auto", ("torch", 'pip install "syncbn[cuda13]"')),
        ("12.8", False, "auto", ("torch", 'pip install "syncbn[cuda12]"')),
        ("13.0", True, "torch", ("torch", "SYNCBN_KERNELS=torch")),
        ("13.0", True, "auto", ("cupy", "CuPy")),
    ],
)
def test_the_device_kernels_are_chosen_and_explained(monkeypatch, version, cupy, override, expected):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("SYNCBN_KERNELS", override)
    monkeypatch.setattr(kernels.dispatch.importlib.util, "find_spec", lambda name: object() if cupy else None)
    choice = kernels.explain_device.__wrapped__()
    assert choice.name == expected[0]
    assert expected[1] in choice.reason


def test_without_cupy_the_readable_kernels_serve_with_one_hint(monkeypatch):
    choice = kernels.Choice("torch", "CuPy is not installed")
    monkeypatch.setattr(kernels.dispatch, "explain_device", lambda: choice)
    with pytest.warns(UserWarning, match="torch's operators for CUDA tensors: CuPy is not installed"):
        assert kernels.dispatch.cuda_kernels.__wrapped__(False).name == "torch"


def test_a_plane_that_32_bits_cannot_count_gets_torchs_operators(monkeypatch):
    monkeypatch.setattr(kernels.dispatch, "PLAIN", (SimpleNamespace,))
    monkeypatch.setattr(kernels.dispatch, "cuda_kernels", lambda host_synchronous: "cupy")
    for shape, expected in (((4, 2, 2**29), "cupy"), ((1, 2, 2**31), "torch")):
        x = SimpleNamespace(is_cuda=True, is_neg=lambda: False, numel=lambda shape=shape: prod(shape), shape=shape)
        found = kernels.on_device(x, SimpleNamespace(size=1, host_synchronous=False))
        assert getattr(found, "name", found) == expected


def test_a_gpu_that_is_too_old_gets_torchs_operators(monkeypatch):
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels.dispatch.importlib.util, "find_spec", lambda name: object())
    for capability, expected in (((7, 5), "torch"), ((8, 0), "cupy"), ((10, 0), "cupy")):
        monkeypatch.setattr(kernels.dispatch, "capabilities", lambda capability=capability: [(9, 0), capability])
        choice = kernels.explain_device.__wrapped__()
        assert choice.name == expected
        assert ("7.5" in choice.reason) == (expected == "torch")
