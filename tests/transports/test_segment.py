# SPDX-License-Identifier: BSD-3-Clause
"""The protocol in shared memory, with threads as ranks, under the sanitizers of the compiler. Broken, it must fail."""

import subprocess
from pathlib import Path

import pytest

from tests import processes

HERE, SOURCE = Path(__file__).parent, processes.ROOT / "syncbn" / "transports" / "segment.hpp"
FLAGS = ["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]


def compiled(folder, header, *flags):
    (folder / "segment.hpp").write_text(header)
    program = folder / "segment_threads"
    command = ["g++", *FLAGS, *flags, f"-I{folder}", HERE / "segment_threads.cpp", "-o", program]
    subprocess.run(command, check=True, timeout=200)
    return program


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("flags", "calls"),
    [((), 30_000), (("-fsanitize=thread",), 4_000), (("-fsanitize=address,undefined",), 4_000)],
    ids=["plain", "threads", "addresses"],
)
def test_every_call_is_exact_or_refused_by_all(tmp_path, flags, calls):
    program = compiled(tmp_path, SOURCE.read_text(), *flags)
    done = processes.run(program, calls, 1, 2, 3, 4, 8, limit=300, TSAN_OPTIONS="exitcode=66")
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr[-3000:]


# What each line is for, and who notices when it is gone.
BROKEN = {
    "a release": ("store(piece_, std::memory_order_seq_cst)", "store(piece_, std::memory_order_relaxed)"),
    "an acquire": ("load(std::memory_order_acquire) == piece_", "load(std::memory_order_relaxed) == piece_"),
    "a second slot": ("call_.slot ^= 1", "call_.slot = 0"),
    "a second header": ("half_of(rank, piece_)", "half_of(rank, 0)"),
    "the second step": ("if (half) continue;", ""),
    "the comparison of calls": ("same = abandoned || all_agree()", "same = true"),
    "a part of it": ("length != other.length ||", ""),
    "the bell": ("all_have_come()) ring();", "all_have_come()) (void)0;"),
}  # fmt: skip


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize("missing", BROKEN)
def test_without_a_line_it_fails(tmp_path, missing):
    line, without = BROKEN[missing]
    text = SOURCE.read_text()
    assert text.count(line) == 1
    program = compiled(tmp_path, text.replace(line, without), "-fsanitize=thread")
    done = processes.run(program, 2_000, 2, 3, limit=100, TSAN_OPTIONS="exitcode=66:halt_on_error=1")
    assert done.returncode != 0
