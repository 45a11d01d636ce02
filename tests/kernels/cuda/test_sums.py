# SPDX-License-Identifier: BSD-3-Clause
"""The two arithmetics of the GPU kernels' sums (cuda/sum.cuh), on a CPU, against sums of twice the digits."""

import ctypes
import math
from fractions import Fraction

import pytest
import torch

from syncbn import moments
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import Status
from tests.cuda_on_cpu import EmulatedLauncher
from tests.kernels.cuda.calls import NUMBERS, batch, differing, step

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FLOAT64 = 2.0**-53
"""The rounding of one float64 operation, relative."""


def kernels(arithmetic):
    return CupyKernels(EmulatedLauncher(slow=arithmetic == "Expansion"))


@pytest.fixture(params=["Float64", "Expansion"])
def implementation(request):
    return kernels(request.param)


def exact_sum(values):
    """The sum with twice the digits of float64."""
    rounded = math.fsum(values)
    return Fraction(rounded) + Fraction(math.fsum([*values, -rounded]))


def exact_sums(x, y):
    """Sum of x and sum of x * y over N and S, for each channel. Float64 holds products of float32 without rounding."""
    rows = [t.double().transpose(0, 1).reshape(x.size(1), -1) for t in (x, y)]
    return [[exact_sum(row) for row in each.tolist()] for each in (rows[0], rows[0] * rows[1])]


def worst(found, exact, scale):
    """The largest error in units of float64's rounding of what was added up."""
    gaps = [abs(Fraction(f) - e) / abs(Fraction(s)) for f, e, s in zip(found.tolist(), exact, scale, strict=True)]
    return float(max(gaps)) / FLOAT64


def backward(implementation, grad_y, x):
    """sum_grad_y, and sum of grad_y * x: with mean 0 and invstd 1 that is sum_grad_y_xhat."""
    C = x.size(1)
    neutral = torch.tensor([*[0.0] * C, *[1.0] * C, float(C)], dtype=torch.float64)
    return implementation.backward_sums(grad_y, x, neutral, NUMBERS)[0][moments.CALL :].chunk(2)


def sums_of(implementation, x):
    """sum_x and sum_x2."""
    return moments.sums(implementation.local_moments(x, None, NUMBERS, Status())).chunk(2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_sum_loses_no_more_than_float64(implementation, dtype, mean, channels_last):
    x, grad_y = batch((6, 3, 40, 31), dtype, channels_last=channels_last)
    x = (x.double() + mean).to(dtype)
    sum_x, sum_x2 = sums_of(implementation, x)
    sums, squares = exact_sums(x, x)
    sizes = exact_sums(x.abs(), x.abs())
    # 7440 numbers; a thread adds tens of them one after the other, the rest goes by a tree.
    assert worst(sum_x, sums, sizes[0]) < 8
    assert worst(sum_x2, squares, sizes[1]) < 8
    sums, products = exact_sums(grad_y, x)
    sizes = exact_sums(grad_y.abs(), x.abs())
    found = backward(implementation, grad_y, x)
    assert worst(found[0], sums, sizes[0]) < 8
    assert worst(found[1], products, sizes[1]) < 8


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
def test_an_expansion_hardly_rounds_where_float64_rounds_at_every_number(mean):
    x, y = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(0)) + mean
    found = torch.empty(2, 2, dtype=torch.float64)
    EmulatedLauncher().library.add_up(len(x), *(ctypes.c_void_p(t.data_ptr()) for t in (x, y, found)))
    exact = [sums[0] for sums in exact_sums(x[:, None], y[:, None])]
    native, expansion = (worst(row, exact, exact) for row in found)
    assert expansion <= 2 < native  # twice: the three float32 become one float64 at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_numbers_that_float32_cannot_multiply_are_not_lost(implementation, dtype):
    for values in ([1e30, -2e30, 3.0, 0.0], [1e-30, 3e-25, -1e-38, 0.0], [3e38, 1e-38, 1.0, 1e-20], [1e25, 1e25, 1, 2]):
        x = torch.tensor(values, dtype=dtype).repeat(30)[:, None].repeat(1, 3)
        sums, squares = exact_sums(x, x)
        sum_x, sum_x2 = sums_of(implementation, x)
        sizes = exact_sums(x.abs(), x.abs())
        assert worst(sum_x, sums, sizes[0]) < 8
        assert worst(sum_x2, squares, sizes[1]) < 8
        found = backward(implementation, x, x)
        assert worst(found[1], squares, sizes[1]) < 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_arrive_as_they_do_in_float64(value, dtype):
    x = batch((9, 3, 5, 5), dtype)[0]
    x[3, 1, 2, 2] = value
    ours, theirs = (torch.cat(sums_of(kernels(name), x)) for name in ("Expansion", "Float64"))
    assert not theirs[[1, 4]].isfinite().any()
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-15, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_step_are_those_of_float64(dtype, channels_last):
    x, grad_y = batch((7, 20, 31, 17), dtype, channels_last=channels_last)
    ours, theirs = (step(kernels(name), x, grad_y) for name in ("Expansion", "Float64"))
    assert "y" not in differing(ours, theirs)
    assert "grad_x" not in differing(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_alignment_nor_on_order(dtype):
    launcher = EmulatedLauncher(slow=True)
    results = [step(CupyKernels(launcher), *batch((5, 3, 70, 65), dtype, offset=offset)) for offset in (0, 1, 0)]
    assert all(not differing(results[0], other) for other in results)


def test_float64_numbers_are_always_summed_in_float64():
    launcher = EmulatedLauncher(slow=True)
    CupyKernels(launcher).local_moments(torch.ones(4, 3, dtype=torch.float64), None, NUMBERS, Status())
    assert launcher.launches[0][0] == "local_moments<double, Rows, Float64>"
