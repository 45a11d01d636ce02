# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: that the kernels compile and launch, wait for nothing, and are captured in a graph."""

import copy

import pytest
import torch

import syncbn
from syncbn import kernels, moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda import geometry
from tests.gpu.graphs import capture
from tests.gpu.steps import MESSAGE, make, same, step
from tests.kernels.contract import STATUS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
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
    with capture(graph):
        y, grad_x, *_ = step(layer, x, grad_y)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        assert same((y, grad_x), step(layer, x, grad_y)[:2])


def test_a_call_that_differs_is_nan_and_a_deferred_error(implementation):
    x, grad_y = torch.randn(2, 4, 8, 16, 16, device="cuda")
    other = MESSAGE._replace(numbers=(1, 4, 200_000, 77), direction=1)
    for wrong in ("forward", "backward"):
        wire = implementation.local_moments(x, None, MESSAGE.numbers, STATUS)
        y, stats = implementation.normalize(x, wire, Parameters(), other if wrong == "forward" else MESSAGE)
        if wrong == "backward":
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


class Thin(torch.nn.Module):
    """Takes every other pixel: a view that the next layer copies."""

    def forward(self, x):
        return x[..., ::2, ::2]


def test_a_step_of_several_layers_is_captured_and_replayed(implementation):
    """Also the running statistics move in a replay, as in eager mode."""
    norms = [syncbn.SyncBatchNorm(8) for _ in range(3)]
    model = torch.nn.Sequential(norms[0], torch.nn.ReLU(), norms[1], Thin(), torch.nn.Tanh(), norms[2]).cuda()
    x = torch.randn(16, 8, 56, 56, device="cuda", requires_grad=True)
    grad_y = torch.randn(16, 8, 28, 28, device="cuda")
    tensors = (x, *model.parameters())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(model(x), tensors, grad_y)
    torch.cuda.current_stream().wait_stream(side)
    eager = copy.deepcopy(model)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        y = model(x)
        grads = torch.autograd.grad(y, tensors, grad_y)
        y = y.detach()  # see step
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, device="cuda"))
        graph.replay()
        expected = eager(x)
        assert same((y, *grads), (expected, *torch.autograd.grad(expected, (x, *eager.parameters()), grad_y)))
        assert same(model.buffers(), eager.buffers())


# One block a group and several, rows and planes; one that fills the GPU, beside some that take a few blocks.
BESIDE = [
    ((32, 64, 56, 56), torch.float32, torch.contiguous_format),
    ((2, 512, 7, 7), torch.float32, torch.contiguous_format),
    ((16, 96, 28, 28), torch.bfloat16, torch.channels_last),
    ((64, 3, 33, 31), torch.float16, torch.contiguous_format),
    ((2, 8, 4, 4), torch.float32, torch.channels_last),
]


def test_two_streams_at_once_give_the_bits_of_one(implementation):
    torch.manual_seed(0)
    rounds, turns, streams, cases = 2, 6, [torch.cuda.Stream() for _ in range(2)], []
    for shape, dtype, layout in BESIDE:
        layer, x, grad_y = make(shape, dtype)
        x = x.detach().to(memory_format=layout).requires_grad_()
        grad_y = grad_y.to(memory_format=layout)
        layers = [copy.deepcopy(layer) for _ in streams]  # each moves its own running statistics
        for each in (layer, *layers):
            alone = step(each, x, grad_y)
        for _ in range(rounds * turns):
            assert same(step(layer, x, grad_y), alone)
        cases.append((x, grad_y, layer, layers, alone))
    torch.cuda.synchronize()
    for _ in range(rounds):  # the second takes memory that the first has freed, and so asks the driver for none
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(30_000_000)  # until the host has filled both queues
        found = []
        for turn in range(turns):
            for first in range(len(cases)):
                for number, stream in enumerate(streams):
                    case = (first + number * (1 + turn)) % len(cases)  # with another one beside it in every turn
                    x, grad_y, _, layers, _ = cases[case]
                    with torch.cuda.stream(stream):
                        found.append((case, step(layers[number], x, grad_y)))
        torch.cuda.synchronize()
        assert all(same(results, cases[case][-1]) for case, results in found)
    for _, _, layer, layers, _ in cases:
        assert all(same(each.buffers(), layer.buffers()) for each in layers)


@pytest.mark.parametrize("forward_aside", [False, True], ids=["forward on the main stream", "forward aside"])
def test_a_backward_from_a_side_stream_keeps_its_memory(implementation, forward_aside):
    """Whatever else takes and frees memory of the same sizes, on both streams, and fills it with NaN."""
    shape = (16, 64, 56, 56)
    layer, x, grad_y = make(shape)
    expected = step(layer, x, grad_y)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    C = shape[1]
    plan = geometry.plan(x.shape, x.stride(), x.element_size())
    sizes = [moments.wire_length(C), moments.sums_length(C), 2 * C + 1, 2 * plan.blocks * C]

    def churn():
        for size in sizes:
            torch.full((size,), torch.nan, dtype=torch.float64, device="cuda")
        torch.full((C,), torch.nan, device="cuda")
        torch.full(shape, torch.nan, device="cuda")

    for _ in range(15):
        with torch.cuda.stream(side if forward_aside else main):
            torch.cuda._sleep(200_000)  # so that memory is freed on the host well before the GPU has used it
            y = layer(x)
            values = y.detach()
        churn()
        if not forward_aside:
            side.wait_stream(main)
        with torch.cuda.stream(side):
            made_here = grad_y.clone()
            grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), made_here)
            del y, made_here
            churn()
        churn()
        main.wait_stream(side)
        assert same((values, *grads), expected)
