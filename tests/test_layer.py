# SPDX-License-Identifier: BSD-3-Clause
"""SyncBatchNorm in one process is a drop-in for torch.nn.SyncBatchNorm, on any device that torch has."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import syncbn
from syncbn import functional
from syncbn.calls import operators
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.transports.single import SingleTransport
from tests.multiprocess.batches import torchs


def test_the_constructor_is_torchs_and_what_it_adds_is_off_and_by_keyword():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (syncbn.SyncBatchNorm, nn.SyncBatchNorm))
    shared, added = ours[: len(theirs)], ours[len(theirs) :]
    assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs]
    off = {"bias": True, "replays": True}  # torch 2.11 has no bias=
    assert all(p.default is off.get(p.name) for p in added)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}])
def test_attributes_and_state_are_torchs(options):
    ours, theirs = syncbn.SyncBatchNorm(4, **options), torchs(nn.SyncBatchNorm, 4, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group", "_version"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.extra_repr() == theirs.extra_repr()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_it_is_a_batch_norm_but_not_torchs_sync_batch_norm():
    """DistributedDataParallel refuses a CPU model that contains the latter."""
    layer = syncbn.SyncBatchNorm(4)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)


def test_device_and_dtype_are_used():
    layer = syncbn.SyncBatchNorm(4, device="meta", dtype=torch.bfloat16)
    assert layer.weight.device.type == "meta"
    assert layer.running_var.dtype == torch.bfloat16


def test_a_checkpoint_without_the_counter_loads():
    """torch wrote none before its version 2."""
    old = nn.BatchNorm2d(4).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    syncbn.SyncBatchNorm(4).load_state_dict(old)


def test_eval_is_torchs_batch_norm():
    ours, theirs = syncbn.SyncBatchNorm(4).eval(), nn.BatchNorm2d(4).eval()
    for layer in (ours, theirs):
        layer.running_mean.copy_(torch.arange(4.0))
        layer.running_var.copy_(torch.arange(4.0) + 1)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(ours(x), theirs(x))
    assert ours.num_batches_tracked == 0


def test_eval_without_running_statistics_uses_its_own_share():
    ours, theirs = (c(4, track_running_stats=False).eval() for c in (syncbn.SyncBatchNorm, nn.BatchNorm1d))
    x = torch.randn(5, 4)
    assert torch.equal(ours(x), theirs(x))


def test_training_without_a_launcher_equals_batch_norm():
    ours, theirs = syncbn.SyncBatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_no_gradient_reaches_a_buffer():
    layer = syncbn.SyncBatchNorm(4)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert not layer.running_mean.requires_grad
    assert operators.ANCHOR.grad is None


def test_inference_mode_in_training_is_allowed():
    layer = syncbn.SyncBatchNorm(4)
    with torch.inference_mode():
        y = layer(torch.randn(3, 4))
    assert not y.requires_grad


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_training_refuses_an_eps_that_is_not_above_0(eps):
    layer, x = syncbn.SyncBatchNorm(3, eps=eps), torch.randn(4, 3)
    for call in (layer, lambda x: functional.sync_batch_norm(x, eps=eps)):
        with pytest.raises(ValueError, match=rf"needs eps > 0 in training.*received {eps}\. The default is 1e-5"):
            call(x)
    if eps <= 0:
        with pytest.raises(ValueError, match="eps must be positive"):
            nn.BatchNorm1d(3, eps=eps)(x)
    assert layer.num_batches_tracked == 0


def test_eval_takes_an_eps_of_0_where_torch_does():
    ours, theirs = (c(3, eps=0.0).eval() for c in (syncbn.SyncBatchNorm, nn.BatchNorm1d))
    x = torch.randn(4, 3)
    try:
        expected = theirs(x)
    except ValueError:  # torch 2.11
        with pytest.raises(ValueError, match="eps must be positive"):
            ours(x)
    else:
        assert torch.equal(ours(x), expected)


@pytest.fixture(params=["as chosen", "torch"])
def steps(request, monkeypatch):
    """The kernels of this machine, and those of SYNCBN_KERNELS=torch."""
    if request.param == "torch":
        monkeypatch.setattr("syncbn.kernels.for_call", lambda *_: TorchKernels())
        monkeypatch.setattr("syncbn.kernels.choose", lambda x: TorchKernels())


@pytest.mark.usefixtures("steps")
def test_a_training_step_tells_autograd_that_buffers_moved():
    layer = syncbn.SyncBatchNorm(3)
    before = {name: buffer._version for name, buffer in layer.named_buffers()}
    layer(torch.randn(4, 3))
    assert all(buffer._version > before[name] for name, buffer in layer.named_buffers())
    scale = torch.ones(3, requires_grad=True)
    y = scale * layer.running_var
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("steps")
def test_a_forward_in_eval_keeps_its_gradient_over_a_training_step():
    """The training step moves the buffers that the forward in eval has used."""
    torch.manual_seed(0)
    layer, batches = syncbn.SyncBatchNorm(3, dtype=torch.float64), torch.randn(4, 5, 3, 2, dtype=torch.float64)
    layer(batches[0])
    grad_y = batches[3]

    def gradients(between):
        own = copy.deepcopy(layer).eval()
        x = batches[1].clone().requires_grad_()
        y = own(x)
        if between:
            own.train()(batches[2])
        y.backward(grad_y)
        return x.grad, own.weight.grad, own.bias.grad

    for ours, alone in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, alone)


def test_in_place_activation_after_it_is_allowed():
    layer = syncbn.SyncBatchNorm(4)
    x = torch.randn(6, 4, requires_grad=True)
    torch.relu_(layer(x)).sum().backward()
    expected = torch.autograd.grad(torch.relu(nn.BatchNorm1d(4)(x)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_show(value):
    """As in torch: NaN for the channel, and the other channels untouched."""
    x = torch.randn(4, 2, 3)
    x[0, 0, 0] = value
    y = syncbn.SyncBatchNorm(2)(x)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work(copier):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3)
    layer(x)
    assert torch.equal(copier(layer)(x), layer(x))


def test_lazy_layer_becomes_an_eager_one():
    layer = syncbn.LazySyncBatchNorm(momentum=0.3)
    x = torch.randn(4, 7, 2)
    y = layer(x)
    assert type(layer) is syncbn.SyncBatchNorm
    assert layer.num_features == 7
    torch.testing.assert_close(y, nn.BatchNorm1d(7)(x))


def test_a_lazy_layer_without_a_bias_becomes_an_eager_one_without():
    layer = syncbn.LazySyncBatchNorm(bias=False, dtype=torch.float64)
    assert "bias" not in layer.state_dict()
    layer(torch.randn(4, 7, dtype=torch.float64))
    assert type(layer) is syncbn.SyncBatchNorm
    assert (layer.weight.dtype, layer.bias) == (torch.float64, None)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}])
def test_reset_parameters_makes_the_layer_as_it_was(options):
    layer, new = (syncbn.SyncBatchNorm(4, **options) for _ in range(2))
    for value in layer.state_dict().values():
        value.fill_(7)
    layer.reset_parameters()
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in layer.state_dict().items())


def test_functional_equals_the_layer():
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, 2)
    mean, var = torch.zeros(3), torch.ones(3)
    y = functional.sync_batch_norm(x, mean, var, layer.weight, layer.bias)
    assert torch.equal(y, layer(x))
    assert torch.equal(mean, layer.running_mean)
    assert torch.equal(var, layer.running_var)
    assert torch.equal(functional.sync_batch_norm(x), y)


def test_gradcheck():
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.rand(2, 2, dtype=torch.float64, requires_grad=True).unbind()
    call = functional.sync_batch_norm
    assert torch.autograd.gradcheck(lambda x, w, b: call(x, weight=w, bias=b), (x, weight, bias))


def test_importing_syncbn_starts_no_mpi_and_loads_no_compiler():
    """torch's compiler takes as long to import as torch itself; torch loads it at the first use."""
    program = "import sys, syncbn; print(*[n for n in ('mpi4py', 'mpi4py.MPI', 'torch._dynamo') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_an_input_on_another_device_than_the_layer_is_refused():
    layer = syncbn.SyncBatchNorm(3, device="meta")
    with pytest.raises(ValueError, match=r"on the device of the layer, meta; received cpu. Call x.to\('meta'\)"):
        layer(torch.randn(4, 3, device="cpu"))


class AdjointStep(torch.autograd.Function):
    """Calls a layer forward, and backward once more on another input, as an adjoint ODE block does."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad_y):
        x = (ctx.saved_tensors[0].detach() + 1).requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x * x)
        return torch.autograd.grad(y, x, grad_y)[0], None


def test_without_replays_a_forward_inside_backward_communicates(monkeypatch):
    sent, send = [], SingleTransport.all_reduce
    monkeypatch.setattr(SingleTransport, "all_reduce", lambda self, wire: sent.append(wire.numel()) or send(self, wire))
    ours, theirs = syncbn.SyncBatchNorm(3, replays=False, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    x, grad_y = torch.randn(2, 5, 3, dtype=torch.float64)
    x.requires_grad_()
    grads = []
    for layer in (ours, theirs):
        y = AdjointStep.apply(x, layer)
        del sent[:]
        grads.append(torch.autograd.grad(y, x, grad_y)[0])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.num_batches_tracked == 2
    y = AdjointStep.apply(x, ours)
    del sent[:]
    y.backward(grad_y)
    assert sent == [2 * 3 + 15, 2 * 3 + 7]


def test_with_replays_it_is_refused_with_the_way_out():
    y = AdjointStep.apply(torch.randn(5, 3, requires_grad=True), syncbn.SyncBatchNorm(3))
    with pytest.raises(RuntimeError, match=r"repeats none, as in an adjoint ODE block.*replays=False"):
        y.sum().backward()


def test_a_lazy_layer_keeps_replays_and_conversion_turns_them_on():
    layer = syncbn.LazySyncBatchNorm(replays=False)
    layer(torch.randn(4, 3))
    assert type(layer) is syncbn.SyncBatchNorm
    x = torch.randn(5, 3, requires_grad=True)
    AdjointStep.apply(x, copy.deepcopy(layer)).sum().backward()
    converted = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="repeats none"):
        AdjointStep.apply(x, converted).sum().backward()
