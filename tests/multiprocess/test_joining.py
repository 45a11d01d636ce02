# SPDX-License-Identifier: BSD-3-Clause
"""Ranks that make different numbers of steps: nobody hangs, and the result is one process's."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.training.join import joining
from syncbn.transports import announcing
from tests.conftest import DEVICE

pytestmark = [
    pytest.mark.ranks(1),
    pytest.mark.filterwarnings("ignore:.*does not match bucket view strides.*"),
    pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning"),
]


@pytest.fixture
def world(ranks):
    """Made now: tests before this one may have connected everyone anew."""
    return syncbn.init(device=DEVICE)


STEPS = {
    "rising": lambda W: [2 * r + 1 for r in range(W)],
    "falling": lambda W: [2 * (W - r) for r in range(W)],
    "none on rank 0": lambda W: [0] + [3] * (W - 1) if W > 1 else [2],
    "none but on the last": lambda W: [0] * (W - 1) + [3],
    "equal": lambda W: [3] * W,
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
    ).double()


def batch(step, rank):
    """Shares of different sizes."""
    rng = torch.Generator(DEVICE).manual_seed(100 * step + rank)
    return torch.randn(2 + (step + rank) % 3, 2, 7, 6, generator=rng, dtype=torch.float64)


def loss(model, x):
    return (model(x) - x.flatten(1)[:, :18]).square().mean()


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


@pytest.mark.ranks(2)
def test_another_call_on_one_rank_is_an_error_on_all(ranks):
    model = syncbn.convert_sync_batchnorm(network())

    def loop():
        with syncbn.join(model):
            out = model(batch(0, ranks.rank))
            if ranks.rank == 0:
                model(batch(1, ranks.rank))
            else:
                out.mean().backward()

    ranks.raises(RuntimeError, loop, "the same calls in the same order", "forward 1", "backward 0", "on rank 0")


@pytest.mark.ranks(2)
def test_an_exception_between_two_steps_ends_all_ranks(ranks):
    model = syncbn.convert_sync_batchnorm(network())
    last = ranks.size - 1

    def loop():
        with syncbn.join(model):
            for step in range(1 if ranks.rank == 0 and last > 1 else 5):  # of three ranks, the first has finished
                if ranks.rank == last and step == 2:
                    raise KeyError("a broken file")
                loss(model, batch(step, ranks.rank)).backward()

    try:
        loop()
    except (RuntimeError, KeyError) as error:
        text = f"{type(error).__name__} {error}"
    else:
        text = "nothing"
    alone = ranks.rank == last
    ok = text == "KeyError 'a broken file'" if alone else "left syncbn.join with KeyError('a broken file')" in text
    ranks.check(ok, text)
    ranks.check(alone or f"On rank {last}" in text, text)


@pytest.mark.immediate_errors
@pytest.mark.ranks(2)
def test_an_error_that_all_ranks_share_stays_theirs(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())

    def refused():
        with syncbn.join(model):
            world.raise_together(ValueError("no disk") if ranks.rank else None)

    ranks.raises(ValueError, refused, "no disk")

    layer = syncbn.SyncBatchNorm(2)

    def wrong_input():
        with syncbn.join(layer):
            for step in range(1 + ranks.rank):  # the first rank has finished where the last one errs
                x = torch.randn(4, 2)
                layer(x if step < ranks.size - 1 else x[:, :1])

    ranks.raises(ValueError, wrong_input, f"On rank {ranks.size - 1}", "input.size(1) == num_features")


@pytest.mark.ranks(2)
def test_it_throws_on_early_termination_where_that_is_asked(ranks):
    model = syncbn.convert_sync_batchnorm(network())

    def loop():
        with syncbn.join(model, throw_on_early_termination=True):
            for step in range(1 + ranks.rank):
                loss(model, batch(step, ranks.rank)).backward()

    ranks.raises(RuntimeError, loop, "needs the same number of steps on every rank", "1 of ")
    with syncbn.join(model, throw_on_early_termination=True):
        loss(model, batch(0, ranks.rank)).backward()


@pytest.mark.ranks(2)
def test_another_option_on_one_rank_is_an_error_on_all(ranks):
    model = syncbn.convert_sync_batchnorm(network())
    ranks.raises(
        ValueError,
        lambda: syncbn.join(model, throw_on_early_termination=ranks.rank == 0).__enter__(),
        "the same throw_on_early_termination on every rank",
    )


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(2)

    def forward(self, x):
        return self.norm(x).view(x.size(0), -1)


@pytest.mark.ranks(2)
def test_a_model_that_fails_on_an_empty_share_is_refused_at_the_first_forward(ranks):
    model = Views()

    def loop():
        with syncbn.join(model):
            for _ in range(ranks.rank):
                model(torch.randn(2, 2, 3, 3))

    ranks.raises(ValueError, loop, "a model that takes an empty local batch", "x.flatten(1)", "cannot reshape")
    ranks.check(model.norm.training)


@pytest.mark.ranks(2)
def test_an_empty_share_may_be_made_by_hand(ranks):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm(3)

        def forward(self, x, table):
            return self.norm(x @ table)

    model, table = Table(), torch.eye(3)
    with syncbn.join(model, empty=lambda args, kwargs: ((args[0][:0], args[1]), kwargs)):
        for _ in range(ranks.rank):
            model(torch.randn(2, 3), table).mean().backward()
    ranks.check(model.norm.num_batches_tracked == ranks.size - 1)


def test_a_second_join_inside_is_refused(ranks):
    model = syncbn.convert_sync_batchnorm(network())
    with syncbn.join(model):
        ranks.raises(RuntimeError, lambda: syncbn.join(model).__enter__(), "the only one that is open")


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(3)

    def forward(self, x):
        return str(self.norm(x).shape)


def test_an_output_without_a_tensor_is_refused(ranks):
    def loop():
        model = Silent()
        with syncbn.join(model):
            model(torch.randn(3, 3))

    ranks.raises(TypeError, loop, "needs 1 to 24 tensors in the output", "0 in str")


def test_a_backward_that_comes_too_late_is_refused(ranks):
    model = syncbn.SyncBatchNorm(2)

    def loop():
        with syncbn.join(model):
            first = model(torch.randn(4, 2))
            for _ in range(joining.KEPT + 1):
                model(torch.randn(4, 2))
            first.mean().backward()

    ranks.raises(RuntimeError, loop, "within the next 64 forwards", "Call backward earlier")


def test_a_rank_that_leaves_before_its_backward_is_told(ranks, monkeypatch):
    """On that rank alone: the others are in backward by then."""
    heard = announcing.Outcome("backward", 7, 1, False, False, 1)
    monkeypatch.setattr(announcing, "announce", lambda said, transport: heard)

    def loop():
        with syncbn.join(syncbn.SyncBatchNorm(2)):
            pass

    ranks.raises(RuntimeError, loop, "the backward of forward 7", "before the forward")


@pytest.mark.ranks(2)
def test_a_world_of_other_connections_is_refused(ranks, world):
    model = syncbn.SyncBatchNorm(2)
    other = dataclasses.replace(world, transport=world.transport.split(0))

    def loop():
        with syncbn.join(model):
            other.average_gradients(model)

    ranks.raises(RuntimeError, loop, "needs a World that connects everyone as the layers are")


@pytest.mark.parametrize("around", [True, False])
def test_a_reentrant_checkpoint_is_for_parts_of_the_model(ranks, around):
    model = syncbn.convert_sync_batchnorm(network())
    x = batch(0, ranks.rank).requires_grad_()

    def loop():
        with syncbn.join(model):
            checkpoint(model, x, use_reentrant=around).mean().backward()

    if around:
        ranks.raises(RuntimeError, loop, "needs to see the backward of the model", "use_reentrant=False")
    else:
        loop()
