# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU kernels promise beyond the contract of test_kernels.py, on a CPU: see cuda_on_cpu/cuda.hpp."""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import syncbn
from syncbn import kernels, moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda import geometry, ops
from syncbn.kernels.cuda.errors import DeferredErrors
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import ABSTAINS, LIMIT, Message, Running, Status
from tests import processes
from tests.cuda_on_cpu import CUDA, EmulatedLauncher, build

TORCH = TorchKernels()
EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
MESSAGE = Message((1, 3, 200_000, 77), 1, "'layer'", 0, 3)
NUMBERS = MESSAGE.numbers
SHAPES = [(3, 5, 70, 65), (40, 7, 14, 14), (4001, 9), (2, 300, 3, 3), (1, 1, 9000), (7, 130, 7, 7)]


def batch(shape, dtype=torch.float32, *, channels_last=False, offset=0):
    """Input and gradient, ``offset`` elements behind an address that is as aligned as memory gets."""
    generator = torch.Generator().manual_seed(0)
    pair = []
    for mean in (1.0, 0.0):
        values = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype)
        values = values.movedim(1, -1) if channels_last else values
        place = torch.empty(values.numel() + offset, dtype=dtype)[offset:].view(values.shape).copy_(values)
        pair.append(place.movedim(-1, 1) if channels_last else place)
    return pair


def step(implementation, x, grad_y, weight=None, bias=None):
    """Every number that the four steps make."""
    wire = implementation.local_moments(x, None, NUMBERS, STATUS)
    y, stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    sums = implementation.backward_sums(grad_y, x, stats, NUMBERS)[0]
    grad_x = implementation.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    return {"wire": wire, "y": y, "stats": stats, "sums": sums, "grad_x": grad_x}


def forward(implementation, x, running=None, message=MESSAGE):
    """A forward over one rank, or over ranks of which this one alone has samples."""
    wire = implementation.local_moments(x, None, message.numbers, STATUS)
    return implementation.normalize(x, wire, Parameters(eps=EPS, running=running), message)


def reduced(wire, ranks, last=NUMBERS):
    """The sums over ``ranks`` ranks in one call, but for the last, and of which this one alone has samples."""
    wire = wire.clone()
    wire[: moments.CALL] = (ranks - 1) * wire[: moments.CALL] + wire.new_tensor(moments.head(last))
    return wire


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", ["local_moments", "normalize", "backward_sums", "backward_input"])
def test_arguments_are_packed_as_the_structs_are(name):
    packed = getattr(ops, name.upper()).size
    assert EmulatedLauncher().library.argument_size(name.encode()) == packed <= 512


def test_the_conversions_of_the_machine_are_those_of_torch():
    library = EmulatedLauncher().library
    bits = torch.arange(65536).to(torch.uint16)
    wide = torch.empty(2, 65536)
    library.widen_all(*(ctypes.c_void_p(row.data_ptr()) for row in wide))
    steps = torch.tensor([0.25, 0.5, 0.75, 1.0])  # between neighbours, on the tie, beyond
    for row, dtype in zip(wide, (torch.float16, torch.bfloat16), strict=True):
        exact = bits.view(dtype).float()
        assert torch.equal(row.nan_to_num(nan=7.0), exact.nan_to_num(nan=7.0))
        finite = exact[exact.isfinite()].sort().values
        between = finite[:-1, None] + finite.diff()[:, None] * steps
        x = torch.cat((between.flatten(), torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, 65519.9, 65520.0, 1e-9])))
        narrow = torch.empty(2, x.numel(), dtype=torch.uint16)
        library.narrow_all(x.numel(), *(ctypes.c_void_p(t.data_ptr()) for t in (x, *narrow)))
        for got, kind in zip(narrow, (torch.float16, torch.bfloat16), strict=True):
            assert torch.equal(got, x.to(kind).view(torch.uint16)), (dtype, kind)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_inputs_equal_the_readable_kernels(shape, dtype, channels_last):
    x, grad_y = batch(shape, dtype, channels_last=channels_last)
    weight, bias = torch.linspace(0.5, 2, shape[1]), torch.linspace(-1, 1, shape[1])
    ours, theirs = (step(k, x, grad_y, weight, bias) for k in (CupyKernels(EmulatedLauncher()), TORCH))
    for name in ("wire", "stats", "sums"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-8)
    tolerance = 1e-12 if dtype == torch.float64 else 0  # the same single operations in the same order
    torch.testing.assert_close(ours["y"], theirs["y"], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours["grad_x"], theirs["grad_x"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(shape, channels_last):
    x, grad_y = batch(shape, channels_last=channels_last)
    launcher = EmulatedLauncher()
    results = [step(CupyKernels(launcher), x, grad_y) for _ in range(4)]
    assert max(grid for _, grid, _, _ in launcher.launches) > 8
    assert all(not differing(results[0], other) for other in results)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 8, 9), (5, 3, 7, 5), (40, 7, 12, 12)], ids=str)
def test_bits_do_not_depend_on_the_alignment(shape, dtype, channels_last):
    widths, results, launcher = set(), [], EmulatedLauncher()
    for offset in (0, 8 // dtype.itemsize, 1):
        x, grad_y = batch(shape, dtype, channels_last=channels_last, offset=offset)
        results.append(step(CupyKernels(launcher), x, grad_y))
        widths.add(launcher.launches[-1][3][6])
    assert 0 in widths or dtype == torch.float64
    assert all(not differing(results[0], other) for other in results)


@pytest.mark.parametrize("sizes", [(1, 5, 0), (2, 2, 2), (6, 0, 0)], ids=str)
def test_bits_do_not_depend_on_the_split_over_ranks(sizes):
    x, grad_y = batch((6, 20, 31, 17))
    k = CupyKernels(EmulatedLauncher())
    whole = step(k, x, grad_y)
    xs, gs = x.split(sizes), grad_y.split(sizes)
    message = MESSAGE._replace(ranks=3)
    wire = sum(k.local_moments(part, None, NUMBERS, STATUS) for part in xs)
    ys, stats = zip(*[k.normalize(part, wire, Parameters(eps=EPS), message) for part in xs], strict=True)
    parts = list(zip(gs, xs, stats, strict=True))
    sums = sum(k.backward_sums(*part, NUMBERS)[0] for part in parts)
    grads = [k.backward_input(g, part, None, sums, None, s, message) for g, part, s in parts]
    assert torch.equal(torch.cat(ys), whole["y"])
    assert torch.equal(torch.cat(grads), whole["grad_x"])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 70),
    st.lists(st.integers(1, 13), max_size=2),
    st.sampled_from(moments.DTYPES),
    st.booleans(),
    st.sampled_from([1, 16, 64, 256]),
    st.booleans(),
)
def test_any_shape_and_block_equal_the_readable_kernels(N, C, spatial, dtype, channels_last, threads, slow):
    x, grad_y = batch((N, C, *spatial), dtype, channels_last=channels_last and len(spatial) > 0)
    assume(x.numel() != C)  # one value a channel is refused
    k = CupyKernels(EmulatedLauncher(slow=slow), threads=threads)
    ours, theirs = step(k, x, grad_y), step(TORCH, x, grad_y)
    for name, expected in theirs.items():
        wide = expected.dtype == torch.float64
        torch.testing.assert_close(ours[name], expected, rtol=1e-9 if wide else 0, atol=1e-8 if wide else 0)
    assert ours["y"].stride() == ours["grad_x"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
def test_buffers_of_any_dtype_and_stride_move_alike(dtype, momentum):
    x = batch((6, 300, 2, 2))[0]
    ours, twin = (Running(*torch.ones(300, 2, dtype=dtype).unbind(1), torch.tensor(2), momentum) for _ in range(2))
    versions = [t._version for t in ours[:3]]
    for k, running in ((CupyKernels(EmulatedLauncher()), ours), (TORCH, twin)):
        forward(k, x, running)
    assert all(t._version > version for t, version in zip(ours[:3], versions, strict=True)), "autograd is told"
    assert ours.num_batches_tracked == twin.num_batches_tracked == 3
    torch.testing.assert_close(ours.mean, twin.mean)
    torch.testing.assert_close(ours.var, twin.var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_backward_sums_rounds_the_gradients_of_weight_and_bias(dtype):
    x, grad_y = batch((9, 5, 6))
    k = CupyKernels(EmulatedLauncher())
    wire, grad_weight, grad_bias = k.backward_sums(grad_y, x, forward(k, x)[1], NUMBERS, dtype, dtype)
    assert torch.equal(grad_bias, wire[moments.CALL :][:5].to(dtype))
    assert torch.equal(grad_weight, wire[moments.CALL :][5:].to(dtype))
    assert wire[: moments.CALL].tolist() == list(moments.head(NUMBERS))


def test_a_step_is_two_launches_forward_and_two_backward():
    launcher = EmulatedLauncher()
    x, grad_y = batch((2, 64, 56, 56))
    k = CupyKernels(launcher)
    stats = forward(k, x)[1]
    k.check_sums(sums := k.backward_sums(grad_y, x, stats, NUMBERS, x.dtype, x.dtype)[0], MESSAGE)
    k.backward_input(grad_y, x, None, sums, None, stats, MESSAGE)
    names = [kernel for kernel, *_ in launcher.launches]
    assert names == [
        "local_moments<float, Planes, Float64>",
        "normalize<float, Planes>",
        "backward_sums<float, Planes, Float64>",
        "backward_input<float, Planes>",
    ]


RESNET = [(2, 64, 112, 112), (2, 256, 56, 56), (2, 2048, 7, 7), (32, 64, 112, 112), (1, 64, 512, 512), (64, 2048)]


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "elementwise"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [*RESNET, (32, 256, 56, 56), (2, 256, 512, 512)], ids=str)
def test_blocks_fill_a_gpu_where_there_is_work_for_it(shape, itemsize, sums):
    most = {
        ("Planes", True): geometry.BLOCKS_OF_SUMS_OF_PLANES,
        ("Rows", True): geometry.BLOCKS_OF_SUMS_OF_ROWS,
        ("Planes", False): geometry.BLOCKS_OF_PLANES,
        ("Rows", False): geometry.BLOCKS_OF_ROWS,
    }
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = geometry.plan(x.shape, strides, itemsize, sums=sums)
        work = x.numel() * itemsize / (16 * 32 * geometry.STEPS)  # warps with a few packs a thread
        assert plan.grid >= min(132, work / 8), plan
        assert plan.block[0] * plan.block[1] <= geometry.THREADS
        assert plan.grid <= max(most[plan.layout, sums], plan.groups), plan


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [*RESNET, (32, 256, 56, 56), (2, 256, 512, 512)], ids=str)
def test_the_last_block_of_a_group_reads_a_few_partial_sums_a_thread(shape, itemsize):
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = geometry.plan(x.shape, strides, itemsize)
        lanes, channels = plan.block if plan.layout == "Planes" else (plan.block[1], plan.block[0] * 16 // itemsize)
        read = plan.blocks * channels / (plan.block[0] * plan.block[1])
        assert read <= max(geometry.DEPTH, plan.per_block / lanes / geometry.DEPTH_OF_STEPS), plan


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [(2, 256, 14, 14), (2, 512, 14, 14), (2, 512, 7, 7), (2, 2048, 7, 7), (64, 2048)])
def test_a_block_adds_up_few_rows_alone(shape, itemsize):
    x = torch.empty(shape, device="meta").movedim(1, -1).contiguous().movedim(-1, 1)
    plan = geometry.plan(x.shape, x.stride(), itemsize)
    assert (plan.layout, plan.blocks) == ("Rows", 1)
    assert plan.per_block <= geometry.STEPS_ALONE * plan.block[1]


def test_a_few_packs_a_thread_are_one_round_of_elementwise_blocks():
    """Each forms coefficients first, so a second round of few packs would take longer."""
    for shape in [(2, 256, 56, 56), (2, 64, 112, 112), (2, 128, 56, 56)]:
        x = torch.empty(shape, device="meta")
        for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
            assert geometry.plan(x.shape, strides, 4, sums=False).grid <= geometry.ROUND


def test_launches_are_prepared_once_for_each_kind_of_input_and_a_few_kinds_are_kept(monkeypatch):
    made, prepare = [], ops.prepare
    monkeypatch.setattr(ops, "REMEMBERED", 3)
    monkeypatch.setattr(ops, "prepare", lambda x, *more, **options: made.append(x) or prepare(x, *more, **options))
    k = CupyKernels(EmulatedLauncher(), host_synchronous=True)
    x = torch.randn(2, 3, 4, 5)
    kinds = [x, x.double(), x.to(memory_format=torch.channels_last)]
    for each in [*kinds, *kinds]:
        k.local_moments(each, None, NUMBERS, STATUS)
    assert len(made) == 3
    k.local_moments(x[:1], None, NUMBERS, STATUS)  # one kind too many: all others are forgotten
    k.local_moments(x, None, NUMBERS, STATUS)
    assert len(made) == 5


def test_one_channel_is_one_plane_while_32_bits_can_count_it():
    assert geometry.plan((4, 1, 1000), (1000, 1000, 1), 2).S == 4000
    assert geometry.plan((4, 1, 1 << 29), (1 << 29, 1 << 29, 1), 2).S == 1 << 29


REFUSED = {
    "received a wrong one on 2 of 3 ranks": Status(2.0, 3.0, 3.0, 0, 0, 1.0, 0),
    "received float16 on 1, float32 on 2 of 3 ranks": Status(0.0, 3.0, 3.0, 1.0, 0, 2.0, 0),
    "received True on 2 of 3 ranks": Status(0.0, 2.0, 2.0, 0, 0, 3.0, 0),
    "received 1 over 3 ranks": Status(0.0, 3.0, 3.0, 0, 0, 1.0, 0),
}
OF_3 = MESSAGE._replace(ranks=3)


def untouched(running):
    return (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 0)


@pytest.fixture
def running():
    return Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)


@pytest.mark.parametrize("text", REFUSED)
def test_a_refused_call_is_nan_touches_nothing_and_is_told_at_the_next_call(running, text):
    k = CupyKernels(EmulatedLauncher())
    x = batch((1 if "received 1 over" in text else 4, 5))[0]
    wire = reduced(k.local_moments(x, None, NUMBERS, REFUSED[text]), 3)
    assert k.read_counters(wire, OF_3) is None, "the host has read nothing, and says nothing"
    y, stats = k.normalize(x, wire, Parameters(eps=EPS, running=running), OF_3)
    assert y.isnan().all()
    assert stats[:10].isnan().all()
    assert untouched(running)
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        k.read_counters(wire, OF_3._replace(serial=4))
    assert f"This rank was in forward of 'layer' (call 3), with input float32 {tuple(x.shape)}." in str(caught.value)
    k.read_counters(wire, OF_3)  # once


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("slot", range(3))
def test_a_forward_of_another_call_is_nan_touches_nothing_and_names_the_call_of_this_rank(running, slot, momentum):
    k, x = CupyKernels(EmulatedLauncher()), batch((40, 5))[0]
    other = [v + (i == slot) for i, v in enumerate(NUMBERS)]
    wire = reduced(k.local_moments(x, None, NUMBERS, Status(0.0, 3.0, 3.0, 0, 0, 3.0, 0)), 3, other)
    y, stats = k.normalize(x, wire, Parameters(eps=EPS, running=running._replace(momentum=momentum)), OF_3)
    assert y.isnan().all()
    assert stats[:10].isnan().all()
    assert untouched(running)
    expected = (
        r"received forward of 'layer' \(call 3\) here and another one on some of 3 ranks.*input float32 \(40, 5\)"
    )
    with pytest.raises(ValueError, match=expected):
        k.check_sums(wire, OF_3)


@pytest.mark.parametrize("shape", [(40, 5), (0, 5), (3, 5, 9, 8), (4, 0)], ids=str)
def test_a_backward_of_another_call_is_nan_and_names_the_call_of_this_rank(shape):
    k = CupyKernels(EmulatedLauncher())
    x, grad_y = batch(shape)
    stats = forward(k, x)[1]
    message = OF_3._replace(direction=1)
    wire, grad_weight, _ = k.backward_sums(grad_y, x, stats, NUMBERS, torch.float32)
    wire = reduced(wire, 3, (1, NUMBERS[1], NUMBERS[2] + 1, NUMBERS[3]))
    assert k.check_sums(wire, message), "the host has compared nothing"
    assert k.backward_input(grad_y, x, None, wire, None, stats, message).isnan().all()
    assert grad_weight.isfinite().all(), "it is of this rank alone"
    with pytest.raises(ValueError, match=r"received backward of 'layer' \(call 3\) here .* some of 3 ranks") as caught:
        k.read_counters(wire, OF_3)
    assert f"with input float32 {shape}." in str(caught.value)
    k.read_counters(wire, OF_3)


def test_sums_that_agree_by_chance_are_no_agreement():
    """1 and 3 have the sum of 2 and 2, but not its squares."""
    k, x = CupyKernels(EmulatedLauncher()), batch((4, 5))[0]
    message = MESSAGE._replace(numbers=(1, 2, 0, 0), ranks=2)
    wire = k.local_moments(x, None, (1, 1, 0, 0), STATUS) + k.local_moments(x, None, (1, 3, 0, 0), STATUS)
    assert wire[: moments.CALL].tolist() == [2, 4, 0, 0, 10, 0, 0]
    assert k.normalize(x, wire, Parameters(eps=EPS), message)[0].isnan().all()


MOST = (1, LIMIT - 1, LIMIT - 1, LIMIT - 1)


@pytest.mark.parametrize("last", [MOST, (1, LIMIT - 2, LIMIT - 1, LIMIT - 1), (1, LIMIT - 1, LIMIT - 1, 0)])
def test_the_largest_numbers_on_the_most_ranks_are_compared_exactly(last):
    numbers, ranks = MOST, 65_536
    message = Message(numbers, ranks, "'layer'", 0, LIMIT - 1)
    k = CupyKernels(EmulatedLauncher())
    x, grad_y = batch((4, 5))
    stats = forward(k, x)[1]
    status = Status(0.0, ranks, ranks, 0, 0, ranks, 0)
    wire = reduced(k.local_moments(x, None, numbers, status), ranks, last)
    y, _ = k.normalize(x, wire, Parameters(eps=EPS), message)
    sums = reduced(k.backward_sums(grad_y, x, stats, numbers)[0], ranks, last)
    grad_x = k.backward_input(grad_y, x, None, sums, None, stats, message)
    expected = torch.isfinite if last == numbers else torch.isnan
    assert expected(y).all()
    assert expected(grad_x).all()


@pytest.mark.parametrize("one", [True, False])
def test_a_rank_that_abstains_compares_the_others(one):
    """Exactly, where n * sum(v^2) and (sum v)^2 are beyond 2^53."""
    k, (x, grad_y), ranks = CupyKernels(EmulatedLauncher()), batch((4, 5)), 65_536
    message = Message(ABSTAINS, ranks, "'layer'", 0, 0)
    stats = forward(k, x)[1]
    sums = reduced(k.backward_sums(grad_y, x, stats, MOST)[0], ranks - 1, MOST if one else (*MOST[:3], LIMIT - 2))
    assert k.backward_input(grad_y, x, None, sums, None, stats, message).isnan().all() == (not one)


def test_the_first_of_several_errors_is_kept():
    """Those behind it follow from it: ranks that are one call apart stay so."""
    k, x = CupyKernels(EmulatedLauncher()), batch((4, 5))[0]
    for serial in (5, 6):
        wire = k.local_moments(x, None, (1, serial + 1, 0, 0), STATUS)
        k.normalize(x, wire, Parameters(eps=EPS), Message((1, serial, 0, 0), 1, "'layer'", 0, serial))
    with pytest.raises(ValueError, match=r"forward of 'layer' \(call 5\) here"):
        k.read_counters(wire, MESSAGE)


def test_a_group_without_a_sample_counts_the_batch_and_leaves_the_statistics_alone(running):
    k, x = CupyKernels(EmulatedLauncher()), torch.empty(0, 5, 2, 2)
    forward(k, x, running)
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 1)
    forward(k, x, running._replace(momentum=None))
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 2)
    k.read_counters(k.local_moments(x, None, NUMBERS, STATUS), MESSAGE)  # and nothing is wrong


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(4, 0), (3, 0, 2, 5), (0, 0)], ids=str)
def test_an_input_without_channels_is_a_launch_a_step_and_no_error(shape, channels_last):
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher)
    found = step(k, *batch(shape, channels_last=channels_last and len(shape) > 2))
    assert found["wire"].tolist() == [*moments.head(NUMBERS), shape[0] * (10 if len(shape) > 2 else 1), *STATUS]
    assert found["y"].shape == found["grad_x"].shape == shape
    assert len(launcher.launches) == 4
    k.read_counters(found["wire"], MESSAGE)


@pytest.mark.parametrize("weights", [0.5, 1.0])
def test_weights_of_other_ranks_masks_are_too_few_for_a_rank_without_samples_too(weights):
    k = CupyKernels(EmulatedLauncher())
    x = torch.empty(0, 5, 2, 2)
    wire = reduced(k.local_moments(x, None, NUMBERS, Status(0, 3.0, 3.0)), 3)
    wire[moments.CALL] = weights
    k.normalize(x, wire, Parameters(eps=EPS), OF_3)
    with pytest.raises(ValueError, match=f"received {weights:g} over 3 ranks"):
        k.read_counters(wire, OF_3)


def test_where_the_host_waits_anyway_it_compares_there():
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher, host_synchronous=True)
    assert CupyKernels(launcher).deferred
    assert not k.deferred
    x, grad_y = batch((4, 5))
    status = REFUSED["received True on 2 of 3 ranks"]
    wire = reduced(k.local_moments(x, None, NUMBERS, status), 3)
    assert k.read_counters(wire, OF_3) == (True, 4.0, status)
    assert not k.read_counters(wire, OF_3._replace(numbers=(1, 4, *NUMBERS[2:]))).same_call
    stats = k.normalize(x, wire, Parameters(eps=EPS), OF_3)[1]
    sums = k.backward_sums(grad_y, x, stats, NUMBERS)[0]
    assert k.check_sums(sums, MESSAGE)
    assert not k.check_sums(sums, OF_3._replace(numbers=(1, 4, *NUMBERS[2:])))
    k.backward_input(grad_y, x, None, sums, None, stats, OF_3)
    assert not launcher.errors.memory.any()
    before = len(launcher.launches)
    k.backward_input(x[:0], x[:0], None, sums, None, stats, MESSAGE)
    assert len(launcher.launches) == before, "nothing is left to compare"


def test_a_call_long_gone_is_not_named():
    memory = torch.zeros(DeferredErrors.SIZE, dtype=torch.float64)
    errors = DeferredErrors(memory)
    for _ in range(600):
        errors.number(MESSAGE, torch.float32, torch.Size((3,)))
    memory[:4] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"at least 2 values.* in a call too long ago to be named.* Found at a later call"
    ):
        errors.look()
    errors.look()


def test_parameters_elsewhere_are_refused_before_a_pointer_is_used():
    k = CupyKernels(EmulatedLauncher())
    x = batch((4, 5))[0]
    wire = k.local_moments(x, None, NUMBERS, STATUS)
    for wrong in (torch.ones(4), torch.ones(5, device="meta"), torch.ones(5, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match=r"must be floating-point of shape \(5,\) on cpu; received .* Move the layer"
        ):
            k.normalize(x, wire, Parameters(wrong, eps=EPS), MESSAGE)


def test_the_layer_trains_on_them_as_on_the_readable_ones(monkeypatch):
    x, grad_y = batch((6, 10, 9, 7))
    results = []
    for k in (TORCH, CupyKernels(EmulatedLauncher())):
        monkeypatch.setattr(kernels, "choose", lambda x, k=k: k)
        layer = syncbn.SyncBatchNorm(10)
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(grad_y)
        results.append([leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


SANITIZERS = {
    "address": ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-O0", "-g"),
    "thread": ("-fsanitize=thread", "-g"),
}


def sanitized(kind, library):
    """Runs the four steps on a build with gcc's sanitizers: for addresses and alignment, or for races."""
    found = subprocess.run(["gcc", f"-print-file-name=lib{kind[0]}san.so"], capture_output=True, text=True, check=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip(f"gcc has no lib{kind[0]}san here")
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "TSAN_OPTIONS": "exitcode=66"}
    words = ("-m", "tests.cuda_on_cpu.steps", library)
    return processes.python(*words, LD_PRELOAD=found.stdout.strip(), PYTHONMALLOC="malloc", limit=300, **options)


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_the_sanitizers_find_nothing(kind):
    done = sanitized(kind, build(*SANITIZERS[kind]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


# What each line is for, and who notices when it is gone.
BROKEN = {
    "a barrier": ("thread", "reduce.cuh", "        __syncthreads();\n        if (!last)", "        if (!last)"),
    "a fence": ("thread", "reduce.cuh", "            __threadfence();  // the sums", "            // the sums"),
    "an alignment": ("address", "walk.cuh", "if (width == 16) return", "if (width >= 0) return"),
    "a bound": ("address", "storage.cuh", "if (i < length) pack.at", "pack.at"),
}


@pytest.mark.builds
@pytest.mark.timeout(400)
@pytest.mark.parametrize("missing", BROKEN)
def test_the_sanitizers_find_a_kernel_without(missing, tmp_path):
    kind, name, line, without = BROKEN[missing]
    shutil.copytree(CUDA, tmp_path / "cuda")
    text = (tmp_path / "cuda" / name).read_text()
    assert line in text
    (tmp_path / "cuda" / name).write_text(text.replace(line, without))
    done = sanitized(kind, build(*SANITIZERS[kind], cuda=tmp_path / "cuda"))
    assert done.returncode != 0
    assert "Sanitizer: " in done.stderr or "misaligned address" in done.stderr
