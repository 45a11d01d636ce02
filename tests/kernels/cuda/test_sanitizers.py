# SPDX-License-Identifier: BSD-3-Clause
"""The GPU kernels under the sanitizers of the compiler, on a CPU: see cuda_on_cpu/cuda.hpp."""

import os
import shutil
import subprocess

import pytest

from tests import processes
from tests.cuda_on_cpu import CUDA, FEW, build

SANITIZERS = {
    "address": (FEW, "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-O0", "-g"),
    "thread": (FEW, "-fsanitize=thread", "-g"),
}


def sanitized(kind, library):
    """Runs the four steps on a build with gcc's sanitizers: for addresses and alignment, or for races."""
    found = subprocess.run(["gcc", f"-print-file-name=lib{kind[0]}san.so"], capture_output=True, text=True, check=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip(f"gcc has no lib{kind[0]}san here")
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    words = ("-m", "tests.cuda_on_cpu.steps", library)
    return processes.python(*words, LD_PRELOAD=found.stdout.strip(), PYTHONMALLOC="malloc", limit=300, **options)


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_the_sanitizers_find_nothing(kind):
    done = sanitized(kind, build(*SANITIZERS[kind]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


# What each line is for, and who notices when it is gone.
BROKEN = {
    "a barrier": ("thread", "reduce.cuh", "        __syncthreads();\n        if (!last)", "        if (!last)"),
    "a fence": ("thread", "reduce.cuh", "            __threadfence();  // the sums", "            // the sums"),
    "an alignment": ("address", "walk.cuh", "if (width == 16) return", "if (width >= 0) return"),
    "a bound": ("address", "storage.cuh", "if (i < length) pack.at", "pack.at"),
}


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize("missing", BROKEN)
def test_the_sanitizers_find_a_kernel_without(missing, tmp_path):
    kind, name, line, without = BROKEN[missing]
    shutil.copytree(CUDA, tmp_path / "cuda")
    text = (tmp_path / "cuda" / name).read_text()
    assert line in text
    (tmp_path / "cuda" / name).write_text(text.replace(line, without))
    done = sanitized(kind, build(*SANITIZERS[kind], cuda=tmp_path / "cuda"))
    assert done.returncode != 0
    assert "Sanitizer: " in done.stderr or "misaligned address" in done.stderr
