# SPDX-License-Identifier: BSD-3-Clause
"""What the compiled kernels promise beyond the contract of test_contract.py."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn import kernels, moments, reference
from syncbn.kernels.base import Parameters, split_stats
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Message, Running, Status
from tests import processes

ops = pytest.importorskip("syncbn.kernels.host.ops", reason="built without a compiler", exc_type=ImportError)
HOST, TORCH, compiled = ops.HostKernels(), TorchKernels(), ops.compiled
EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
NUMBERS = (1, 7, moments.LIMIT - 1, 3)
MESSAGE = Message(NUMBERS, 1, "a layer", 0, 7)
X = torch.zeros(2, 3, 4)
HALVES = (torch.float16, torch.bfloat16)
# Large enough for the thread pool and for several partial sums per channel.
LARGE = [(3, 40, 70, 65), (5, 2, 190, 191), (40001, 7), (2, 600, 13, 17)]


@pytest.fixture(autouse=True)
def _settings_restored():
    fastest, threads = compiled.instruction_set(), torch.get_num_threads()
    yield
    compiled.use_instruction_set(fastest)
    torch.set_num_threads(threads)


def step(implementation, x, grad_y, weight=None, bias=None):
    """Every number that the four steps make."""
    wire = implementation.local_moments(x, None, NUMBERS, STATUS)
    y, stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    sums, grad_weight, grad_bias = implementation.backward_sums(grad_y, x, stats, NUMBERS, *dtypes)
    grad_x = implementation.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    mean, invstd, count = split_stats(stats)
    made = {"wire": wire, "y": y, "mean": mean, "invstd": invstd, "count": count, "sums": sums, "grad_x": grad_x}
    gradients = {"grad_weight": grad_weight, "grad_bias": grad_bias}
    return made | {name: grad for name, grad in gradients.items() if grad is not None}


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


def batch(shape, dtype=torch.float32, *, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad_y = ((torch.randn(shape, generator=generator) * 2 + 1).to(dtype) for _ in range(2))
    if channels_last:
        x, grad_y = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad_y))
    return x, grad_y


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*LARGE[1:3], (3, 37, 5, 7)], ids=str)
def test_every_instruction_set_gives_the_same_bits(shape, dtype, channels_last):
    x, grad_y = batch(shape, dtype, channels_last=channels_last)
    results = []
    for name in compiled.instruction_sets():
        compiled.use_instruction_set(name)
        results.append(step(HOST, x, grad_y))
    assert all(not differing(results[0], other) for other in results)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, dtype, channels_last):
    x, grad_y = batch(shape, dtype, channels_last=channels_last)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(step(HOST, x, grad_y))
    assert all(not differing(results[0], other) for other in results)


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shares", [[3, 3, 3], [1, 8], [0, 2, 7], [1] * 9], ids=str)
def test_bits_do_not_depend_on_ranks_and_threads(dtype, shares, channels_last):
    """Ranks are played by shares whose wires are added up."""
    x, grad_y = batch((9, 24, 40, 33), dtype, channels_last=channels_last)
    weight, bias = torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)
    whole = step(HOST, x, grad_y, weight, bias)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        xs, gs = x.split(shares), grad_y.split(shares)
        wire = sum(HOST.local_moments(part, None, NUMBERS, STATUS) for part in xs)
        normalized = [HOST.normalize(part, wire, Parameters(weight, bias, EPS), MESSAGE) for part in xs]
        stats = normalized[0][1]
        pairs = list(zip(gs, xs, strict=True))
        sums = sum(HOST.backward_sums(g, part, stats, NUMBERS)[0] for g, part in pairs)
        grads = [HOST.backward_input(g, part, None, sums, weight, stats, MESSAGE) for g, part in pairs]
        assert torch.equal(torch.cat([y for y, _ in normalized]), whole["y"])
        assert torch.equal(torch.cat(grads), whole["grad_x"])


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
def test_elements_are_those_of_the_readable_twin(dtype, channels_last):
    """From the same sums, the elementwise steps agree with torch_ops.py bit for bit."""
    x, grad_y = batch((4, 37, 9, 5), dtype, channels_last=channels_last)
    weight, bias = torch.randn(2, 37)
    wire = TORCH.local_moments(x, None, NUMBERS, STATUS)
    y, stats = TORCH.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    ours, our_stats = HOST.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    assert torch.equal(ours, y)
    assert torch.equal(our_stats, stats)
    sums = TORCH.backward_sums(grad_y, x, stats, NUMBERS)[0]
    theirs = TORCH.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    assert torch.equal(HOST.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE), theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_number_survives_and_rounds_as_in_torch(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    between = every.float().nan_to_num(0.0, 0.0, 0.0).repeat(1, 2) * torch.tensor([1.0, 1.00390625])
    stats = torch.tensor([0.0, 1.0, 1.0]).double()  # mean, invstd, count
    zeros, nothing = torch.zeros(moments.sums_length(1)).double(), torch.zeros_like(every)

    def scaled(weight):
        return HOST.backward_input(every, nothing, None, zeros, weight, stats, MESSAGE)

    for name in compiled.instruction_sets():
        compiled.use_instruction_set(name)
        same = scaled(None)
        assert torch.equal(same.isnan(), every.isnan())
        assert torch.equal(same.nan_to_num(0.0), every.nan_to_num(0.0))
        scale = between[0, 1] * 0 + 1.00390625
        rounded = scaled(scale.view(1))
        expected = (every.float() * scale).to(dtype)
        assert torch.equal(rounded.nan_to_num(0.0), expected.nan_to_num(0.0))


@st.composite
def tensors(draw):
    """x and grad_y of any dtype, rank and shape, in any order of dims, sliced, expanded, each in its own layout."""
    dims = draw(st.integers(2, 5))
    shape = [draw(st.integers(0, 4)), draw(st.integers(1, 19)), *(draw(st.integers(0, 9)) for _ in range(dims - 2))]
    dtype, generator = draw(st.sampled_from(moments.DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def strided():
        order = draw(st.permutations(range(dims)))
        steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in order]
        full = torch.randn([shape[d] * steps[d] for d in order], generator=generator).to(dtype)
        t = full.permute(sorted(range(dims), key=order.__getitem__))
        t = t[tuple(slice(None, None, s) for s in steps)]
        return t[:1].expand(shape) if draw(st.booleans()) and shape[0] > 0 and draw(st.booleans()) else t

    return strided(), strided()


@settings(deadline=None, max_examples=150)
@given(tensors(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from([1, 2]))
def test_any_strides_equal_the_reference_and_the_twin(pair, parameters, threads):
    x, grad_y = pair
    torch.set_num_threads(threads)
    C, count = x.size(1), x.numel() // x.size(1)
    weight, bias = torch.linspace(0.5, 2, C).to(parameters), torch.linspace(-1, 1, C).to(parameters)
    ours, twin = step(HOST, x, grad_y, weight, bias), step(TORCH, x, grad_y, weight, bias)
    one = torch.finfo(x.dtype).eps
    for name, theirs in twin.items():
        assert ours[name].dtype == theirs.dtype
        assert ours[name].stride() == theirs.stride() or not x.numel()
        tolerance = 1e-9 if theirs.dtype == torch.float64 else 16 * one
        scale = max(1.0, theirs.double().abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours[name], theirs, rtol=tolerance, atol=tolerance * scale)
    if count > 1:
        stats = torch.zeros(C, dtype=torch.float64)
        exact = reference.batch_norm(x.double(), weight.double(), bias.double(), stats, stats, eps=EPS).y
        blown_up = max(1.0, twin["invstd"].max().item())  # the rounding of the mean, where a channel hardly varies
        torch.testing.assert_close(ours["y"].double(), exact, rtol=16 * one, atol=max(64 * one, 1e-9) * blown_up)


def test_buffers_of_any_dtype_and_stride_move_alike():
    x = batch((6, 5, 4, 4))[0]
    for dtype in moments.DTYPES:
        for momentum in (0.25, None):
            ours, twin = (
                Running(*torch.ones(5, 2, dtype=dtype).unbind(1), torch.tensor(2), momentum) for _ in range(2)
            )
            for implementation, running in ((HOST, ours), (TORCH, twin)):
                wire = implementation.local_moments(x, None, NUMBERS, STATUS)
                implementation.normalize(x, wire, Parameters(eps=EPS, running=running), MESSAGE)
            assert ours.num_batches_tracked == twin.num_batches_tracked == 3
            torch.testing.assert_close(ours.mean, twin.mean)
            torch.testing.assert_close(ours.var, twin.var)


def test_only_plain_cpu_tensors_get_the_host_kernels():
    class Stand(torch.Tensor):
        pass

    assert kernels.choose(X).name == kernels.explain().name
    assert kernels.choose(torch.nn.Parameter(X)).name == kernels.explain().name
    for x in (X.as_subclass(Stand), X.to("meta"), torch.imag(torch.zeros(2, 2).cfloat().conj())):
        assert kernels.choose(x).name == "torch"


def test_a_gradient_that_is_a_negative_view_is_read_right():
    x = batch((3, 4, 5))[0]
    grad_y = torch.imag(torch.randn(3, 4, 5, dtype=torch.complex64).conj())
    assert grad_y.is_neg()
    assert not differing(step(HOST, x, grad_y), step(HOST, x, grad_y.resolve_neg().clone()))


def test_the_default_device_is_not_followed():
    with torch.device("meta"):
        assert HOST.local_moments(X, None, NUMBERS, STATUS).device.type == "cpu"


def test_callers_on_several_threads_do_not_disturb_each_other():
    torch.set_num_threads(2)
    x, grad_y = batch(LARGE[0])
    expected, seen = step(HOST, x, grad_y), []
    threads = [threading.Thread(target=lambda: seen.append(step(HOST, x, grad_y))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all(not differing(expected, other) for other in seen)


PROGRAM = """
import os, torch
from syncbn.kernels import choose, explain
torch.set_num_threads(2)
x = torch.randn(4, 64, 64, 64)
first = choose(x).local_moments(x, None, (1, 2, 3, 4), (0.0,) * 7)
pid = os.fork()
again = choose(x).local_moments(x, None, (1, 2, 3, 4), (0.0,) * 7)
if pid == 0:
    os._exit(0 if torch.equal(first, again) else 1)
print(explain().name, os.waitpid(pid, 0)[1])
"""


def test_a_forked_child_computes_too():
    done = processes.python("-c", PROGRAM, SYNCBN_KERNELS="host", limit=60)
    assert done.stdout.split() == ["host", "0"], done.stderr


@pytest.mark.builds
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs gcc")
def test_kernel_tests_pass_under_the_sanitizers():
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not os.path.isabs(library.strip()):
        pytest.skip("gcc has no libasan here")
    done = processes.run("tests/sanitize.sh", PYTHON=sys.executable, limit=850)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
