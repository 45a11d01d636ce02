# SPDX-License-Identifier: BSD-3-Clause
"""The protocol in shared memory, with threads as ranks, under the sanitizers of the compiler. Broken, it must fail."""

import subprocess
from pathlib import Path

import pytest

from tests import processes

HERE, SOURCE = Path(__file__).parent, processes.ROOT / "syncbn" / "transports" / "segment.hpp"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread"]


def compiled(folder, header, *flags):
    (folder / "segment.hpp").write_text(header)
    program = folder / "segment_threads"
    command = ["g++", *FLAGS, *flags, f"-I{folder}", HERE / "segment_threads.cpp", "-o", program]
    subprocess.run(command, check=True, timeout=processes.patience(200))
    return program


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        (("-O2",), 30_000),
        (("-O1", "-g", "-fsanitize=thread"), 4_000),
        (("-O1", "-g", "-fsanitize=address,undefined"), 4_000),
    ],
    ids=["plain", "threads", "addresses"],
)
def test_every_call_is_exact_or_refused_by_all(tmp_path, flags, calls):
    program = compiled(tmp_path, SOURCE.read_text(), *flags)
    done = processes.run(program, calls, 1, 2, 3, 4, 8, limit=300, TSAN_OPTIONS="exitcode=66")
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr[-3000:]


RELAXED = "std::memory_order_relaxed"
# What each line is for, and the same line with a switch, GONE, that takes that away.
BROKEN = {
    "a release": (
        "own.piece.store(piece_, std::memory_order_seq_cst)",
        f"GONE ? own.piece.store(piece_, {RELAXED}) : own.piece.store(piece_, std::memory_order_seq_cst)",
    ),
    "an acquire": (
        "header(rank).piece.load(std::memory_order_acquire) == piece_",
        f"(GONE ? header(rank).piece.load({RELAXED}) : header(rank).piece.load(std::memory_order_acquire)) == piece_",
    ),
    "a second slot": ("call_.slot ^= 1", "call_.slot = GONE ? 0 : call_.slot ^ 1"),
    "a second header": ("half_of(rank, piece_)", "half_of(rank, GONE ? 0 : piece_)"),
    "the second step": ("if (half) continue;", "if (half && !GONE) continue;"),
    "the comparison of calls": ("same = abandoned || all_agree()", "same = GONE || abandoned || all_agree()"),
    "a part of it": ("length != other.length ||", "(length != other.length && !GONE) ||"),
    "the bell": ("all_have_come()) ring();", "all_have_come() && !GONE) ring();"),
}
SWITCH = '#include <cstdlib>\ninline const int gone = std::atoi(std::getenv("GONE"));\n'


@pytest.fixture(scope="module")
def breakable(tmp_path_factory):
    """The program with all switches: one build for all of them. GONE=0 takes nothing away."""
    text = SOURCE.read_text()
    for number, (line, switched) in enumerate(BROKEN.values(), 1):
        assert text.count(line) == 1
        text = text.replace(line, switched.replace("GONE", f"(gone == {number})"))
    return compiled(tmp_path_factory.mktemp("breakable"), SWITCH + text, "-O1", "-fsanitize=thread")


@pytest.mark.builds
@pytest.mark.xdist_group("breakable")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("missing", ["nothing", *BROKEN])
def test_without_a_line_it_fails(breakable, missing):
    number = ["nothing", *BROKEN].index(missing)
    options = "exitcode=66:halt_on_error=1"
    done = processes.run(breakable, 2_000, 2, 3, limit=100, TSAN_OPTIONS=options, GONE=number)
    assert (done.returncode != 0) == (missing != "nothing"), done.stderr[-3000:]
