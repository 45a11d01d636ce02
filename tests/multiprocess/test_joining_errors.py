# SPDX-License-Identifier: BSD-3-Clause
"""What join refuses, and how an error inside it ends on every rank."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.training.join import joining
from syncbn.transports import announcing
from tests.multiprocess.joined import batch, loss, network

pytestmark = pytest.mark.ranks(1)


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
