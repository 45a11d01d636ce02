# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu.variants`: every variant changes something, compiles and computes the same."""

import json
import re
import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks.gpu import variants
from benchmarks.gpu.variants import AS_IS, STEPS, VARIANTS, Result, Variant, changed, step_of, table
from syncbn.kernels.cuda import geometry, launch
from syncbn.kernels.cuda.launch import source
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import DTYPES
from tests.cuda_on_cpu import CUDA, FEW, EmulatedLauncher, build
from tests.kernels.cuda.test_compile import instances_of
from tests.nvrtc import compile_for

OTHERS = VARIANTS[1:]
OF_SOURCE = [variant for variant in OTHERS if variant.words]
ON_CPU = "ptx.cuh"  # which the emulator replaces
# Several blocks a group, tails, more channels than a pack holds, and rows.
SHAPES = [(4, 5, 30, 31), (2, 40, 24, 24), (70, 7)]


def named(variant):
    return variant.name


def changed_files(variant):
    texts = {path.name: path.read_text() for path in sorted(CUDA.glob("*.cu*"))}
    return {name: variant.changed(text) for name, text in texts.items() if variant.changed(text) != text}


def test_the_first_variant_is_the_kernels_as_they_are_and_names_differ():
    assert VARIANTS[0] == Variant(AS_IS)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert all(VARIANTS[0].text(step) == source(step) for step in STEPS)


@pytest.mark.parametrize("variant", OTHERS, ids=named)
def test_a_variant_changes_something(variant):
    assert variant.words or variant.constants or variant.threads != geometry.THREADS
    assert variant.threads <= geometry.THREADS
    for old, new in variant.words:
        assert any(old in source(step) for step in STEPS), f"no kernel has {old!r}"
        assert old != new
    for name, value in variant.constants.items():
        assert vars(geometry)[name] != value, f"{name} is {value} already"
    if variant.words:
        assert any(variant.text(step) != source(step) for step in STEPS)


def test_a_change_ends_with_its_context():
    before, x = dict(vars(geometry)), torch.empty(2, 64, 56, 56)
    plans = []
    for variant in (Variant("other", (("grad_y", "grad"),), {"STEPS": 1, "STEPS_ALONE": 0}), Variant(AS_IS)):
        with changed(variant):
            plans.append(geometry.plan(x.shape, x.stride(), 4))
            assert ("grad_y" in launch.source("backward_input")) == (variant.name == AS_IS)
    assert plans[0] != plans[1] == geometry.plan(x.shape, x.stride(), 4)
    assert {name: value for name, value in vars(geometry).items() if name.isupper()} == {
        name: value for name, value in before.items() if name.isupper()
    }
    assert launch.source is source


def test_a_version_in_a_folder_is_a_variant(tmp_path):
    for path in CUDA.glob("*.cu*"):
        (tmp_path / path.name).write_text(path.read_text().replace("MAX_THREADS", "MOST_THREADS"))
    before = Variant("before", folder=tmp_path)
    assert all(before.text(step) == source(step).replace("MAX_THREADS", "MOST_THREADS") for step in STEPS)
    assert before.source != VARIANTS[0].source


def steps(library, variant):
    """The results of the four launches for every shape, dtype and layout, on the emulator."""
    torch.manual_seed(0)
    found = []
    with changed(variant):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for channels_last in (False, True):
                    x, grad_y = torch.randn(2, *shape, device="cpu").to(dtype)
                    if channels_last:
                        x, grad_y = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad_y))
                    kernels = CupyKernels(EmulatedLauncher(library=library), threads=variant.threads)
                    found += step_of(kernels, x, grad_y)()
    return found


@pytest.mark.cpu("runs the kernels' source on a CPU")
@pytest.mark.builds
@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", OTHERS, ids=named)
def test_a_variant_computes_the_same(variant, tmp_path):
    files = changed_files(variant)
    if files.keys() == {ON_CPU}:
        pytest.skip(f"changes only {ON_CPU}, in place of which the emulator has functions of its own")
    for path in CUDA.glob("*.cu*"):
        (tmp_path / path.name).write_text(files.get(path.name, path.read_text()))
    expected = steps(build(FEW), VARIANTS[0])
    for ours, right in zip(steps(build(FEW, cuda=tmp_path), variant), expected, strict=True):
        torch.testing.assert_close(ours, right)
        assert variant.constants or variant.threads != geometry.THREADS or torch.equal(ours, right), (
            "the same geometry, and so the same bits"
        )


@pytest.mark.nvrtc
@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", [VARIANTS[0], *OF_SOURCE], ids=named)
def test_a_variant_compiles_for_sm_90(variant, tmp_path, record_property):
    """Also prints how many registers and bytes of spills each kernel has: pytest -s shows them."""
    dtypes = (torch.float32, torch.bfloat16) if variant.words else DTYPES
    for step in STEPS:
        text, instances = variant.text(step), instances_of(step, slow_float64=False, dtypes=dtypes)
        if variant.words and text == source(step):
            continue
        report = compile_for(90, "\n".join([text, *instances]), tmp_path)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
        assert len(registers) == len(spills) == len(instances), report
        said = f"{max(registers)} registers, {max(spills)} bytes of spills"
        record_property(step, said)
        sys.stdout.write(f"{variant.name}, {step}: {said}\n")


def result(variant, step_us, of_as_is, shape=(2, 64, 56, 56)):
    return Result(shape, "float32", "contiguous", variant, step_us, of_as_is, 0.5, dict.fromkeys(STEPS, 2.5))


def test_the_table_has_a_row_for_each_shape_and_variant_and_their_means():
    results = [
        *(result(AS_IS, 10.0, 1.0), result("other", 5.0, 2.0)),
        *(result(AS_IS, 10.0, 1.0, (8, 4)), result("other", 20.0, 0.5, (8, 4))),
    ]
    rows, means = ([re.split(r"  +", line.rstrip()) for line in t.splitlines()] for t in table(results).split("\n\n"))
    assert rows[0] == ["N,C,spatial", "dtype", "layout", "variant", "step us", "as is / it", "of copy", *STEPS]
    assert rows[5] == ["8,4", "float32", "contiguous", "other", "20.0", "0.500", "0.50", *["2.5"] * 4]
    assert len(rows) == 2 + 4
    assert means[2:] == [[AS_IS, "1.000", "1.000", "1.000"], ["other", "1.000", "0.500", "2.000"]]


def test_the_json_has_every_result(tmp_path):
    results, path = [result(AS_IS, 10.0, 1.0), result("other", 5.0, 2.0)], tmp_path / "variants.json"
    variants.write(results, str(path))
    assert json.loads(path.read_text()) == [asdict(each) | {"shape": [2, 64, 56, 56]} for each in results]
    assert list(tmp_path.iterdir()) == [path]


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        variants.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "the four kernels as they are, beside variants of them" in out
    assert all(option in out for option in ("--shapes", "--dtypes", "--time-limit", "--output", "--before"))


def test_without_a_gpu_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert variants.main([]) == 1
    assert capsys.readouterr().err == ("benchmarks.gpu.variants: it needs an NVIDIA GPU and CuPy; torch finds none.\n")
