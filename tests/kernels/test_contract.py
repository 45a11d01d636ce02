# SPDX-License-Identifier: BSD-3-Clause
"""The kernel contract: one test body for every implementation, against reference.py in float64.

python -m pytest tests/kernels/test_contract*.py
SYNCBN_TEST_DEVICE=cuda:0 python -m pytest tests/kernels/test_contract*.py     the kernels of a GPU, on that GPU
"""

import math

import pytest
import torch

from syncbn import kernels, moments
from syncbn.kernels.base import split_stats
from tests.kernels.contract import (
    DTYPES,
    EPS,
    NUMBERS,
    SHAPES,
    STATUS,
    bound,
    exact,
    grad_of,
    moments_of,
    moved,
    normalized,
    sums_of,
)
from tests.multiprocess.batches import LAYOUTS
from tests.tolerances import error


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_equal_the_reference(implementation, rng, shape, dtype, layout):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("channels_last is for 4 and 5 dims")
    x = LAYOUTS[layout]((torch.randn(shape, generator=rng) * 2 + 1).to(dtype))
    grad_y = torch.randn(shape, generator=rng).to(dtype)
    weight, bias = torch.rand(shape[1], generator=rng) + 0.5, torch.randn(shape[1], generator=rng)
    check_steps(implementation, x, grad_y, weight, bias)


def check_steps(implementation, x, grad_y, weight, bias):
    """Compares the four steps, of this tensor alone, with the definition."""
    y, stats = normalized(implementation, x, weight=weight, bias=bias)
    grad_x = grad_of(implementation, grad_y, x, stats, weight=weight)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    assert error(y, exact_y) <= bound(x.dtype, exact_y.abs().max().item())
    assert error(grad_x, exact_grad_x) <= bound(x.dtype, exact_grad_x.abs().max().item())
    assert y.dtype == grad_x.dtype == x.dtype
    assert y.stride() == grad_x.stride() == torch.empty_like(x).stride()
    mean, invstd, count = split_stats(stats)
    x64 = x.double().transpose(0, 1).reshape(x.size(1), -1)
    assert count.item() == x64.size(1)
    torch.testing.assert_close(mean, x64.mean(1))
    torch.testing.assert_close(invstd, (x64.var(1, correction=0) + EPS).rsqrt())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", ["x", "grad_y"])
@pytest.mark.parametrize("offset", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 4, 8), (2, 64, 9, 5), (3, 5, 7, 3)], ids=str)
def test_a_view_may_begin_between_two_packs(implementation, rng, shape, dtype, offset, which, layout):
    """Both widths of access, and single elements, whether or not a plane or a row is a multiple of a pack."""
    if offset % dtype.itemsize:
        pytest.skip("a tensor begins at a multiple of its element size")
    x, grad_y = (LAYOUTS[layout](torch.randn(shape, generator=rng).to(dtype)) for _ in range(2))
    weight, bias = torch.rand(shape[1], generator=rng) + 0.5, torch.randn(shape[1], generator=rng)
    views = {"x": x, "grad_y": grad_y}
    views[which] = moved(views[which], offset)
    check_steps(implementation, views["x"], views["grad_y"], weight, bias)
    if implementation.name == "torch":  # its sums on a GPU begin at a multiple of 16 bytes: another order
        return
    y, stats = normalized(implementation, x)
    moved_y, moved_stats = normalized(implementation, views["x"])
    assert torch.equal(moved_y, y), "the width of an access changes no bits"
    grad_x = grad_of(implementation, grad_y, x, stats)
    assert torch.equal(grad_of(implementation, views["grad_y"], views["x"], moved_stats), grad_x)


ODD = {
    "expanded over samples": lambda x: x[:1].expand(x.shape),
    "expanded over places": lambda x: x[..., :1].expand(x.shape),
    "expanded over channels": lambda x: x[:, :1].expand(x.shape),
    "every other sample": lambda x: torch.cat((x, x + 1))[::2],
    "every other channel": lambda x: torch.cat((x, x + 1), 1)[:, ::2],
    "a part of each plane": lambda x: torch.cat((x, x + 1), -1)[..., 1 : 1 + x.size(-1)],
    "some channels of channels_last": lambda x: LAYOUTS["channels_last"](torch.cat((x, x), 1))[:, 1 : 1 + x.size(1)],
    "expanded over nothing": lambda x: x.unsqueeze(0).expand(1, *x.shape)[0],
}


@pytest.mark.parametrize("which", ["x", "grad_y", "both"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_strides_are_read_right(implementation, rng, dtype, odd, which):
    x, grad_y = (torch.randn(4, 3, 5, 6, generator=rng).to(dtype) for _ in range(2))
    weight, bias = torch.rand(3, generator=rng) + 0.5, torch.randn(3, generator=rng)
    x = ODD[odd](x) if which != "grad_y" else x
    grad_y = ODD[odd](grad_y) if which != "x" else grad_y
    check_steps(implementation, x, grad_y, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 1), (1, 1, 19), (5, 1, 3, 3), (7, 2, 1, 5), (3, 9, 7), (23, 33)], ids=str)
def test_one_channel_and_what_is_no_multiple_of_a_pack(implementation, rng, shape, dtype):
    x, grad_y = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    weight, bias = torch.rand(shape[1], generator=rng) + 0.5, torch.randn(shape[1], generator=rng)
    check_steps(implementation, x, grad_y, weight, bias)


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 3), (0, 0, 3), (2, 0, 3, 3)], ids=str)
def test_no_channels_are_no_work_for_a_gpu(implementation, shape):
    if implementation.name != "cupy":
        pytest.skip("refuses a tensor without channels, as torch's batch norm does")
    x = torch.empty(shape)
    y, stats = normalized(implementation, x)
    assert y.shape == grad_of(implementation, x, x, stats).shape == shape
    assert moments.count(moments_of(implementation, x)).item() == shape[0] * math.prod(shape[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_moments_are_accumulated_in_float64(implementation, rng, dtype):
    x = (torch.randn(16, 5, 40, 30, generator=rng) + 1000).to(dtype)
    wire = moments_of(implementation, x)
    sum_x, sum_x2 = moments.sums(wire).chunk(2)
    x64 = x.double().transpose(0, 1).reshape(5, -1)
    assert moments.count(wire).item() == x64.size(1)
    torch.testing.assert_close(sum_x, x64.sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(sum_x2, x64.square().sum(1), rtol=1e-14, atol=0)
    assert moments.read_counters(wire, NUMBERS) == (True, x64.size(1), STATUS)


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_gradients_of_weight_and_bias_are_the_sums_rounded_once(implementation, rng, dtype, parameters):
    x, grad_y = (torch.randn(6, 3, 5, generator=rng).to(dtype) for _ in range(2))
    stats = normalized(implementation, x)[1]
    wire, none, nothing = implementation.backward_sums(grad_y, x, stats, NUMBERS)
    assert none is nothing is None
    again, grad_weight, grad_bias = implementation.backward_sums(grad_y, x, stats, NUMBERS, parameters, parameters)
    assert torch.equal(again, wire)
    sum_grad_y, sum_grad_y_xhat = wire[moments.CALL :].chunk(2)
    assert torch.equal(grad_weight, sum_grad_y_xhat.to(parameters))
    assert torch.equal(grad_bias, sum_grad_y.to(parameters))
    only_bias = implementation.backward_sums(grad_y, x, stats, NUMBERS, None, parameters)
    assert only_bias[1] is None
    assert torch.equal(only_bias[2], grad_bias)
    wire.add_(1)  # an all-reduce works in place, and the gradients stay local
    assert torch.equal(only_bias[2], sums_of(implementation, grad_y, x, stats)[moments.CALL :][:3].to(parameters))


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_may_have_another_dtype(implementation, rng, dtype, parameters):
    x, grad_y = torch.randn(2, 6, 3, 5, 7, generator=rng).to(dtype)
    weight, bias = (torch.rand(2, 3, generator=rng) + 0.5).to(parameters)
    y, stats = normalized(implementation, x, weight=weight, bias=bias)
    grad_x = grad_of(implementation, grad_y, x, stats, weight=weight)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    assert error(y, exact_y) <= bound(dtype, 4.0)
    assert error(grad_x, exact_grad_x) <= bound(dtype, 4.0)


def test_grad_y_may_have_another_layout(implementation, rng):
    x, grad_y = torch.randn(2, 3, 5, 4, 6, generator=rng)
    last = torch.channels_last
    stats = normalized(implementation, x)[1]
    results = []
    for a, b in [(x, grad_y), (x.to(memory_format=last), grad_y), (x, grad_y.to(memory_format=last))]:
        results.append(grad_of(implementation, b, a, stats))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-6)
    assert results[1].is_contiguous(memory_format=last)


def test_an_expanded_grad_y_is_read_right(implementation, rng):
    """sum().backward() sends a gradient of stride zero."""
    x = torch.randn(3, 4, 5, 6, generator=rng)
    stats = normalized(implementation, x)[1]
    grad_y = torch.tensor(2.0).expand(x.shape)
    sums = sums_of(implementation, grad_y, x, stats)
    torch.testing.assert_close(sums[moments.CALL :][:4], torch.full((4,), 180.0).double())
    full = grad_of(implementation, grad_y.contiguous(), x, stats, sums=sums)
    assert torch.equal(grad_of(implementation, grad_y, x, stats, sums=sums), full)


def test_inputs_are_left_alone(implementation, rng):
    x, grad_y = torch.randn(2, 4, 3, 5, generator=rng)
    x64, g64 = x.double(), grad_y.double()
    for a, b in [(x, grad_y), (x64, g64)]:
        copies = a.clone(), b.clone()
        grad_of(implementation, b, a, normalized(implementation, a)[1])
        assert torch.equal(a, copies[0])
        assert torch.equal(b, copies[1])


def test_choose_gives_kernels_for_the_cpu():
    assert isinstance(kernels.choose(torch.empty(0, device="cpu")), kernels.AbstractKernels)
