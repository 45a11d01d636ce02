# SPDX-License-Identifier: BSD-3-Clause
"""Second and third derivatives and masks in one process: right, or refused."""

import pytest
import torch

import syncbn
from syncbn import functional, kernels, moments, reference
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Status
from syncbn.transports.single import SingleTransport
from tests.conftest import DEVICE

C = 2


def inputs(n=3, dtype=torch.float64):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = ((n, C, 2), (C,), (C,))
    return tuple(torch.randn(s, dtype=dtype, generator=generator, requires_grad=True) for s in shapes)


def call(x, weight, bias, mask=None):
    return functional.sync_batch_norm(x, weight=weight, bias=bias, mask=mask)


def exact(x, weight, bias):
    zeros = torch.zeros(C, dtype=torch.float64)
    return reference.batch_norm(x, weight, bias, zeros, zeros + 1).y


MASKS = {
    "none": None,
    "booleans": torch.tensor([[1, 1], [0, 1], [1, 0]]).bool(),
    "weights": torch.tensor([[1.0, 0.3], [0.0, 2.0], [1.5, 0.7]], dtype=torch.float64),
}


@pytest.mark.parametrize("mask", MASKS)
def test_first_and_second_derivatives(mask):
    def function(*tensors):
        return call(*tensors, mask=MASKS[mask])

    assert torch.autograd.gradcheck(function, inputs())
    assert torch.autograd.gradgradcheck(function, inputs())


def test_the_third_derivative_is_right():
    def third(function):
        tensors = inputs()
        first = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in second), tensors)

    for ours, right in zip(third(call), third(exact), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: (y * torch.arange(4.0).view(2, 2)).sum()])
def test_a_gradient_penalty_equals_torchs(loss):
    """Also of a loss that is linear in y, where grad_y is a constant."""

    def penalty(layer):
        x = torch.randn(5, C, 2, 2, generator=torch.Generator(DEVICE).manual_seed(1), requires_grad=True)
        (grad,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
        grad.square().sum().backward()
        return x.grad, layer.weight.grad

    for ours, theirs in zip(penalty(syncbn.SyncBatchNorm(C)), penalty(torch.nn.BatchNorm2d(C)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_first_derivatives_are_the_same_with_create_graph(dtype):
    """Other operators, the same formula: what a rank sends does not depend on it."""
    x, weight, bias = inputs(8)
    x = x.detach().to(dtype).requires_grad_()
    grad_y = torch.randn(8, C, 2, generator=torch.Generator(DEVICE).manual_seed(2)).to(dtype)
    tensors = (x, weight, bias)
    plain, graph = (torch.autograd.grad(call(*tensors), tensors, grad_y, create_graph=g) for g in (False, True))
    for a, b in zip(plain, graph, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-6)


def test_padding_that_is_not_a_number_stays_out_of_the_statistics():
    x = torch.randn(4, C, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    layer, clean = syncbn.SyncBatchNorm(C), syncbn.SyncBatchNorm(C)
    clean(x, mask=mask)
    x[1, :, 2] = torch.nan
    y = layer(x, mask=mask)
    assert y.isnan().sum() == C
    torch.testing.assert_close(layer.state_dict(), clean.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32], ids=str)
def test_a_mask_of_ones_changes_nothing(dtype):
    x = torch.randn(4, C, 3)
    ones = torch.ones(4, 3, dtype=dtype)
    expected = functional.sync_batch_norm(x)
    torch.testing.assert_close(functional.sync_batch_norm(x, mask=ones), expected, rtol=1e-6, atol=1e-6)


def test_whole_weights_equal_repeated_samples():
    x, repeats = torch.randn(3, C, dtype=torch.float64), torch.tensor([1, 3, 2])
    weighted, repeated = (syncbn.SyncBatchNorm(C, dtype=torch.float64) for _ in range(2))
    y = weighted(x, mask=repeats)
    torch.testing.assert_close(y.repeat_interleave(repeats, 0), repeated(x.repeat_interleave(repeats, 0)))
    torch.testing.assert_close(weighted.state_dict(), repeated.state_dict())


def test_what_is_masked_out_is_normalised_like_the_rest():
    x = torch.randn(5, C)
    mask = torch.tensor([1, 1, 1, 0, 0]).bool()
    y = functional.sync_batch_norm(x, mask=mask)
    kept = x[mask].double()
    expected = (x.double() - kept.mean(0)) / (kept.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y, expected.float())


def test_in_eval_a_mask_changes_nothing():
    layer, x = syncbn.SyncBatchNorm(C), torch.randn(4, C, 3)
    layer(x)
    layer.eval()
    assert torch.equal(layer(x, mask=torch.zeros(4, 3)), layer(x))


def test_a_mask_under_no_grad_gives_no_graph():
    with torch.no_grad():
        y = functional.sync_batch_norm(torch.randn(4, C), mask=torch.ones(4))
    assert not y.requires_grad


NUMBERS = (1, 7, moments.LIMIT - 1, 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_kernels_with_and_without_a_mask_pack_the_same_wire(dtype):
    x = torch.randn(4, C, 3)
    status = Status(grad_enabled=1.0, needs_grad=1.0, float32=1.0)
    theirs = kernels.choose(x).local_moments(x, None, NUMBERS, status)
    for mask in (None, torch.ones(4, 1, 3, dtype=dtype)):
        torch.testing.assert_close(TorchKernels().local_moments(x, mask, NUMBERS, status), theirs, rtol=1e-15, atol=0)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, -torch.inf])
def test_a_mask_of_wrong_values_travels_as_a_fault_and_is_refused(value):
    x, mask = torch.randn(4, C, 3), torch.ones(4, 3)
    mask[1, 2] = value
    wire = TorchKernels().local_moments(x, mask.unsqueeze(1), NUMBERS, Status(float32=1.0))
    assert moments.read_counters(wire, NUMBERS).status == Status(faults=1.0, float32=1.0)
    layer = syncbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="On rank 0: SyncBatchNorm needs finite mask values >= 0; received values"):
        layer(x, mask=mask)
    assert layer.num_batches_tracked == 0


def sent_by(monkeypatch, work):
    """The lengths of the wires that some work sends."""
    sent, send = [], SingleTransport.all_reduce
    with monkeypatch.context() as patch:
        patch.setattr(SingleTransport, "all_reduce", lambda self, wire: sent.append(wire.numel()) or send(self, wire))
        work()
    return sent


@pytest.mark.parametrize("mask", [None, "booleans", "weights"])
def test_create_graph_sends_what_an_ordinary_backward_sends(monkeypatch, mask):
    """So ranks that want a second derivative and ranks that do not meet in the first."""
    x, weight, bias = inputs()
    y = call(x, weight, bias, MASKS[mask] if mask else None)
    tensors, grad_y = (x, weight, bias), torch.randn_like(y)
    gradients = {}

    def first(create_graph):
        gradients[create_graph] = torch.autograd.grad(y, tensors, grad_y, retain_graph=True, create_graph=create_graph)

    forward, backward = [2 * C + 15], [2 * C + 7]
    assert sent_by(monkeypatch, lambda: call(x, weight, bias, MASKS[mask] if mask else None)) == forward
    assert sent_by(monkeypatch, lambda: first(False)) == backward
    assert sent_by(monkeypatch, lambda: first(True)) == backward
    second = gradients[True][0].square().sum()
    assert sent_by(monkeypatch, lambda: torch.autograd.grad(second, (x, weight))) == 2 * backward


def test_both_derivatives_are_of_one_forward_whichever_came_first():
    """Backward with and without create_graph, in either order, from one graph."""
    x, weight, bias = inputs()
    y = call(x, weight, bias).pow(3).sum()
    found = [torch.autograd.grad(y, x, retain_graph=True, create_graph=c)[0].detach() for c in (True, False, True)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)
