# SPDX-License-Identifier: BSD-3-Clause
"""Every GPU kernel compiles for the GPUs of today, and keeps its numbers in registers. No GPU is needed."""

import re

import pytest

from syncbn.kernels.cuda.launch import source
from syncbn.kernels.cuda.prepared import kernel_name
from syncbn.moments import DTYPES
from tests.nvrtc import compile_for, ptx_of

pytestmark = pytest.mark.nvrtc
STEPS = {
    "local_moments": "LocalMoments",
    "normalize": "Normalize",
    "backward_sums": "BackwardSums",
    "backward_input": "BackwardInput",
}
# A100, H100 and H200, B200; then GPUs with slow float64: A10, L4 and L40, B300, GeForce 50.
ARCHITECTURES = {80: False, 90: False, 100: False, 86: True, 89: True, 103: True, 120: True}
# What __launch_bounds__ leaves of 65536 registers to three blocks of 256 threads, and to one where sums are expansions.
REGISTERS = {False: 80, True: 255}


def instances_of(step, slow_float64, dtypes=DTYPES):
    names = [kernel_name(step, dtype, layout, slow_float64) for dtype in dtypes for layout in ("Planes", "Rows")]
    return [f"template __global__ void {name}(const {STEPS[step]});" for name in names]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("step", STEPS)
def test_every_template_compiles_without_spills(step, architecture, tmp_path):
    instances = instances_of(step, ARCHITECTURES[architecture])
    report = compile_for(architecture, "\n".join([source(step), *instances]), tmp_path)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == len(instances), report
    assert set(spills) == {("0", "0")}, report
    assert max(registers) <= REGISTERS[ARCHITECTURES[architecture]]
    assert "warning" not in report.lower(), report


@pytest.mark.parametrize("step", STEPS)
def test_no_float32_arithmetic_takes_denormals_for_zero(step, tmp_path):
    """CuPy compiles with -ftz=true, whatever it is told. Left to it are comparisons, and what float64 sums read."""
    instances = {*instances_of(step, slow_float64=False), *instances_of(step, slow_float64=True)}
    ptx = ptx_of("\n".join([source(step), *sorted(instances)]), tmp_path, "--ftz=true")
    assert len(re.findall(r"\b(?:add|sub|mul|fma)(?:\.rn)?\.f32\b", ptx)) > 100
    flushing = {name.removesuffix(".f32") for name in re.findall(r"\b\w+\.(?:\w+\.)*ftz\.[\w.]+", ptx)}
    assert {name for name in flushing if not name.startswith(("setp.", "abs."))} <= {"cvt.ftz.f64"}


def test_a_header_stands_in_a_source_once_and_lines_keep_their_numbers():
    text = source("local_moments")
    assert text.count("struct Place {") == 1
    assert "#include" not in text
    after = text[: text.index("struct LocalMoments {")].rpartition("#line ")[2]
    number, name = after.splitlines()[0].split()
    assert name == '"local_moments.cu"'
    real = (source.__globals__["resources"].files("syncbn.kernels.cuda") / "local_moments.cu").read_text()
    assert real.splitlines()[int(number) - 1 + after.count("\n") - 1].startswith("struct LocalMoments {")
