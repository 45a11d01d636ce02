# SPDX-License-Identifier: BSD-3-Clause
"""Networks of model libraries, converted: uneven local batches give what the whole batch gives in one process."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from tests.zoo.networks import CASES

pytestmark = [pytest.mark.ranks(2), pytest.mark.filterwarnings("ignore")]  # of libraries, about themselves

TOLERANCE = 1e-9
"""Relative to the largest value: float64 rounding, which tens of layers and small variances amplify."""
APART = 1e-2
"""What the unsynchronised network differs by at least, so that the comparison above means something."""


def network(case, rng):
    """The same on every rank. Scales are random: some libraries start with zeros, which stop the gradient."""
    torch.manual_seed(0)
    model = case.build().double().train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5, generator=rng)
            torch.nn.init.normal_(layer.bias, generator=rng)
    return model


def step(case, model, samples, upstream):
    """Forward and backward; ``upstream`` makes the gradient of an output."""
    x, *others = case.collate(samples)
    x.requires_grad_()
    y = case.call(model, (x, *others))
    grad_y = upstream(y)
    y.backward(grad_y)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return SimpleNamespace(y=y.detach(), grad_y=grad_y, grad_x=x.grad, parameters=gradients)


def rows(case, samples, part):
    """The rows of inputs and outputs that belong to a part of the samples: of graphs, one for each node."""
    start = len(case.collate(samples[: part.start])[0]) if part.start else 0
    return slice(start, start + len(case.collate(samples[part])[0]))


def gap(actual, expected):
    """The largest difference, relative to the largest expected value."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", CASES)
def test_uneven_local_batches_equal_one_process(ranks, rng, name):
    case, sizes = CASES[name], [rank + 1 for rank in range(ranks.size)]
    part = ranks.shares(sizes)[ranks.rank]
    whole = network(case, rng)
    model, local = syncbn.convert_sync_batchnorm(copy.deepcopy(whole)), copy.deepcopy(whole)

    samples = case.samples(rng, sum(sizes))
    wanted = step(case, whole, samples, lambda y: torch.randn(y.shape, generator=rng, dtype=y.dtype))
    mine = rows(case, samples, part)
    got = step(case, model, samples[part], lambda y: wanted.grad_y[mine])
    two = slice(0, 2)  # torch's layers refuse one image where the network has made a single pixel of it
    with torch.no_grad():
        unsynchronised = gap(case.call(local, case.collate(samples[two])), wanted.y[rows(case, samples, two)])

    flat = [torch.cat([grad.flatten() for grad in each.parameters.values()]) for each in (got, wanted)]
    gaps = {
        "output": gap(got.y, wanted.y[mine]),
        "input gradient": gap(got.grad_x, wanted.grad_x[mine]),
        "parameter gradients": gap(ranks.transport.all_reduce(flat[0]), flat[1]),
    }
    expected = whole.state_dict()
    for key, value in model.state_dict().items():
        kind = key.rpartition(".")[2]
        if "running" in kind or "tracked" in kind:
            gaps[kind] = max(gaps.get(kind, 0.0), gap(value.double(), expected[key].double()))
    ranks.check(gaps.keys() > {"running_mean", "running_var"}, "statistics were compared")
    ranks.check(max(gaps.values()) <= TOLERANCE, f"{gaps}")
    ranks.check(unsynchronised > APART, "the unsynchronised network gives another output")
