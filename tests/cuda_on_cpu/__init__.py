# SPDX-License-Identifier: BSD-3-Clause
"""Runs the GPU kernels' own source on a CPU, behind the very wrapper that CuPy launches from. See cuda.hpp."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from syncbn.kernels.cuda.errors import DeferredErrors
from syncbn.kernels.cuda.launch import AbstractLauncher, Scratch
from tests.processes import patience

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "syncbn" / "kernels" / "cuda"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
FEW = "-DSYNCBN_FEW"
"""Builds bfloat16 and float32, and sums in float64, in a third of the time."""
QUIET = ("-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-tsan")
PROBLEMS = {1: "no such kernel", 2: "a barrier that not all threads reach", 3: "no such grid or block"}


@cache
def build(*more, cuda=CUDA):
    """Compiles kernels and machine; once for each content and set of flags on this host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    sources = sorted([*HERE.glob("*.[ch]pp"), *cuda.glob("*.cu*")])
    key = hashlib.sha256(repr(more).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"syncbn-cuda-on-cpu-{key}.so")
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        words = ["g++", *FLAGS, *QUIET, *more, f"-I{HERE}", f"-I{cuda}", HERE / "kernels.cpp", HERE / "machine.cpp"]
        subprocess.run([*words, "-o", made], check=True, timeout=patience(300))
        made.replace(library)
    return library


class EmulatedLauncher(AbstractLauncher):
    """Runs kernels on a CPU and keeps a record of what was launched.

    Args:
        seed: of the order of blocks and threads.
        library: what ``build`` made, if not of the sources as they are.
        slow: whether to say that float64 is slow here.
        device: where tickets are. Deferred errors are in host memory, pinned for a device.
    """

    def __init__(self, seed=0, library=None, *, slow=False, device="cpu"):
        self.slow = slow
        self.library = ctypes.CDLL(str(library or build()))
        memory = torch.zeros(DeferredErrors.SIZE, dtype=torch.float64, device="cpu", pin_memory=device != "cpu")
        self.seed, self.launches, self.errors = seed, [], DeferredErrors(memory)
        self.zeros = torch.zeros(4096, dtype=torch.int32, device=device)

    def launch(self, kernel, grid, block, layout, values, x):
        self.seed += 1
        self.launches.append((kernel, grid, block, values))
        packed = layout.pack(*values)
        status = self.library.launch(kernel.encode(), grid, *block, packed, self.seed)
        assert status == 0, f"{kernel}: {PROBLEMS[status]}"
        assert not self.zeros.any(), "tickets are given back"

    def slow_float64(self, x):
        return self.slow

    def scratch(self, x, partials, groups):
        assert groups <= self.zeros.numel()
        return Scratch.make(x, partials, self.zeros)

    def deferred_errors(self, x):
        return self.errors
