# SPDX-License-Identifier: BSD-3-Clause
"""A compiler for the GPU kernels where there is no GPU: nvcc of the PATH, or NVRTC of the package nvidia-cuda-nvrtc."""

import ctypes
import importlib.util
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest


def compile_for(architecture, source, folder):
    """Compiles CUDA source to machine code and returns the report of the assembler."""
    options = ["--std=c++17", "--fmad=false"]
    if shutil.which("nvcc"):
        (folder / "kernel.cu").write_text(source)
        words = ["nvcc", *options, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "kernel.cu", "-o", "kernel"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr
    return _nvrtc_compile(source, [*options, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"])


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


def _nvrtc_compile(source, options):
    library, program = _nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    words = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = library.nvrtcCompileProgram(program, len(options), words)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    return log.value.decode()
