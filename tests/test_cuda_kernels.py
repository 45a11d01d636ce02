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
from syncbn.kernels import cuda_geometry, cupy_ops
from syncbn.kernels.cupy_ops import CupyKernels
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Running, Status
from tests import processes
from tests.cuda_on_cpu import CUDA, EmulatedLauncher, build

TORCH = TorchKernels()
EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
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
    wire = implementation.local_moments(x, STATUS)
    y, stats = implementation.normalize(x, wire, weight, bias, None, EPS, wire[0].item())
    sums = implementation.backward_sums(grad_y, x, stats)
    grad_x = implementation.backward_input(grad_y, x, sums, weight, stats)
    return {"wire": wire, "y": y, "mean": stats.mean, "invstd": stats.invstd, "sums": sums, "grad_x": grad_x}


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", ["local_moments", "normalize", "backward_sums", "backward_input"])
def test_arguments_are_packed_as_the_structs_are(name):
    packed = getattr(cupy_ops, name.upper()).size
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
    for name in ("wire", "mean", "invstd", "sums"):
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
    wire = sum(k.local_moments(part, STATUS) for part in xs)
    ys, stats = zip(*[k.normalize(part, wire, None, None, None, EPS, 0.0) for part in xs], strict=True)
    sums = sum(k.backward_sums(g, part, s) for g, part, s in zip(gs, xs, stats, strict=True))
    grads = [k.backward_input(g, part, sums, None, s) for g, part, s in zip(gs, xs, stats, strict=True)]
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
        assert ours[name].stride() == expected.stride() or not x.numel()


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
def test_buffers_of_any_dtype_and_stride_move_alike(dtype, momentum):
    x = batch((6, 300, 2, 2))[0]
    ours, twin = (Running(*torch.ones(300, 2, dtype=dtype).unbind(1), torch.tensor(2), momentum) for _ in range(2))
    for k, running in ((CupyKernels(EmulatedLauncher()), ours), (TORCH, twin)):
        k.normalize(x, k.local_moments(x, STATUS), None, None, running, EPS, 24.0)
    assert ours.num_batches_tracked == twin.num_batches_tracked == 3
    torch.testing.assert_close(ours.mean, twin.mean)
    torch.testing.assert_close(ours.var, twin.var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_backward_sums_rounds_the_gradients_of_weight_and_bias(dtype):
    x, grad_y = batch((9, 5, 6))
    k = CupyKernels(EmulatedLauncher())
    stats = k.normalize(x, k.local_moments(x, STATUS), None, None, None, EPS, 54.0)[1]
    wire, grad_weight, grad_bias = k.backward_sums_and_gradients(grad_y, x, stats, dtype, dtype)
    assert torch.equal(grad_bias, wire[:5].to(dtype))
    assert torch.equal(grad_weight, wire[5:].to(dtype))


def test_a_step_is_two_launches_forward_and_two_backward():
    launcher = EmulatedLauncher()
    x, grad_y = batch((2, 64, 56, 56))
    k = CupyKernels(launcher)
    stats = k.normalize(x, k.local_moments(x, STATUS), None, None, None, EPS, 0.0)[1]
    k.backward_input(grad_y, x, k.backward_sums_and_gradients(grad_y, x, stats, x.dtype, x.dtype)[0], None, stats)
    names = [kernel for kernel, *_ in launcher.launches]
    assert names == [
        "local_moments<float, Planes, Float64>",
        "normalize<float, Planes>",
        "backward_sums<float, Planes, Float64>",
        "backward_input<float, Planes>",
    ]


RESNET = [(2, 64, 112, 112), (2, 256, 56, 56), (2, 2048, 7, 7), (32, 64, 112, 112), (1, 64, 512, 512), (64, 2048)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_blocks_fill_a_gpu_where_there_is_work_for_it(shape, itemsize):
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = cuda_geometry.plan(x.shape, strides, itemsize)
        work = x.numel() * itemsize / (16 * 32 * cuda_geometry.STEPS)  # warps with a few packs a thread
        assert plan.grid >= min(132, work / 8), plan
        assert plan.block[0] * plan.block[1] <= cuda_geometry.THREADS
        assert plan.grid <= 2 * cuda_geometry.BLOCKS_OF_PLANES


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [*RESNET, (32, 256, 56, 56), (2, 256, 512, 512)], ids=str)
def test_the_last_block_of_a_group_reads_partial_sums_in_a_few_rounds(shape, itemsize):
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = cuda_geometry.plan(x.shape, strides, itemsize)
        lanes = plan.block[0 if plan.layout == "Planes" else 1]
        assert plan.blocks <= 4 * lanes, plan


def test_one_channel_is_one_plane_while_32_bits_can_count_it():
    assert cuda_geometry.plan((4, 1, 1000), (1000, 1000, 1), 2).S == 4000
    assert cuda_geometry.plan((4, 1, 1 << 29), (1 << 29, 1 << 29, 1), 2).S == 1 << 29


VERDICTS = {
    "2 of 3 ranks had a wrong one": Status(2.0, 3.0, 3.0, 0, 0, 1.0, 0),
    "float16 on 1, float32 on 2 of 3 ranks": Status(0.0, 3.0, 3.0, 1.0, 0, 2.0, 0),
    "received True on 2 of 3": Status(0.0, 2.0, 2.0, 0, 0, 3.0, 0),
    "received 1 over 3 ranks": Status(0.0, 3.0, 3.0, 0, 0, 1.0, 0),
}


@pytest.mark.parametrize("message", VERDICTS)
def test_a_refused_call_is_nan_touches_nothing_and_is_told_at_the_next_call(message):
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher, 3)
    x = batch((1 if "received 1 over" in message else 4, 5))[0]
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)
    wire = k.local_moments(x, VERDICTS[message])
    assert k.read_status(wire) == (2.0, Status(needs_grad=1.0))
    y, stats = k.normalize(x, wire, None, None, running, EPS, 2.0)
    assert y.isnan().all()
    assert stats.mean.isnan().all()
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 0)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        k.read_status(k.local_moments(x, STATUS))
    assert f"float32 {tuple(x.shape)}" in str(caught.value)
    k.read_status(wire)  # once


def test_a_group_without_a_sample_leaves_the_buffers_alone():
    k = CupyKernels(EmulatedLauncher(), 3)
    x = torch.empty(0, 5, 2, 2)
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)
    k.normalize(x, k.local_moments(x, Status(0, 3.0, 3.0)), None, None, running, EPS, 2.0)
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 0)
    k.read_status(k.local_moments(x, STATUS))  # and nothing is wrong


@pytest.mark.parametrize("weights", [0.5, 1.0])
def test_weights_of_other_ranks_masks_are_too_few_for_a_rank_without_samples_too(weights):
    k = CupyKernels(EmulatedLauncher(), 3)
    x = torch.empty(0, 5, 2, 2)
    wire = k.local_moments(x, Status(0, 3.0, 3.0))
    wire[0] = weights
    k.normalize(x, wire, None, None, None, EPS, 2.0)
    with pytest.raises(ValueError, match=f"received {weights:g} over 3 ranks"):
        k.read_status(wire)


def test_where_the_host_waits_anyway_it_reads_the_verdict_there():
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher, 3, on_host=True)
    x = batch((4, 5))[0]
    wire = k.local_moments(x, VERDICTS["received True on 2 of 3"])
    assert k.read_status(wire) == (4.0, VERDICTS["received True on 2 of 3"])
    k.normalize(x, wire, None, None, None, EPS, 4.0)
    assert not launcher.box.memory.any()


def test_parameters_elsewhere_are_refused_before_a_pointer_is_used():
    k = CupyKernels(EmulatedLauncher())
    x = batch((4, 5))[0]
    wire = k.local_moments(x, STATUS)
    for wrong in (torch.ones(4), torch.ones(5, device="meta"), torch.ones(5, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match=r"must be floating-point of shape \(5,\) on cpu; received .* Move the layer"
        ):
            k.normalize(x, wire, wrong, None, None, EPS, 4.0)
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0.0), 0.1)
    with pytest.raises(ValueError, match="num_batches_tracked must be int64 on cpu"):
        k.normalize(x, wire, None, None, running, EPS, 4.0)


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
    "address": ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"),
    "thread": ("-fsanitize=thread",),
}


def sanitized(kind, library):
    """Runs the four steps on a build with gcc's sanitizers: for addresses and alignment, or for races."""
    found = subprocess.run(["gcc", f"-print-file-name=lib{kind[0]}san.so"], capture_output=True, text=True, check=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip(f"gcc has no lib{kind[0]}san here")
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "TSAN_OPTIONS": "exitcode=66"}
    words = ("-m", "tests.cuda_on_cpu.steps", library)
    return processes.python(*words, LD_PRELOAD=found.stdout.strip(), PYTHONMALLOC="malloc", limit=300, **options)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_the_sanitizers_find_nothing(kind):
    done = sanitized(kind, build(*SANITIZERS[kind]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


# What each line is for, and who notices when it is gone.
BROKEN = {
    "a barrier": ("thread", "reduce.cuh", "        __syncthreads();\n        if (!last)", "        if (!last)"),
    "a fence": ("thread", "reduce.cuh", "        __threadfence();  // the sums", "        // the sums"),
    "an alignment": ("address", "storage.cuh", "if (width == 16) return", "if (width >= 0) return"),
    "a bound": ("address", "storage.cuh", "if (i < length) pack.at", "pack.at"),
}


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
