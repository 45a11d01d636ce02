# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show: that the kernels compile and launch, wait for nothing, and are captured in a graph."""

import copy
import shutil

import pytest
import torch

import syncbn
from syncbn import kernels, moments
from syncbn.kernels import dispatch
from syncbn.kernels.base import Parameters, split_stats
from syncbn.kernels.cuda import geometry
from syncbn.moments import Message
from syncbn.transports.single import SingleTransport
from tests.gpu.graphs import capture
from tests.kernels.contract import EPS, SHAPES, STATUS, bound, exact, kernels_of_gpu, moved
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
def test_steps_equal_the_reference(implementation, shape, dtype, layout):
    if layout == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for 4 dims")
    rng = torch.Generator("cuda").manual_seed(0)
    x, grad_y = (random(shape, rng, dtype).to(memory_format=layout) for _ in range(2))
    weight, bias = (torch.rand(shape[1], generator=rng, device="cuda") for _ in range(2))
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


def random(shape, rng, dtype=torch.float32):
    return torch.randn(shape, generator=rng, device="cuda").to(dtype)


def make(shape=(4, 8, 16, 16), dtype=torch.float32):
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    layer = syncbn.SyncBatchNorm(shape[1]).cuda()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer, x, torch.randn(shape, device="cuda", dtype=dtype)


def step(layer, x, grad_y):
    """y and the gradients of input, weight and bias.

    y comes without its autograd graph, which would keep the AccumulateGrad nodes of x and of the parameters. A node
    belongs to the stream of its making; on another stream, as in a capture, torch waits for that one and warns.
    """
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad_y)


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_more_than_two_to_the_31_values(implementation, layout):
    """The channels that are compared hold the first and the last value, and in one layout the value 2^31."""
    shape, channels = (2, 1100, 1024, 1024), (0, 1, 550, 947, 948, 1098, 1099)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    rng = torch.Generator("cuda").manual_seed(0)

    def some(tensor):
        return torch.stack([tensor[:, c] for c in channels], 1)

    try:
        x, grad_y = (
            torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=layout).normal_(generator=rng)
            for _ in range(2)
        )
        assert x.numel() > 2**31
        x += 0.5
        weight, bias = (torch.rand(shape[1], generator=rng, device="cuda") for _ in range(2))
        wire = implementation.local_moments(x, None, MESSAGE.numbers, STATUS)
        y, stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
        y_of_some = some(y)
        del y
        sums = implementation.backward_sums(grad_y, x, stats, MESSAGE.numbers)[0]
        grad_x = implementation.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
        grad_of_some, x, grad_y = some(grad_x), some(x), some(grad_y)
        del grad_x
    finally:
        torch.cuda.empty_cache()
    index = torch.tensor(channels, device="cuda")
    mean, invstd, count = split_stats(stats)
    x64 = x.double().transpose(0, 1).reshape(len(channels), -1)
    assert count.item() == x64.size(1) == 2**21
    torch.testing.assert_close(mean[index], x64.mean(1))
    torch.testing.assert_close(invstd[index], (x64.var(1, correction=0) + EPS).rsqrt())
    exact_y, exact_grad_x = exact(x, grad_y, weight[index], bias[index])
    assert error(y_of_some, exact_y) <= bound(torch.float16, exact_y.abs().max().item())
    assert error(grad_of_some, exact_grad_x) <= bound(torch.float16, exact_grad_x.abs().max().item())


def test_a_plane_that_32_bits_do_not_count_goes_to_torchs_operators(implementation):
    value = torch.zeros(1, dtype=torch.float16, device="cuda")  # expanded: it takes no memory
    for S, name in ((geometry.MOST, "cupy"), (geometry.MOST + 1, "torch"), (2**31, "torch")):
        assert kernels.on_device(value.expand(1, 1, S), SingleTransport()).name == name


@pytest.mark.parametrize("offset", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4, 8, 16, 16), (5, 6, 7, 7)], ids=str)
def test_a_view_that_begins_between_two_packs_gives_the_same_bits(implementation, shape, dtype, offset):
    if offset % dtype.itemsize:
        pytest.skip("a tensor begins at a multiple of its element size")
    layer, x, grad_y = make(shape, dtype)
    expected = step(layer, x, grad_y)
    view = moved(x.detach(), offset).requires_grad_()
    assert same(step(layer, view, moved(grad_y, offset)), expected)


# What docs/numerics.md and docs/gpu.md say of bits is of these.
ROUNDED = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_both_arithmetics_of_the_sums_give_the_same_bits(monkeypatch, dtype, layout):
    """Through the layer, with a mean that is not small: what is squared and added up then has more digits."""
    torch.manual_seed(0)
    layer, x, grad_y = make((16, 24, 28, 28), dtype)
    x = (x.detach() * 2 + 3).to(memory_format=layout).requires_grad_()
    results = []
    for slow in (False, True):
        monkeypatch.setattr(
            dispatch, "cuda_kernels", lambda waits, slow=slow: kernels_of_gpu(slow=slow, host_synchronous=waits)
        )
        each = copy.deepcopy(layer)
        y, grad_x, *_ = step(each, x, grad_y)
        results.append((y, grad_x, each.running_mean, each.running_var))
    assert same(*results)


@pytest.mark.parametrize("scale", [1.0, 2.0**-127], ids=["ordinary", "denormal"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_elementwise_arithmetic_is_that_of_the_cpu(implementation, dtype, layout, scale):
    """From equal sums every bit is equal, also of results that are denormal numbers."""
    rng = torch.Generator("cpu").manual_seed(0)
    shape = (6, 20, 9, 11)
    x, grad_y = (torch.randn(shape, generator=rng, device="cpu").to(dtype).to(memory_format=layout) for _ in range(2))
    weight, bias = ((torch.rand(20, generator=rng, device="cpu") + 0.5) * scale for _ in range(2))
    cpu = kernels.choose(x)
    wire = cpu.local_moments(x, None, MESSAGE.numbers, STATUS)
    y, stats = cpu.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    sums = cpu.backward_sums(grad_y, x, stats, MESSAGE.numbers)[0]
    grad_x = cpu.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    x, grad_y, weight, bias, wire, sums = (t.cuda() for t in (x, grad_y, weight, bias, wire, sums))
    gpu_y, gpu_stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    gpu_grad_x = implementation.backward_input(grad_y, x, None, sums, weight, gpu_stats, MESSAGE)
    assert same((gpu_y.cpu(), gpu_grad_x.cpu()), (y, grad_x))
    assert y.any() or dtype == torch.float16, "something is left to compare"


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_layer_has_the_bits_that_it_has_on_the_cpu(implementation, dtype):
    """The sums differ in their last digits, which the rounding to float32 hides."""
    torch.manual_seed(0)
    layer, x, grad_y = make((8, 32, 14, 14), dtype)
    on_cpu = copy.deepcopy(layer).cpu()
    y, grad_x, *_ = step(layer, x, grad_y)
    cpu_y, cpu_grad_x, *_ = step(on_cpu, x.detach().cpu().requires_grad_(), grad_y.cpu())
    assert same((y.cpu(), grad_x.cpu()), (cpu_y, cpu_grad_x))
    assert same((each.cpu() for each in layer.buffers()), on_cpu.buffers())


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_masks_and_second_derivatives_are_those_of_the_cpu(masked):
    rng = torch.Generator("cpu").manual_seed(0)
    inputs = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64, generator=rng, device="cpu")
    mask = torch.rand(4, 5, 6, generator=rng, device="cpu") < 0.7

    def results(device):
        layer = syncbn.SyncBatchNorm(3, device=device, dtype=torch.float64)
        x, grad_y = (t.to(device) for t in inputs)
        x.requires_grad_()
        y = layer(x, mask.to(device) if masked else None)
        (first,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
        second = torch.autograd.grad(first.pow(3).sum(), (x, layer.weight))
        return [t.detach().cpu() for t in (y, first, *second, *layer.buffers())]

    for ours, right in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")  # torch's compiler uses parts of torch that torch has deprecated
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_computes_what_the_eager_one_does(backend):
    if backend == "inductor" and not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("triton needs a C compiler")
    torch._dynamo.reset()
    torch.manual_seed(0)
    norms = [syncbn.SyncBatchNorm(8) for _ in range(2)]
    model = torch.nn.Sequential(norms[0], torch.nn.ReLU(), norms[1]).cuda()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((4, 8, 6, 6), (4, 8, 6, 6)):  # the second step sends no settings
        x, grad_y = torch.randn(2, *shape, device="cuda")
        results = []
        for each, module in ((compiled, model), (eager, eager)):
            inputs = x.clone().requires_grad_()
            y = each(inputs)
            results.append((y, *torch.autograd.grad(y, (inputs, *module.parameters()), grad_y), *module.buffers()))
        for ours, right in zip(*results, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
