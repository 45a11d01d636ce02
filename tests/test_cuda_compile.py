# SPDX-License-Identifier: BSD-3-Clause
"""Every GPU kernel compiles for the GPUs of today, and keeps its numbers in registers. No GPU is needed."""

import re

import pytest

from syncbn.kernels.cuda_launch import source
from tests.nvrtc import compile_for

STEPS = {
    "local_moments": "LocalMoments",
    "normalize": "Normalize",
    "backward_sums": "BackwardSums",
    "backward_input": "BackwardInput",
}
TYPES = ("Float16", "BFloat16", "float", "double")
# Three blocks of 256 threads on a multiprocessor of 65536 registers: what __launch_bounds__ leaves to rows.
REGISTERS = 80


@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("step", STEPS)
def test_every_template_compiles_without_spills(step, architecture, tmp_path):
    instances = [
        f"template __global__ void {step}<{T}, {layout}>(const {STEPS[step]});"
        for T in TYPES
        for layout in ("Planes", "Rows")
    ]
    report = compile_for(architecture, "\n".join([source(step), *instances]), tmp_path)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == len(instances), report
    assert set(spills) == {("0", "0")}, report
    assert max(registers) <= REGISTERS
    assert "warning" not in report.lower(), report


def test_a_header_stands_in_a_source_once_and_lines_keep_their_numbers():
    text = source("local_moments")
    assert text.count("struct Place {") == 1
    assert "#include" not in text
    after = text[: text.index("constexpr int STATUS")].rpartition("#line ")[2]
    number, name = after.splitlines()[0].split()
    assert name == '"local_moments.cu"'
    real = (source.__globals__["resources"].files("syncbn.kernels") / "cuda" / "local_moments.cu").read_text()
    assert real.splitlines()[int(number) - 1 + after.count("\n") - 1].startswith("constexpr int STATUS")
