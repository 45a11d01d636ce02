# SPDX-License-Identifier: BSD-3-Clause
"""World.check(model), and the first World.average_gradients: whether all ranks train one model."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import syncbn
from syncbn.world import same_model
from tests.conftest import DEVICE
from tests.multiprocess.test_collectives import CountingTransport

pytestmark = pytest.mark.ranks(2)


def network(convert=True):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return syncbn.convert_sync_batchnorm(model) if convert else model


def counted(ranks):
    """A World whose group has averaged nothing yet, and the transport that counts."""
    counting = CountingTransport(ranks.transport)
    return syncbn.World(ranks.rank, ranks.size, 0, DEVICE, "test", counting), counting


def last(ranks):
    return ranks.rank == ranks.size - 1


def step(model, ranks, average=True, data=0):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator(DEVICE).manual_seed(data))
    model(x).square().mean().backward()
    if average:
        ranks.world.average_gradients(model)
    optimizer.step()


def said_of(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in said]


def test_equal_models_pass_with_one_message_also_after_steps_on_other_data_and_seeds(ranks):
    world, counting = counted(ranks)
    model = network()
    torch.manual_seed(ranks.rank)  # dropout may differ; network() sets it again
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")  # the same bits on every rank
    ranks.check(world.check(model) == [], "nothing is to say")
    ranks.check(counting.sent == [(7 * ranks.size + 7, torch.float64)], f"{counting.sent}")
    model = network()
    for data in range(2):
        step(model, ranks, data=10 * ranks.rank + data)
    ranks.check(ranks.world.check(model) == [])
    ranks.check(world.check() == [] and len(counting.sent) == 1, "without a model nothing is sent")


CHANGES = {
    "another parameter": (lambda m: m[3].weight.data.view(-1)[0].add_(1e-6), "other values of 3.weight (1 of 14"),
    "another sign of zero": (lambda m: m[1].bias.data[0].neg_(), "other values of 1.bias (1 of 14"),
    "another buffer": (lambda m: m[4].running_var[2].mul_(2), "other values of 4.running_var (1 of 14"),
    "another count": (lambda m: m[4].num_batches_tracked.add_(1), "other values of 4.num_batches_tracked (1 of 14"),
    "four others": (lambda m: [p.data.add_(1) for p in (*m[0].parameters(), *m[1].parameters())], "and 1 more (4 of"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_rank_that_differs_is_named_with_what_differs_on_every_rank(ranks, what):
    change, text = CHANGES[what]
    world, counting = counted(ranks)
    model = network()
    if last(ranks):
        change(model)
    others = "rank 0" if ranks.size == 2 else "ranks 0, 1" if ranks.size == 3 else f"ranks 0-{ranks.size - 2}"
    who = f"is version 1 on {others} and version 2 on rank {ranks.size - 1}"
    ranks.raises(ValueError, lambda: world.check(model), text, who, "World.broadcast(model)")
    sent = [(7 * ranks.size + 7, torch.float64), (2 * 14 * ranks.size + 7, torch.float64)]
    ranks.check(counting.sent == sent, f"{counting.sent}")
    world.broadcast(model)
    ranks.check(world.check(model) == [], "broadcast heals it")


def test_a_step_without_averaging_is_found_and_explained_by_its_gradients(ranks):
    model = network()
    step(model, ranks, average=False, data=ranks.rank)
    ranks.raises(ValueError, lambda: ranks.world.check(model), "The gradients differ too, so nothing has averaged")
    model.zero_grad()
    ranks.raises(ValueError, lambda: ranks.world.check(model), "If they were the same at the start, a step went")


def test_the_first_average_of_a_group_compares_parameters_and_later_ones_do_not(ranks):
    world, counting = counted(ranks)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(ranks.rank)
    text = "World.average_gradients needs the same parameters on every rank"
    ranks.raises(ValueError, lambda: world.average_gradients(model), text)
    world, counting = counted(ranks)
    world.broadcast(model)
    del counting.sent[:]
    world.average_gradients(model)
    ranks.check(counting.sent[0] == (3 * ranks.size + 7, torch.float64), f"{counting.sent}")
    first = len(counting.sent)
    with torch.no_grad():
        model.weight.add_(ranks.rank)
    world.average_gradients(model)
    ranks.check(len(counting.sent) == first + 1, f"{counting.sent}")


def test_an_error_of_one_rank_leaves_the_comparison_for_the_next_call(ranks):
    world, _ = counted(ranks)
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    ranks.raises(TypeError, lambda: world.average_gradients(5 if last(ranks) else model), "needs a torch.nn.Module")
    with torch.no_grad():
        model.weight.add_(ranks.rank)
    ranks.raises(ValueError, lambda: world.average_gradients(model), "other values of weight (1 of 2")


def test_what_stays_local_or_is_not_there_is_a_remark_on_every_rank_and_a_warning_of_the_first(ranks):
    cases = {
        "2 of 2 normalising modules that use the local batch alone: 1, 4": network(convert=False),
        "found no batch norm in Linear": nn.Linear(2, 2),
    }
    for text, model in cases.items():
        if isinstance(model, nn.Sequential):
            model[1].running_mean.fill_(ranks.rank)  # of the local batches: it may differ
        remarks, said = said_of(lambda model=model: ranks.world.check(model))
        ranks.check(len(remarks) == 1 and text in remarks[0], f"{remarks}")
        ranks.check(said == (remarks if ranks.rank == 0 else []), f"{said}")


def test_statistics_of_other_groups_may_differ_and_are_compared_within_them(ranks):
    model = network()
    layers = [m for m in model if isinstance(m, syncbn.SyncBatchNorm)]
    group = ranks.world.subgroup(ranks.size)
    for layer in layers:
        layer.process_group = group
        layer.running_mean.fill_(ranks.rank)
    ranks.check(ranks.world.check(model) == [], "they are of another group than the World")
    text = "other values of 1.running_mean"
    ranks.raises(ValueError, lambda: ranks.world.within(group).check(model), text)
    ranks.world.free(group)


WRONG = {
    "no model": (lambda: 5, TypeError, "World.check needs a torch.nn.Module; received int"),
    "a lazy one": (lambda: nn.Sequential(nn.LazyLinear(2)), ValueError, "the uninitialized values of 0.weight"),
    "another one": (
        lambda: nn.Sequential(*network(), nn.Linear(2, 2)),
        ValueError,
        "the same names, shapes and dtypes",
    ),
    "not converted": (lambda: network(convert=False), ValueError, "the same synchronised layers on every rank"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_model_of_one_rank_is_refused_by_all(ranks, what):
    make, kind, text = WRONG[what]
    model = network()
    ranks.raises(kind, lambda: ranks.world.check(make() if last(ranks) else model), text)
    ranks.check(ranks.world.check(model) == [], "the next call is in step")


def test_a_tensor_that_cannot_be_read_is_an_error_of_all(ranks, monkeypatch):
    def raises(t):
        raise RuntimeError("no bits here")

    if last(ranks):
        monkeypatch.setattr(same_model, "_digest", raises)
    ranks.raises(ValueError, lambda: ranks.world.check(network()), "raised RuntimeError: no bits here")


def test_inside_a_join_it_is_refused(ranks):
    model = copy.deepcopy(network())
    error = None
    with contextlib.suppress(RuntimeError), syncbn.join(model):
        try:
            ranks.world.check(model)
        except RuntimeError as refused:
            error = refused
    ranks.check("inside syncbn.join" in str(error), f"{error}")
