# SPDX-License-Identifier: BSD-3-Clause
"""A compiler for the GPU kernels where there is no GPU: nvcc of the PATH, or NVRTC of the package nvidia-cuda-nvrtc."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from tests.processes import patience

OPTIONS = ("--std=c++17", "--fmad=false")


def compile_for(architecture, source, folder):
    """Compiles CUDA source to machine code and returns the assembler's report; once for each source on this host."""
    compiler = Path(shutil.which("nvcc") or _nvrtc()._name)
    key = hashlib.sha256(
        repr((compiler, compiler.stat().st_mtime_ns, OPTIONS, architecture, source)).encode()
    ).hexdigest()[:16]
    kept = Path(tempfile.gettempdir(), f"syncbn-sm-{architecture}-{key}.txt")
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_text(_compile_for(architecture, source, folder))
        made.replace(kept)
    return kept.read_text()


def _compile_for(architecture, source, folder):
    if shutil.which("nvcc"):
        return _nvcc(source, folder, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v")
    return _nvrtc_compile(source, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v")[0]


def ptx_of(source, folder, *more):
    """Compiles CUDA source to PTX, with more options."""
    if shutil.which("nvcc"):
        _nvcc(source, folder, "-ptx", "-arch=compute_80", *more)
        return (folder / "kernel").read_text()
    return _nvrtc_compile(source, "--gpu-architecture=compute_80", *more)[1]


def _nvcc(source, folder, *more):
    (folder / "kernel.cu").write_text(source)
    words = ["nvcc", *OPTIONS, *more, "kernel.cu", "-o", "kernel"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@cache
def _nvrtc():
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations]
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    if not found:
        pytest.skip("needs a CUDA compiler: nvcc on the PATH, or pip install nvidia-cuda-nvrtc")
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):  # which it would look for elsewhere
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[-1]))


def _nvrtc_compile(source, *more):
    """Returns the log, and PTX where the architecture is a virtual one."""
    library, program = _nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    words = [option.encode() for option in (*OPTIONS, *more)]
    status = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    log = _text(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
    assert status == 0, log
    ptx = _text(program, library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log, ptx


def _text(program, ask_size, ask_text):
    size = ctypes.c_size_t()
    ask_size(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value + 1)
    ask_text(program, text)
    return text.value.decode()
