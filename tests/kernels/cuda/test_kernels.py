# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU kernels promise beyond the contract of test_contract.py, on a CPU: see cuda_on_cpu/cuda.hpp."""

import ctypes

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import syncbn
from syncbn import kernels, moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda import ops
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import Running
from tests.cuda_on_cpu import EmulatedLauncher
from tests.kernels.cuda.calls import EPS, MESSAGE, NUMBERS, STATUS, TORCH, batch, differing, forward, step

SHAPES = [(3, 5, 70, 65), (40, 7, 14, 14), (4001, 9), (2, 300, 3, 3), (1, 1, 9000), (7, 130, 7, 7)]


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
