# SPDX-License-Identifier: BSD-3-Clause
"""Batch renormalization over all ranks is its definition over the global batch; with limits of (1, 0), batch norm."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.calls import renorm
from tests.calls.test_compile import compiled
from tests.multiprocess import batches
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C, counting, settled  # noqa: F401

pytestmark = pytest.mark.ranks(1)


def definition(batch, mean, var, limits, *, momentum=0.1, eps=1e-5):
    """Algorithm 1 of the paper in float64, differentiated by autograd with r and d held constant."""
    r_max, d_max = limits
    x = batch.x.double().requires_grad_()
    weight, bias = (p.double().requires_grad_() for p in (batch.weight, batch.bias))
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    batch_mean, batch_var = x.mean(dims), x.var(dims, correction=0)
    std, running_std = (batch_var + eps).sqrt(), (var.double() + eps).sqrt()
    r = (std / running_std).clamp(1 / r_max, r_max).detach()
    d = ((batch_mean - mean.double()) / running_std).clamp(-d_max, d_max).detach()
    xhat = (x - batch_mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)
    y = xhat * weight.view(shape) + bias.view(shape)
    y.backward(batch.grad_y.double())
    n = x.numel() / x.size(1)
    return SimpleNamespace(
        y=y.detach(), grad_x=x.grad, grad_weight=weight.grad, grad_bias=bias.grad, r=r, d=d,
        var=(1 - momentum) * var.double() + momentum * batch_var.detach() * n / (n - 1),
    )  # fmt: skip


def layer_with(batch, limits, **options):
    """A layer some way from the batch, so that some channels are at the limits and some are not."""
    layer = batches.ours(batch, renorm_limits=limits, **options)
    layer.running_mean.copy_(torch.linspace(-1.0, 2.0, 5))
    layer.running_var.copy_(torch.linspace(0.5, 9.0, 5))
    return layer


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.3, 0.4), (3.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_its_definition_over_the_global_batch(ranks, rng, limits, dtype):
    sizes = [r + 1 for r in range(ranks.size)]
    batch = batches.make((sum(sizes), 5, 4), rng, dtype)
    layer = layer_with(batch, limits)
    exact = definition(batch, layer.running_mean.clone(), layer.running_var.clone(), limits)
    mine = ranks.shares(sizes)[ranks.rank]
    got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
    tolerance = 2e-5  # weight, bias and buffers are float32
    ranks.check_close(got.y, exact.y[mine], tolerance, "y")
    ranks.check_close(got.grad_x, exact.grad_x[mine], tolerance, "grad_x")
    ranks.check_close(got.var, exact.var, tolerance, "running_var")
    gradients = ranks.transport.all_reduce(torch.cat((layer.weight.grad, layer.bias.grad)).double())
    ranks.check_close(gradients, torch.cat((exact.grad_weight, exact.grad_bias)), 10 * tolerance, "summed over ranks")
    if limits == (1.3, 0.4):
        held = ((exact.r > 1 / 1.3) & (exact.r < 1.3)).sum() + (exact.d.abs() < 0.4).sum()
        ranks.check(0 < held < 10, "some channels are at the limits and some are not")


def test_limits_of_one_and_zero_are_batch_norm_to_the_bit(ranks, rng):
    batch = batches.make((3 * ranks.size, 5, 4), rng)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    plain, renormed = (
        batches.run(layer_with(batch, limits), batch.x[mine], batch.grad_y[mine]) for limits in (None, (1, 0))
    )
    for name in ("y", "grad_x", "mean", "var"):
        ranks.check_equal(getattr(renormed, name), getattr(plain, name), name)
    other = batches.run(layer_with(batch, (3, 5)), batch.x[mine], batch.grad_y[mine])
    ranks.check((other.y - plain.y).abs().max() > 0.1, "and wider limits are not")


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_without_weight_or_bias(ranks, rng, options):
    batch = batches.make((2 * ranks.size, 5, 4), rng)
    batch.weight, batch.bias = torch.ones(5), torch.zeros(5)
    layer = syncbn.SyncBatchNorm(5, renorm_limits=(1.3, 0.4), **options)
    exact = definition(batch, torch.zeros(5), torch.ones(5), (1.3, 0.4))
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
    ranks.check_close(got.y, exact.y[mine], 1e-5, "y")
    ranks.check_close(got.grad_x, exact.grad_x[mine], 1e-5, "grad_x")


def test_it_makes_the_collectives_of_batch_norm_also_with_an_empty_share(ranks, counting):  # noqa: F811
    layer = settled(counting, renorm_limits=(3, 5))
    x = torch.randn(0 if ranks.rank == 0 and ranks.size > 1 else 3, C, requires_grad=True)
    layer(x).sum().backward()
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")
    ranks.check(layer(torch.empty(0, C)).shape == (0, C), "no rank has a sample")


def test_limits_may_change_as_training_goes_on(ranks, rng):
    batch = batches.make((2 * ranks.size, 5, 4), rng)
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    layer, wide = layer_with(batch, (1, 0)), layer_with(batch, (3, 5))
    layer.renorm_limits = (3, 5)
    ranks.check(layer.renorm_limits == renorm.RenormLimits(3.0, 5.0))
    ranks.check_equal(layer(batch.x[mine]), wide(batch.x[mine]))
    layer.renorm_limits = None
    ranks.check(layer.renorm_limits is None)


def test_eval_is_that_of_batch_norm(ranks, rng):
    batch = batches.make((4, 5, 4), rng)
    plain, renormed = (layer_with(batch, limits).eval() for limits in (None, (3, 5)))
    ranks.check_equal(renormed(batch.x), plain(batch.x))


@pytest.mark.ranks(2)
def test_other_limits_on_one_rank_are_one_error(ranks):
    layer = syncbn.SyncBatchNorm(5, renorm_limits=(2, 5) if ranks.rank == 1 else None)
    ranks.raises(ValueError, lambda: layer(torch.randn(3, 5)), "same r_max on every rank", "1 on rank", "2 on rank 1")


@pytest.mark.parametrize("bad", [(0.5, 0), (2, -1), (float("nan"), 0)])
def test_useless_limits_are_refused(ranks, bad):
    ranks.raises(
        ValueError, lambda: syncbn.SyncBatchNorm(3, renorm_limits=bad), "r_max >= 1 and d_max >= 0", "received"
    )
    ranks.raises(
        ValueError,
        lambda: syncbn.SyncBatchNorm(3, track_running_stats=False, renorm_limits=(3, 5)),
        "needs track_running_stats=True",
    )


def _masked(layer, x):
    return layer(x, mask=torch.ones(len(x), 4, dtype=torch.bool))


def _checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def _checkpointed_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def _checkpointed_and_masked(layer, x):
    return checkpoint(_masked, layer, x, use_reentrant=False)


def _compiled(layer, x):
    return compiled(layer)(x)


WAYS = [_masked, _checkpointed, _checkpointed_reentrant, _checkpointed_and_masked, _compiled]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_every_way_through_the_layer_is_renormalized(ranks, rng, way):
    batch = batches.make((3 * ranks.size, 5, 4), rng, torch.float64)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    results = []
    for run in (lambda layer, x: layer(x), way):
        layer, x = layer_with(batch, (1.3, 0.4)), batch.x[mine].clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own compiler has some
            y = run(layer, x)
        y.backward(batch.grad_y[mine])
        results.append((y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var))
    for plain, other in zip(*results, strict=True):
        ranks.check_close(other, plain, 1e-6, way.__name__)


def test_second_derivatives_hold_the_correction_constant(ranks, rng):
    batch = batches.make((3 * ranks.size, 5, 4), rng, torch.float64)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    once = layer_with(batch, (1.3, 0.4)).double()
    twice = copy.deepcopy(once)
    x, again = (batch.x[mine].clone().requires_grad_() for _ in range(2))
    once(x).backward(batch.grad_y[mine])
    y = twice(again)
    got = torch.autograd.grad(y, (again, twice.weight, twice.bias), batch.grad_y[mine], create_graph=True)
    for found, expected in zip(got, (x.grad, once.weight.grad, once.bias.grad), strict=True):
        ranks.check_close(found, expected, 1e-12)
    penalty = torch.autograd.grad(got[0].square().sum(), again)[0]
    # The same with r and d as they were, written as batch norm with another weight.
    exact = definition_of_penalty(batch, once)
    ranks.check_close(penalty, exact[mine], 1e-9)


def definition_of_penalty(batch, layer):
    """The gradient of the squared gradient of the input, over the global batch in one process."""
    mean, var = torch.linspace(-1.0, 2.0, 5), torch.linspace(0.5, 9.0, 5)
    r = definition(batch, mean, var, (1.3, 0.4)).r
    x = batch.x.double().requires_grad_()
    weight = (r * layer.weight.detach()).double()
    y = torch.nn.functional.batch_norm(x, None, None, weight, None, True)
    (grad_x,) = torch.autograd.grad(y, x, batch.grad_y.double(), create_graph=True)
    return torch.autograd.grad(grad_x.square().sum(), x)[0]
