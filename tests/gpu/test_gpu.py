# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: that the kernels compile and launch, wait for nothing, and are captured in a graph."""

import pytest
import torch

import syncbn
from syncbn import kernels, moments
from syncbn.kernels.base import Parameters
from syncbn.moments import Message
from syncbn.transports.single import SingleTransport
from tests.kernels.test_contract import EPS, SHAPES, STATUS, bound, exact
from tests.tolerances import error

MESSAGE = Message((1, 3, 200_000, 77), 1, "'layer'", 0, 3)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def implementation():
    found = kernels.on_device(torch.empty(1, device="cuda"), SingleTransport())
    if found.name != "cupy":
        pytest.skip(kernels.explain_device().reason)
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (32, 64, 112, 112), (2, 256, 56, 56)], ids=str)
def test_steps_equal_the_reference(implementation, rng, shape, dtype, layout):
    if layout == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for 4 dims")
    x, grad_y = (torch.randn(shape, generator=rng).to(dtype).to("cuda", memory_format=layout) for _ in range(2))
    weight, bias = (torch.rand(shape[1], generator=rng).cuda() for _ in range(2))
    wire = implementation.local_moments(x, None, MESSAGE.numbers, STATUS)
    y, stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    sums = implementation.backward_sums(grad_y, x, stats, MESSAGE.numbers)[0]
    grad_x = implementation.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    assert error(y, exact_y) <= bound(dtype, exact_y.abs().max().item())
    assert error(grad_x, exact_grad_x) <= bound(dtype, exact_grad_x.abs().max().item())
    assert torch.equal(wire, implementation.local_moments(x, None, MESSAGE.numbers, STATUS)), (
        "every run gives the same bits"
    )


def make(shape=(4, 8, 16, 16)):
    x = torch.randn(shape, device="cuda", requires_grad=True)
    return syncbn.SyncBatchNorm(8).cuda(), x, torch.randn(shape, device="cuda")


def test_a_step_waits_for_nothing(implementation):
    layer, x, grad_y = make()
    layer(x).backward(grad_y)  # compiles, and compares settings
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(grad_y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_two_launches_forward_and_two_backward(implementation):
    layer, x, grad_y = make()
    torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad_y)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad_y)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 4, names


@pytest.mark.parametrize("shape", [(4, 8, 16, 16), (0, 8, 16, 16), (32, 8, 56, 56)], ids=str)
def test_a_step_is_captured_and_replayed(implementation, shape):
    layer, x, grad_y = make(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(layer(x), x, grad_y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        eager = layer(x)
        assert torch.equal(y, eager)
        assert torch.equal(grad_x, torch.autograd.grad(eager, x, grad_y)[0])


def test_a_call_that_differs_is_nan_and_a_deferred_error(implementation):
    x, grad_y = torch.randn(2, 4, 8, 16, 16, device="cuda")
    other = MESSAGE._replace(numbers=(1, 4, 200_000, 77), direction=1)
    for step in ("forward", "backward"):
        wire = implementation.local_moments(x, None, MESSAGE.numbers, STATUS)
        y, stats = implementation.normalize(x, wire, Parameters(), other if step == "forward" else MESSAGE)
        if step == "backward":
            sums = implementation.backward_sums(grad_y, x, stats, MESSAGE.numbers)[0]
            y = implementation.backward_input(grad_y, x, None, sums, None, stats, other)
        torch.cuda.synchronize()
        assert y.isnan().all()
        with pytest.raises(ValueError, match=r"'layer' \(call 3\) here and another one"):
            kernels.look(y.device)


def test_a_refused_call_is_nan_and_a_deferred_error(implementation):
    layer = syncbn.SyncBatchNorm(8).cuda()
    y = layer(torch.randn(1, 8, device="cuda"))
    torch.cuda.synchronize()
    assert y.isnan().all()
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        kernels.look(y.device)
