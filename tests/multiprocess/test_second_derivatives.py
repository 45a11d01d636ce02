# SPDX-License-Identifier: BSD-3-Clause
"""A gradient penalty over ranks is that of one process: every parameter, any split, and every rank joins."""

import pytest
import torch
from torch import nn

import syncbn
from syncbn import functional
from tests.multiprocess import batches, test_collectives
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C, settled

pytestmark = pytest.mark.ranks(1)
counting = test_collectives.counting


def critic(norm):
    torch.manual_seed(3)
    layers = [nn.Conv1d(2, 4, 3, padding=1), norm(4), nn.Tanh(), nn.Conv1d(4, 5, 3, padding=1), norm(5), nn.Softplus()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 6, 1)).double()


def gradients_of_penalty(model, x, total):
    """The critic's mean score and its gradient penalty, each sample weighted as in the whole batch."""
    x = x.clone().requires_grad_()
    scores = model(x)
    (slope,) = torch.autograd.grad(scores.square().sum() + scores.sum(), x, create_graph=True)
    loss = (scores.sum() + 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).sum()) / total
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, x.grad


@pytest.mark.parametrize("shares", batches.SHARES)
def test_a_gradient_penalty_equals_one_process(ranks, rng, shares):
    sizes = batches.SHARES[shares](ranks.size)
    x = torch.randn(sum(sizes), 2, 6, generator=rng, dtype=torch.float64)
    mine = ranks.shares(sizes)[ranks.rank]
    expected, expected_x = gradients_of_penalty(critic(nn.BatchNorm1d), x, len(x))
    local, grad_x = gradients_of_penalty(critic(syncbn.SyncBatchNorm), x[mine], len(x))
    ranks.check_close(grad_x, expected_x[mine], 1e-10, "x")
    for name, gradient in local.items():  # local parts, as everywhere
        summed = ranks.transport.all_reduce(gradient.clone())
        ranks.check_close(summed, expected[name], 1e-10, name)


@pytest.mark.ranks(2)
def test_the_unsynchronised_penalty_differs(ranks, rng):
    """The negative control: the comparison above can fail."""
    x = torch.randn(2 * ranks.size, 2, 6, generator=rng, dtype=torch.float64)
    mine = ranks.shares(total=len(x))[ranks.rank]
    expected, _ = gradients_of_penalty(critic(nn.BatchNorm1d), x, len(x))
    local, _ = gradients_of_penalty(critic(nn.BatchNorm1d), x[mine], len(x))
    summed = ranks.transport.all_reduce(local["0.weight"].clone())
    ranks.check((summed - expected["0.weight"]).abs().max() > 1e-2, "the first weight")


class Sum(torch.autograd.Function):
    """The sum over the ranks of what each holds; its adjoint is a copy for each."""

    @staticmethod
    def forward(ctx, transport, values):
        ctx.transport = transport
        ctx.set_materialize_grads(False)  # autograd runs a node without a gradient on another thread than a GPU's
        return transport.all_reduce(values.clone())

    @staticmethod
    def backward(ctx, grad):
        return None, None if grad is None else Copies.apply(ctx.transport, grad)


class Copies(torch.autograd.Function):
    """One value, used on every rank; its adjoint is the sum."""

    @staticmethod
    def forward(ctx, transport, values):
        ctx.transport = transport
        ctx.set_materialize_grads(False)  # autograd runs a node without a gradient on another thread than a GPU's
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None if grad is None else Sum.apply(ctx.transport, grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shares", ["uneven", "an empty rank"])
def test_gradgradcheck_over_the_ranks(ranks, rng, shares, masked):
    """The whole batch, moved by finite differences on all ranks alike; x, weight and bias."""
    sizes = batches.SHARES[shares](ranks.size)
    mine = ranks.shares(sizes)[ranks.rank]
    x = torch.randn(sum(sizes), 2, 2, generator=rng, dtype=torch.float64)
    mask = torch.rand(sum(sizes), 2, generator=rng) + 0.5 if masked else None
    parameters = torch.rand(2, 2, generator=rng, dtype=torch.float64) + 0.5

    def layer(x, weight, bias):
        share, weight, bias = (Copies.apply(ranks.transport, t) for t in (x, weight, bias))
        own = None if mask is None else mask[mine]
        y = functional.sync_batch_norm(share[mine], weight=weight, bias=bias, mask=own)
        whole = torch.cat((torch.zeros_like(x[: mine.start]), y, torch.zeros_like(x[mine.stop :])))
        return Sum.apply(ranks.transport, whole)

    inputs = [t.clone().requires_grad_() for t in (x, *parameters)]
    torch.manual_seed(0)  # the directions that the check draws are those of every rank
    ranks.check(torch.autograd.gradcheck(layer, inputs, raise_exception=False), "first")
    torch.manual_seed(0)
    ranks.check(torch.autograd.gradgradcheck(layer, inputs, raise_exception=False), "second")


def test_create_graph_sends_what_backward_sends(ranks, counting):
    """So a rank that keeps the graph and one that does not still meet."""
    layer = settled(counting)
    x = torch.randn(3, C, requires_grad=True)
    create_graph = ranks.rank == 0
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=create_graph)
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")
    ranks.check(grad.requires_grad == create_graph)


def test_a_second_derivative_makes_three_collectives_of_the_size_of_backward(ranks, counting):
    layer = settled(counting)
    n = batches.SHARES["an empty rank"](ranks.size)[ranks.rank]
    x = torch.randn(n, C, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    ranks.check(counting.sent == [FORWARD, *[BACKWARD] * 4], f"{counting.sent}")


@pytest.mark.parametrize("of", ["weight", "x"])
def test_a_rank_whose_input_needs_no_gradient_joins_the_second_derivative(ranks, counting, of):
    """Both collectives hang on an anchor, not on what requires a gradient on this rank."""
    layer = settled(counting, affine=of == "weight")
    x = torch.randn(3, C, requires_grad=of == "x" or ranks.rank == ranks.size - 1)
    loss = (layer(x) * torch.arange(float(C))).sum()
    first = torch.autograd.grad(loss, x if of == "x" else layer.weight, create_graph=True)[0]
    first.square().sum().backward()
    again = [BACKWARD] * (2 if of == "x" else 1)  # the gradient of weight is local: only the statistics are not
    ranks.check(counting.sent == [FORWARD, BACKWARD, *again], f"{counting.sent}")
