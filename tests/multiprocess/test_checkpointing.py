# SPDX-License-Identifier: BSD-3-Clause
"""Activation checkpointing: exact gradients, statistics that move once, and no collective in the repeated forward."""

import copy
import functools
import gc
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import syncbn
from syncbn.calls import checkpointing
from tests.conftest import DEVICE
from tests.multiprocess import batches
from tests.multiprocess.test_collectives import CountingTransport

pytestmark = [
    pytest.mark.ranks(1),
    # torch's own, of a reentrant checkpoint within one: its first forward runs under no_grad
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

C = 8  # no wire has the length of the settings of 2, 3 or 4 ranks
FORWARD, BACKWARD = 2 * C + 15, 2 * C + 7


def save_mm(_, op, *__, **___):
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def save_all(*_, **__):
    return CheckpointPolicy.MUST_SAVE


def selective(policy):
    return functools.partial(
        checkpoint, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


def nested(outer, inner):
    return lambda model, x: checkpoint(
        lambda x: checkpoint(model[2:], checkpoint(model[:2], x, use_reentrant=inner), use_reentrant=inner),
        x,
        use_reentrant=outer,
    )


WAYS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "to the end": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "selective": selective(save_mm),
    "all saved": selective(save_all),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=True),
    "nested": nested(outer=False, inner=False),
    "nested, reentrant": nested(outer=True, inner=True),
    "reentrant outside": nested(outer=True, inner=False),
    "reentrant inside": nested(outer=False, inner=True),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(C, C), syncbn.SyncBatchNorm(C), nn.Tanh(), nn.Linear(C, C), syncbn.SyncBatchNorm(C), nn.Tanh()
    ).double()


@pytest.fixture
def counting(ranks, monkeypatch):
    transport = CountingTransport(ranks.transport)
    monkeypatch.setattr("syncbn.transports.choose", lambda *_: transport)
    return transport


def share(ranks, rng, sizes):
    x = torch.randn(sum(sizes), C, generator=rng, dtype=torch.float64)
    return x[ranks.shares(sizes)[ranks.rank]].clone().requires_grad_()


@pytest.mark.parametrize("shares", batches.SHARES)
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpointed_step_is_the_plain_one_and_sends_no_more(ranks, counting, rng, way, shares):
    plain = network()
    model = copy.deepcopy(plain)
    for step in range(3):
        x = share(ranks, rng, batches.SHARES[shares](ranks.size))
        again = x.detach().clone().requires_grad_()
        plain(x).square().sum().backward()
        counting.sent.clear()
        WAYS[way](model, again).square().sum().backward()
        sent = [numel for numel, _ in counting.sent if numel in (FORWARD, BACKWARD)]
        ranks.check(sent == [FORWARD, FORWARD, BACKWARD, BACKWARD], f"{way}, step {step}: {counting.sent}")
        ranks.check_equal(again.grad, x.grad, f"{way}, step {step}, the input's gradient")
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        ranks.check_equal(ours, theirs, name)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        ranks.check_equal(ours.grad, theirs.grad, f"gradient of {name}")
    ranks.check(model[1].num_batches_tracked == 3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_several_forwards_before_their_backwards_find_their_own_statistics(ranks, counting, rng, reentrant):
    """As in a pipeline, and with one layer in two places."""
    plain = network()
    model = copy.deepcopy(plain)
    parts = [share(ranks, rng, [3] * ranks.size) for _ in range(4)]
    sum(plain(plain(x)).square().sum() for x in parts).backward()
    again = [x.detach().clone().requires_grad_() for x in parts]
    run = functools.partial(checkpoint, model, use_reentrant=reentrant)
    sum(run(run(x)).square().sum() for x in again).backward()
    for ours, theirs in zip(again, parts, strict=True):
        ranks.check_close(ours.grad, theirs.grad, 1e-12)
    ranks.check_equal(model[1].running_var, plain[1].running_var)
    ranks.check(model[1].num_batches_tracked == 8)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_graph_that_is_kept_is_recomputed_twice(ranks, counting, rng, reentrant):
    model, x = network(), share(ranks, rng, [3] * ranks.size)
    y = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    counting.sent.clear()
    y.backward()
    ranks.check_equal(x.grad, 2 * once)
    ranks.check([numel for numel, _ in counting.sent] == [BACKWARD] * 2, f"{counting.sent}")


def test_a_branch_whose_output_is_dropped_is_recomputed_too(ranks, counting, rng):
    used, dropped = syncbn.SyncBatchNorm(C).double(), syncbn.SyncBatchNorm(C).double()

    def both(x):
        dropped(x.sin())
        return used(x)

    x = share(ranks, rng, [3] * ranks.size)
    checkpoint(both, x, use_reentrant=False, early_stop=False).square().sum().backward()
    ranks.check(dropped.num_batches_tracked == 1)


def test_the_functional_form_is_recomputed_without_a_collective(ranks, counting, rng):
    mean, var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    for reentrant in (True, False):
        x = share(ranks, rng, [3] * ranks.size)
        counting.sent.clear()
        y = checkpoint(lambda x: syncbn.functional.sync_batch_norm(x, mean, var).tanh(), x, use_reentrant=reentrant)
        y.square().sum().backward()
        ranks.check([numel for numel, _ in counting.sent] == [FORWARD, BACKWARD], f"{counting.sent}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("reentrant", [True, False])
def test_equal_shares_of_different_batches_are_refused(ranks, reentrant):
    """This rank cannot tell the two calls apart, and their statistics differ."""
    layer = syncbn.SyncBatchNorm(C)
    outs = []
    for call in range(2):
        x = torch.ones(3, C, requires_grad=True)
        if ranks.rank == 0:
            x = torch.randn(3, C, generator=torch.Generator(DEVICE).manual_seed(call)).requires_grad_()
        outs.append(checkpoint(layer, x, use_reentrant=reentrant).square().sum())
    message = ""
    if ranks.rank > 0:  # rank 0 can; its backward would wait for the others
        try:
            sum(outs).backward()
        except RuntimeError as error:
            message = str(error)
    ranks.check(ranks.rank == 0 or "needs to know which forward activation checkpointing repeats" in message, message)


@pytest.mark.ranks(2)
def test_empty_shares_of_different_batches_are_right(ranks, rng):
    """An empty local batch cannot tell them apart either, and need not."""
    sizes = [0] + [3] * (ranks.size - 1)
    for reentrant in (True, False):
        layer = syncbn.SyncBatchNorm(C).double()
        plain = copy.deepcopy(layer)
        parts = [share(ranks, rng, sizes) for _ in range(2)]
        again = [x.detach().clone().requires_grad_() for x in parts]
        sum(plain(x).pow(3).sum() for x in parts).backward()
        sum(checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum() for x in again).backward()
        for ours, theirs in zip(again, parts, strict=True):
            ranks.check_equal(ours.grad, theirs.grad)
        ranks.check_equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_input_in_the_recomputation_is_refused(ranks, reentrant):
    """Every rank meets it here; a rank alone raises alone."""
    layer = syncbn.SyncBatchNorm(C)
    dropout = nn.Dropout(0.5)
    x = torch.randn(64, C, requires_grad=True)
    y = checkpoint(lambda x: layer(dropout(x)), x, use_reentrant=reentrant, preserve_rng_state=False)
    ranks.raises(RuntimeError, y.square().sum().backward, "to have the bits of the first one", "preserve_rng_state")


def test_a_forward_in_backward_that_repeats_nothing_is_an_ordinary_one(ranks, counting):
    layer, x = syncbn.SyncBatchNorm(C), torch.randn(3, C, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: [layer(torch.randn(4, C, device=DEVICE)), None][1])
    y.sum().backward()
    ranks.check(layer.num_batches_tracked == 1)
    ranks.check([numel for numel, _ in counting.sent][-1] == FORWARD)


def test_nothing_is_kept_of_ordinary_steps_and_little_of_others(ranks):
    layer, x = syncbn.SyncBatchNorm(C), torch.randn(3, C, requires_grad=True)
    for _ in range(3):
        layer(x).sum().backward()
    ranks.check(layer not in checkpointing.kept_calls)
    with torch.no_grad():
        for _ in range(checkpointing.MOST + 5):
            layer(torch.randn(3, C))
    calls = checkpointing.kept_calls[layer]
    ranks.check(len(calls.alive) == len(calls.recent) == checkpointing.MOST, f"{len(calls.alive)}")
    del calls, layer
    gc.collect()
    ranks.check(all(len(c.alive) <= checkpointing.MOST for c in checkpointing.kept_calls.values()))


def test_what_was_repeated_goes_with_the_next_forward(ranks, rng):
    model = network()
    for _ in range(5):
        checkpoint(model, share(ranks, rng, [3] * ranks.size), use_reentrant=True).square().sum().backward()
    ranks.check(len(checkpointing.kept_calls[model[1]].alive) == 1)


def test_a_layer_in_use_copies_and_pickles(ranks, rng):
    model, x = network(), share(ranks, rng, [3] * ranks.size)
    y = checkpoint(model, x, use_reentrant=True)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    y.square().sum().backward()
    ranks.check_equal(again[1].running_mean, model[1].running_mean)
