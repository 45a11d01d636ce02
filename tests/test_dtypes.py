# SPDX-License-Identifier: BSD-3-Clause
"""Every mix of dtypes of input, parameters, buffers and counter, in training and eval, against torch in one process."""

import copy
import itertools

import pytest
import torch
from torch import nn

import syncbn
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import DTYPES
from tests.tolerances import FLOOR

COUNTERS = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


@pytest.fixture(params=["as chosen", "torch"], autouse=True)
def steps(request, monkeypatch):
    """The kernels of this machine, and those of SYNCBN_KERNELS=torch."""
    if request.param == "torch":
        monkeypatch.setattr("syncbn.kernels.for_call", lambda *_: TorchKernels())
        monkeypatch.setattr("syncbn.kernels.choose", lambda x: TorchKernels())


def made(cls, parameters, buffers, counter=torch.int64, **options):
    """A layer of these dtypes, None for none, the same for every class."""
    draw = torch.Generator().manual_seed(0)
    options = {"affine": parameters is not None, "track_running_stats": buffers is not None, **options}
    layer = cls(4, **options)
    if parameters is not None:
        layer.weight = nn.Parameter((torch.rand(4, generator=draw) + 0.5).to(parameters))
        layer.bias = nn.Parameter(torch.randn(4, generator=draw).to(parameters))
    if buffers is not None:
        layer.running_mean = torch.randn(4, generator=draw).to(buffers)
        layer.running_var = (torch.rand(4, generator=draw) + 0.5).to(buffers)
        layer.num_batches_tracked = torch.tensor(3.5).to(counter)
    return layer


def run(layer, x, grad_y):
    """y and all gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad_y.to(y.dtype))


def batch(dtype):
    draw = torch.Generator().manual_seed(1)
    x, grad_y = torch.randn(2, 6, 4, 5, generator=draw)
    return x.to(dtype), grad_y.to(dtype)


def in_float64(layer):
    """torch's layer with the values of ours."""
    twin = nn.BatchNorm1d(
        4, momentum=layer.momentum, affine=layer.affine, track_running_stats=layer.track_running_stats
    )
    return twin.double().train(layer.training).requires_grad_(layer.affine), layer.state_dict()


def close(actual, exact, dtype):
    """One rounding of the result, and what arithmetic in float32 on its way adds, unless x is float64."""
    arithmetic = 0 if dtype == torch.float64 else 1e-6
    bound = (2 * FLOOR[actual.dtype] + arithmetic) * max(1.0, exact.abs().max().item())
    return (actual.double() - exact.double()).abs().max().item() <= bound


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes_runs_and_equals_torch_in_float64(dtype, training, momentum):
    x, grad_y = batch(dtype)
    for parameters, buffers in itertools.product((None, *DTYPES), repeat=2):
        ours = made(syncbn.SyncBatchNorm, parameters, buffers, momentum=momentum).train(training)
        exact, state = in_float64(ours)
        exact.load_state_dict(state)
        results, expected = run(ours, x, grad_y), run(exact, x.double(), grad_y.double())
        assert [r.dtype for r in results] == [dtype, dtype, *[parameters] * 2][: len(results)]
        assert all(close(r, e, dtype) for r, e in zip(results, expected, strict=True)), (dtype, parameters, buffers)
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == (torch.int64 if name == "num_batches_tracked" else buffers)
            assert close(buffer.to(buffers), getattr(exact, name).double(), torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_takes_in_eval_has_torchs_bits(dtype, training):
    x, grad_y = batch(dtype)
    taken = 0
    for parameters, buffers in itertools.product((None, *DTYPES), repeat=2):
        ours, theirs = (made(c, parameters, buffers).train(training) for c in (syncbn.SyncBatchNorm, nn.BatchNorm1d))
        try:
            expected = run(theirs, x, grad_y)
        except RuntimeError:
            continue
        taken += 1
        for result, there in zip(run(ours, x, grad_y), expected, strict=True):
            assert result.dtype == there.dtype
            assert training or torch.equal(result, there)
    assert taken >= 4, "torch takes one dtype everywhere, with and without parameters and buffers"


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("counter", COUNTERS, ids=str)
def test_a_counter_of_any_dtype_counts_on_as_in_torch(counter, momentum):
    ours, theirs = (
        made(c, torch.float32, torch.float32, counter, momentum=momentum)
        for c in (syncbn.SyncBatchNorm, nn.BatchNorm1d)
    )
    x, _ = batch(torch.float32)
    for _ in range(3):
        ours(x), theirs(x)
        assert ours.num_batches_tracked.dtype == counter
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_the_mean_of_two_checkpoints_trains():
    """Its counter is a float, and not whole."""
    first, second = nn.BatchNorm1d(4).state_dict(), nn.BatchNorm1d(4).state_dict()
    second["num_batches_tracked"] += 3
    mean = {key: (first[key] + second[key]) / 2 for key in first}
    layer = syncbn.SyncBatchNorm(4, momentum=None)
    layer.load_state_dict(copy.deepcopy(mean), assign=True)
    theirs = nn.BatchNorm1d(4, momentum=None)
    theirs.load_state_dict(copy.deepcopy(mean), assign=True)
    x, _ = batch(torch.float32)
    layer(x), theirs(x)
    assert layer.num_batches_tracked == theirs.num_batches_tracked == 2.5
    torch.testing.assert_close(layer.state_dict(), theirs.state_dict())


def test_eval_of_a_mix_of_dtypes_needs_two_values_without_running_statistics():
    layer = made(syncbn.SyncBatchNorm, torch.float32, None).eval()
    with pytest.raises(ValueError, match=r"at least 2 values per channel in eval; received shape \(1, 4\)"):
        layer(torch.randn(1, 4, dtype=torch.float64))


def test_eval_of_a_mix_of_dtypes_exports_and_traces():
    layer = made(syncbn.SyncBatchNorm, torch.bfloat16, torch.float32).eval()
    x, _ = batch(torch.bfloat16)
    expected = layer(x)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(1, dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
        torch.ones(3, 3, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype}",
)
def test_eval_refuses_what_would_broadcast_or_lose_a_part(name, wrong):
    layer = syncbn.SyncBatchNorm(3).eval().requires_grad_(False)
    if name in ("weight", "bias"):
        layer._parameters[name] = wrong
    else:
        layer._buffers[name] = wrong
    with pytest.raises(ValueError, match=rf"needs {name} of shape \(3,\) and a floating dtype"):
        layer(torch.randn(4, 3))
