# SPDX-License-Identifier: BSD-3-Clause
"""The kernel contract: one test body for every implementation, against reference.py in float64."""

import pytest
import torch

from syncbn import kernels, moments, reference
from syncbn.kernels.cupy_ops import CupyKernels
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Running, Status
from tests.cuda_on_cpu import EmulatedLauncher
from tests.multiprocess.batches import LAYOUTS
from tests.tolerances import FLOOR, error

EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[torch.float32])
SHAPES = [(5, 3), (4, 1, 7), (2, 5, 3, 4), (3, 17, 1, 1), (2, 64, 9, 5), (2, 3, 2, 3, 2), (1, 2, 33, 31)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["torch", "host", "cuda on cpu", "cuda on cpu, slow float64"])
def implementation(request):
    if request.param == "torch":
        return TorchKernels()
    if request.param.startswith("cuda on cpu"):
        return CupyKernels(EmulatedLauncher(slow="slow" in request.param))
    pytest.importorskip("syncbn.kernels._host", reason="built without a compiler")
    return pytest.importorskip("syncbn.kernels.host_ops").HostKernels()


def exact(x, grad_y, weight, bias):
    """y and grad_x by the definition, in float64."""
    x = x.double().requires_grad_()
    stats = torch.zeros(x.size(1), dtype=torch.float64, device=x.device)
    y = reference.batch_norm(x, weight.double(), bias.double(), stats, stats, eps=EPS).y
    y.backward(grad_y.double())
    return y.detach(), x.grad


def bound(dtype, scale):
    """One rounding of the largest value, and what the elementwise arithmetic in float32 may add."""
    return FLOOR[dtype] * max(1.0, scale) * 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_equal_the_reference(implementation, rng, shape, dtype, layout):
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("channels_last is for 4 and 5 dims")
    x = LAYOUTS[layout]((torch.randn(shape, generator=rng) * 2 + 1).to(dtype))
    grad_y = torch.randn(shape, generator=rng).to(dtype)
    weight, bias = torch.rand(shape[1], generator=rng) + 0.5, torch.randn(shape[1], generator=rng)
    count = x.numel() // shape[1]
    wire = implementation.local_moments(x, STATUS)
    y, stats = implementation.normalize(x, wire, weight, bias, None, EPS, count)
    sums = implementation.backward_sums(grad_y, x, stats)
    grad_x = implementation.backward_input(grad_y, x, sums, weight, stats)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    assert error(y, exact_y) <= bound(dtype, exact_y.abs().max().item())
    assert error(grad_x, exact_grad_x) <= bound(dtype, exact_grad_x.abs().max().item())
    assert y.dtype == grad_x.dtype == dtype
    assert y.stride() == grad_x.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_moments_are_accumulated_in_float64(implementation, rng, dtype):
    x = (torch.randn(16, 5, 40, 30, generator=rng) + 1000).to(dtype)
    wire = implementation.local_moments(x, STATUS)
    count, sum_x, sum_x2 = moments.unpack(wire)
    x64 = x.double().transpose(0, 1).reshape(5, -1)
    assert count.item() == x64.size(1)
    torch.testing.assert_close(sum_x, x64.sum(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(sum_x2, x64.square().sum(1), rtol=1e-14, atol=0)
    assert moments.read_status(wire)[1] == STATUS


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_an_empty_share_sends_zeros_and_gets_empties(implementation, shape):
    x = torch.empty(shape)
    wire = implementation.local_moments(x, STATUS)
    assert not wire[: 2 * 3 + 1].any()
    whole = implementation.local_moments(torch.randn(4, 3), STATUS) + wire
    y, stats = implementation.normalize(x, whole, None, None, None, EPS, 4.0)
    sums = implementation.backward_sums(x, x, stats)
    assert not sums.any()
    grad_x = implementation.backward_input(x, x, sums, None, stats)
    assert y.shape == grad_x.shape == shape


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_may_have_another_dtype(implementation, rng, dtype, parameters):
    x, grad_y = torch.randn(2, 6, 3, 5, 7, generator=rng).to(dtype)
    weight, bias = (torch.rand(2, 3, generator=rng) + 0.5).to(parameters)
    wire = implementation.local_moments(x, STATUS)
    y, stats = implementation.normalize(x, wire, weight, bias, None, EPS, 6 * 35.0)
    grad_x = implementation.backward_input(grad_y, x, implementation.backward_sums(grad_y, x, stats), weight, stats)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    assert error(y, exact_y) <= bound(dtype, 4.0)
    assert error(grad_x, exact_grad_x) <= bound(dtype, 4.0)


def test_grad_y_may_have_another_layout(implementation, rng):
    x, grad_y = torch.randn(2, 3, 5, 4, 6, generator=rng)
    last = torch.channels_last
    stats = implementation.normalize(x, implementation.local_moments(x, STATUS), None, None, None, EPS, 72.0)[1]
    results = []
    for a, b in [(x, grad_y), (x.to(memory_format=last), grad_y), (x, grad_y.to(memory_format=last))]:
        sums = implementation.backward_sums(b, a, stats)
        results.append(implementation.backward_input(b, a, sums, None, stats))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-6)
    assert results[1].is_contiguous(memory_format=last)


def test_an_expanded_grad_y_is_read_right(implementation, rng):
    """sum().backward() sends a gradient of stride zero."""
    x = torch.randn(3, 4, 5, 6, generator=rng)
    stats = implementation.normalize(x, implementation.local_moments(x, STATUS), None, None, None, EPS, 90.0)[1]
    grad_y = torch.tensor(2.0).expand(x.shape)
    sums = implementation.backward_sums(grad_y, x, stats)
    torch.testing.assert_close(sums[:4], torch.full((4,), 180.0).double())
    full = implementation.backward_input(grad_y.contiguous(), x, sums, None, stats)
    assert torch.equal(implementation.backward_input(grad_y, x, sums, None, stats), full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_normalize_moves_the_running_statistics(implementation, rng, dtype):
    x = torch.randn(8, 3, generator=rng) + 2
    running = Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(4), 0.5)
    implementation.normalize(x, implementation.local_moments(x, STATUS), None, None, running, EPS, 8.0)
    tolerance = {"rtol": 1e-3 if dtype == torch.float16 else 1e-6, "atol": 0}
    torch.testing.assert_close(running.mean, (x.mean(0) / 2).to(dtype), **tolerance)
    torch.testing.assert_close(running.var, ((1 + x.var(0)) / 2).to(dtype), **tolerance)
    assert running.num_batches_tracked.item() == 5


def test_inputs_are_left_alone(implementation, rng):
    x, grad_y = torch.randn(2, 4, 3, 5, generator=rng)
    x64, g64 = x.double(), grad_y.double()
    for a, b in [(x, grad_y), (x64, g64)]:
        copies = a.clone(), b.clone()
        wire = implementation.local_moments(a, STATUS)
        stats = implementation.normalize(a, wire, None, None, None, EPS, 20.0)[1]
        implementation.backward_input(b, a, implementation.backward_sums(b, a, stats), None, stats)
        assert torch.equal(a, copies[0])
        assert torch.equal(b, copies[1])


def test_choose_gives_kernels_for_the_cpu():
    assert isinstance(kernels.choose(torch.empty(0)), kernels.AbstractKernels)
