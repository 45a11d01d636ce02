# SPDX-License-Identifier: BSD-3-Clause
"""Ranks that make different numbers of steps: nobody hangs, and the result is one process's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.conftest import DEVICE
from tests.multiprocess.joined import batch, loss, network

pytestmark = [
    pytest.mark.ranks(1),
    pytest.mark.filterwarnings("ignore:.*does not match bucket view strides.*"),
    pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning"),
]


STEPS = {
    "rising": lambda W: [2 * r + 1 for r in range(W)],
    "falling": lambda W: [2 * (W - r) for r in range(W)],
    "none on rank 0": lambda W: [0] + [3] * (W - 1) if W > 1 else [2],
    "none but on the last": lambda W: [0] * (W - 1) + [3],
    "equal": lambda W: [3] * W,
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def one_process(steps):
    """What the ranks that still train do in each step, in one process on all of their samples."""
    model = network()
    optimizer = sgd(model)
    for step in range(max(steps)):
        x = torch.cat([batch(step, rank) for rank, own in enumerate(steps) if step < own])
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    return model


def check_equal_to_one_process(ranks, model, steps):
    for (name, ours), theirs in zip(model.state_dict().items(), one_process(steps).state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_plain_model_ends_as_in_one_process(ranks, world, steps, set_to_none):
    steps = STEPS[steps](ranks.size)
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = sgd(model)
    with syncbn.join(model):
        for step in range(steps[ranks.rank]):
            x = batch(step, ranks.rank)
            optimizer.zero_grad(set_to_none=set_to_none)
            (loss(model, x) * world.loss_scale(len(x))).backward()
            world.average_gradients(model)
            optimizer.step()
    check_equal_to_one_process(ranks, model, steps)
    ranks.check(model.training)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("options", [{}, {"broadcast_buffers": False}, {"static_graph": True}], ids=str)
def test_ddp_ends_as_in_one_process(ranks, torch_world, world, steps, options):
    steps = STEPS[steps](ranks.size)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network()), **options)
    optimizer = sgd(model)
    with syncbn.join(model):
        for step in range(steps[ranks.rank]):
            x = batch(step, ranks.rank)
            optimizer.zero_grad()
            (loss(model, x) * world.loss_scale(len(x))).backward()
            optimizer.step()
    check_equal_to_one_process(ranks, model.module, steps)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("no_sync", [True, False])
def test_gradients_summed_over_two_batches_are_those_of_one_process(ranks, torch_world, world, wrapped, no_sync):
    """Rank 0 runs out between the two: what it has summed counts."""
    batches = [3 if ranks.rank == 0 else 4 + 2 * ranks.rank][0]
    whole = network()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(whole))
    used = DistributedDataParallel(model) if wrapped else model
    optimizers = sgd(whole), sgd(model)
    with syncbn.join(used):
        for step in range(batches):
            x = batch(step, ranks.rank)
            if step % 2 == 0:
                optimizers[1].zero_grad()
            scaled = world.loss_scale(len(x))
            if wrapped and no_sync and step % 2 == 0:
                with used.no_sync():
                    (loss(used, x) * scaled).backward()
            else:
                (loss(used, x) * scaled).backward()
            if step % 2:
                if not wrapped:
                    world.average_gradients(model)
                optimizers[1].step()
    for step in range(4 + 2 * (ranks.size - 1) if ranks.size > 1 else 3):
        counts = [3 if r == 0 else 4 + 2 * r for r in range(ranks.size)]
        x = torch.cat([batch(step, r) for r, own in enumerate(counts) if step < own])
        if step % 2 == 0:
            optimizers[0].zero_grad()
        loss(whole, x).backward()
        if step % 2:
            optimizers[0].step()
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


class TwoHeads(nn.Module):
    """Two outputs in a dict, one of which a loss may leave out, and a layer of its own in each branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4)

    def forward(self, x, *, scale=1.0):
        x = self.stem(x)
        return {"a": self.a(x) * scale, "b": [self.b(x.tanh())]}


@pytest.mark.parametrize("used", ["a", "b", "both", "twice"])
def test_only_the_outputs_that_a_loss_uses_go_backward(ranks, world, used):
    torch.manual_seed(0)
    model = TwoHeads()
    with syncbn.join(model):
        for step in range(1 + ranks.rank):
            x = torch.randn(3, 4, generator=torch.Generator(DEVICE).manual_seed(step))
            out = model(x, scale=2.0)
            if used in ("a", "both", "twice"):
                out["a"].pow(3).mean().backward(retain_graph=True)
            if used in ("b", "twice"):
                out["b"][0].relu_().pow(3).mean().backward(retain_graph=True)
            if used == "both":
                (out["a"] * out["b"][0]).mean().backward()
            world.average_gradients(model)
    ranks.check(model.a.num_batches_tracked == ranks.size, f"{model.a.num_batches_tracked}")


def test_forwards_without_gradients_and_in_eval_and_checkpointed_parts(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    with syncbn.join(model):
        for step in range(ranks.size - ranks.rank):
            x = batch(step, ranks.rank)
            with torch.no_grad():
                model(x)
            model.eval()
            model(x)
            model.train()
            checkpoint(model, x, use_reentrant=False).square().mean().backward()
            world.average_gradients(model)
    ranks.check(model[1].num_batches_tracked == 2 * ranks.size, f"{model[1].num_batches_tracked}")


def test_it_may_be_entered_again(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    for epoch in range(3):
        with syncbn.join(model):
            for step in range(1 + (ranks.rank + epoch) % ranks.size):
                loss(model, batch(step, ranks.rank)).backward()
                world.average_gradients(model)
                model.zero_grad()
    ranks.check(model[1].num_batches_tracked == 3 * ranks.size)
    loss(model, batch(0, ranks.rank)).backward()  # and nothing of it remains
    ranks.check(len(model._forward_hooks) == len(model._forward_pre_hooks) == 0)
