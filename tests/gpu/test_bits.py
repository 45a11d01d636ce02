# SPDX-License-Identifier: BSD-3-Clause
"""The numbers that the kernels give on a GPU: those of the definition, and bits that do not depend on the way."""

import copy
import shutil

import pytest
import torch

import syncbn
from syncbn import kernels, moments
from syncbn.kernels import dispatch
from syncbn.kernels.base import Parameters, split_stats
from syncbn.kernels.cuda import geometry
from syncbn.transports.single import SingleTransport
from tests.gpu.steps import MESSAGE, make, random, same, step
from tests.kernels.contract import EPS, SHAPES, STATUS, bound, exact, kernels_of_gpu, moved
from tests.tolerances import error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


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


# What docs/concepts/numerics.md and docs/concepts/gpu.md say of bits is of these.
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
