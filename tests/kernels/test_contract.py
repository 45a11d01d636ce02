# SPDX-License-Identifier: BSD-3-Clause
"""The kernel contract: one test body for every implementation, against reference.py in float64.

SYNCBN_TEST_DEVICE=cuda:0 python -m pytest tests/kernels/test_contract.py     the kernels of a GPU, on that GPU
"""

import itertools
import math

import pytest
import torch

from syncbn import kernels, moments, reference
from syncbn.kernels import dispatch
from syncbn.kernels.base import Parameters, split_stats
from syncbn.kernels.cuda.launch import AbstractLauncher
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Message, Running, Status
from tests.conftest import DEVICE
from tests.cuda_on_cpu import EmulatedLauncher
from tests.multiprocess.batches import LAYOUTS
from tests.tolerances import FLOOR, error

EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[torch.float32])
NUMBERS = (1, 7, moments.LIMIT - 1, 3)
SHAPES = [(5, 3), (4, 1, 7), (2, 5, 3, 4), (3, 17, 1, 1), (2, 64, 9, 5), (2, 3, 2, 3, 2), (1, 2, 33, 31)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


ON_CPU = ["torch", "host", "cuda on cpu", "cuda on cpu, slow float64"]
ON_DEVICE = ["torch", "cupy", "cupy, slow float64"]


class ArithmeticLauncher(AbstractLauncher):
    """The launcher of a GPU, and a chosen arithmetic for the sums: any GPU runs both.

    Args:
        inner: launches.
        slow: whether to say that float64 is slow here.
    """

    def __init__(self, inner, *, slow):
        self.inner, self.slow = inner, slow

    def launch(self, kernel, grid, block, layout, values, x):
        self.inner.launch(kernel, grid, block, layout, values, x)

    def slow_float64(self, x):
        return self.slow

    def scratch(self, x, partials, groups):
        return self.inner.scratch(x, partials, groups)

    def deferred_errors(self, x):
        return self.inner.deferred_errors(x)


def kernels_of_gpu(*, slow, host_synchronous):
    """The kernels of a GPU in one arithmetic. Skips where CUDA tensors get other kernels."""
    if kernels.explain_device().name != "cupy":
        pytest.skip(kernels.explain_device().reason)
    return CupyKernels(ArithmeticLauncher(dispatch.launcher(), slow=slow), host_synchronous=host_synchronous)


@pytest.fixture(params=ON_CPU if DEVICE.type == "cpu" else ON_DEVICE)
def implementation(request):
    if request.param == "torch":
        return TorchKernels()
    if request.param.startswith("cupy"):
        return kernels_of_gpu(slow="slow" in request.param, host_synchronous=True)
    if request.param.startswith("cuda on cpu"):
        return CupyKernels(EmulatedLauncher(slow="slow" in request.param), host_synchronous=True)
    unbuilt = {"reason": "built without a compiler", "exc_type": ImportError}
    return pytest.importorskip("syncbn.kernels.host.ops", **unbuilt).HostKernels()


def exact(x, grad_y, weight, bias):
    """y and grad_x by the definition, in float64."""
    x = x.double().requires_grad_()
    stats = torch.zeros(x.size(1), dtype=torch.float64, device=x.device)
    y = reference.batch_norm(x, weight.double(), bias.double(), stats, stats, eps=EPS).y
    y.backward(grad_y.double())
    return y.detach(), x.grad


def message(direction=0, numbers=NUMBERS):
    return Message(numbers, 1, "a layer", direction, NUMBERS[1])


def moments_of(implementation, x, status=STATUS):
    return implementation.local_moments(x, None, NUMBERS, status)


def normalized(implementation, x, wire=None, **parameters):
    """y and the statistics for backward; of this tensor alone where no wire is given."""
    wire = moments_of(implementation, x) if wire is None else wire
    return implementation.normalize(x, wire, Parameters(eps=EPS, **parameters), message())


def sums_of(implementation, grad_y, x, stats):
    return implementation.backward_sums(grad_y, x, stats, NUMBERS)[0]


def grad_of(implementation, grad_y, x, stats, *, sums=None, weight=None):
    """grad_x; of this tensor alone where no sums are given."""
    sums = sums_of(implementation, grad_y, x, stats) if sums is None else sums
    return implementation.backward_input(grad_y, x, None, sums, weight, stats, message(1))


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


def moved(x, offset):
    """Copies a tensor, strides included, to a place that begins ``offset`` bytes behind a multiple of 16."""
    first = offset // x.element_size()
    memory = torch.empty(x.numel() + first, dtype=x.dtype, device=x.device)
    copy = torch.as_strided(memory, x.shape, x.stride(), first).copy_(x)
    assert copy.data_ptr() % 16 == offset
    return copy


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


ABSTAINING = message(numbers=moments.ABSTAINS)


def test_kernels_that_do_not_defer_read_the_counters_and_the_call(implementation):
    if implementation.deferred:
        pytest.skip("the device reads them")
    wire = 3 * moments_of(implementation, torch.ones(4, 2))
    for own in (message(), ABSTAINING):
        counters = implementation.read_counters(wire, own)
        assert counters == (True, 12.0, Status._make(3 * s for s in STATUS))
        assert type(counters.same_call) is bool
        for slot in range(moments.CALL):
            other = wire.clone()
            other[slot] += 1
            assert not implementation.read_counters(other, own).same_call


def test_kernels_that_do_not_defer_compare_the_backward_call(implementation):
    if implementation.deferred:
        pytest.skip("the device compares it")
    x = torch.randn(4, 2)
    wire = 3 * sums_of(implementation, x, x, normalized(implementation, x)[1])
    for own in (message(1), ABSTAINING):
        assert implementation.check_sums(wire, own) is True
        for slot in range(moments.CALL):
            for wrong in (wire[slot].item() - 1, float("nan"), float("inf")):
                other = wire.clone()
                other[slot] = wrong
                assert implementation.check_sums(other, own) is False


def test_what_ranks_find_of_their_calls_is_what_the_definition_says(implementation, rng):
    """With every mixture of few ranks, also at the largest numbers, and of ranks that abstain."""
    if implementation.deferred:
        pytest.skip("the device compares calls")
    top = moments.LIMIT - 1
    calls = [(1, 0, 0, 0), (1, 1, 0, 0), (1, 2, 0, 0), (1, top, top, top), (1, top, top, top - 1), moments.ABSTAINS]
    for some in itertools.product(calls, repeat=3):
        for times in (1, 2**14):
            slots = torch.tensor([moments.head(numbers) for numbers in some], dtype=torch.float64).sum(0) * times
            wire = torch.cat((slots, torch.zeros(4, dtype=torch.float64)))
            same = len(set(some) - {moments.ABSTAINS}) <= 1
            for own in some:
                assert implementation.check_sums(wire, message(1, own)) is same
                assert moments.same_call(slots.tolist(), own) is same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_wires_begin_with_the_call(implementation, rng, dtype):
    x = torch.randn(5, 3, 4, generator=rng).to(dtype)
    stats = normalized(implementation, x)[1]
    for wire in (moments_of(implementation, x), sums_of(implementation, x, x, stats)):
        assert wire.dtype == torch.float64
        assert wire[: moments.CALL].tolist() == [*NUMBERS, *(v * v for v in NUMBERS[1:])]
    assert not implementation.local_moments(x, None, moments.ABSTAINS, STATUS)[: moments.CALL].any()
    assert sums_of(implementation, x, x, stats).shape == (moments.sums_length(3),)
    assert moments_of(implementation, x).shape == (moments.wire_length(3),)


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


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_an_empty_share_sends_zeros_and_gets_empties(implementation, shape):
    x = torch.empty(shape)
    wire = moments_of(implementation, x)
    assert not moments.count(wire)
    assert not moments.sums(wire).any()
    whole = moments_of(implementation, torch.randn(4, 3)) + wire
    y, stats = normalized(implementation, x, whole)
    sums = sums_of(implementation, x, x, stats)
    assert not sums[moments.CALL :].any()
    grad_x = grad_of(implementation, x, x, stats, sums=2 * sums)
    assert y.shape == grad_x.shape == shape


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_normalize_moves_the_running_statistics(implementation, rng, dtype):
    x = torch.randn(8, 3, generator=rng) + 2
    running = Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(4), 0.5)
    normalized(implementation, x, running=running)
    tolerance = {"rtol": 1e-3 if dtype == torch.float16 else 1e-6, "atol": 0}
    torch.testing.assert_close(running.mean, (x.mean(0) / 2).to(dtype), **tolerance)
    torch.testing.assert_close(running.var, ((1 + x.var(0)) / 2).to(dtype), **tolerance)
    assert running.num_batches_tracked.item() == 5


def test_a_global_batch_of_nothing_is_counted_and_moves_nothing(implementation):
    """As torch counts it."""
    x = torch.empty(0, 3)
    for momentum in (0.5, None):
        running = Running(torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(4), momentum)
        y, stats = normalized(implementation, x, running=running)
        assert y.shape == x.shape
        assert stats.isfinite().all()
        assert running.num_batches_tracked.item() == 5
        assert running.mean.tolist() == [2.0] * 3
        assert running.var.tolist() == [3.0] * 3


def test_momentum_none_averages_and_without_a_counter_leaves_the_buffers_alone(implementation):
    counted = Running(torch.zeros(1), torch.ones(1), torch.tensor(0), None)
    uncounted = Running(torch.zeros(1), torch.ones(1), None, None)
    for batch in ([0.0, 2.0], [1.0, 3.0], [5.0, 7.0]):
        for running in (counted, uncounted):
            normalized(implementation, torch.tensor(batch).view(2, 1), running=running)
    assert (counted.mean.item(), counted.var.item(), counted.num_batches_tracked.item()) == (3.0, 2.0, 3)
    assert (uncounted.mean.item(), uncounted.var.item()) == (0.0, 1.0)  # as torch does


def test_autograd_learns_that_running_statistics_moved(implementation):
    """A graph that has saved one then refuses backward, where it would use values that have moved."""
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
    before = [buffer._version for buffer in running[:3]]
    normalized(implementation, torch.randn(4, 3), running=running)
    assert all(buffer._version > version for buffer, version in zip(running[:3], before, strict=True))


def test_buffers_of_inference_mode_move_too(implementation):
    """They have no version."""
    with torch.inference_mode():
        running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
        normalized(implementation, torch.randn(4, 3), running=running)
    assert running.num_batches_tracked.item() == 1
    assert running.mean.all()


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
