# SPDX-License-Identifier: BSD-3-Clause
"""World.average_gradients: training without DDP."""

import pytest
import torch
from torch import nn

import syncbn
from syncbn.transports import gather
from tests.conftest import DEVICE
from tests.multiprocess.test_collectives import CountingTransport
from tests.multiprocess.test_ddp import loss, network

pytestmark = pytest.mark.ranks(1)
NO_SPARSE = pytest.mark.cpu("the device of host memory has no sparse tensors")
HEAD = 31 + 1  # which call it is, and whether this rank's model is the one that the group has agreed on


@pytest.fixture(autouse=True)
def _the_same_parameters_on_every_rank():
    torch.manual_seed(0)


def counted(ranks):
    counting = CountingTransport(ranks.transport)
    return counting, syncbn.World(ranks.rank, ranks.size, 0, DEVICE, "test", counting)


def with_gradients(*parts):
    model = nn.ModuleList(parts)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_average_gradients_is_the_mean(ranks):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16()])
    model.append(nn.ParameterList([torch.zeros(3, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex128)]))
    for p in model.parameters():
        p.grad = torch.full_like(p, (1.0 + ranks.rank) * (1 + 2j if p.is_complex() else 1))
    ranks.world.average_gradients(model)
    for p in model.parameters():
        mean = (ranks.size + 1) / 2 * (1 + 2j if p.is_complex() else 1)
        ranks.check((p.grad == torch.full_like(p, mean)).all().item(), f"{p.dtype}: {p.grad}")


def test_average_gradients_takes_a_missing_gradient_for_zero(ranks):
    model = nn.Linear(2, 2)
    if ranks.rank == 0:
        model.weight.grad = torch.ones(2, 2)
    ranks.world.average_gradients(model)
    ranks.check_equal(model.weight.grad, torch.full((2, 2), 1.0 / ranks.size))
    ranks.check(model.bias.grad is None, "no rank had a gradient of the bias")


def test_average_gradients_leaves_frozen_parameters_alone(ranks):
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    model.bias.grad = torch.ones(2)
    ranks.world.average_gradients(model)
    ranks.check(model.weight.grad is None, "frozen")
    if ranks.size > 1:
        model.weight.requires_grad_(ranks.rank == 0)
        ranks.raises(ValueError, lambda: ranks.world.average_gradients(model), "same number of tensors")


def test_average_gradients_compares_a_model_once_and_packs_one_wire_a_dtype(ranks):
    counting, world = counted(ranks)
    model = with_gradients(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    wires = [(HEAD + 18 + 6, torch.float32), (6 + 2, torch.float64)]  # values, and a flag a tensor
    first = (3 * ranks.size + 7, torch.float64)  # are the parameters the same
    comparison = (4 * ranks.size + 7, torch.float64)  # is it the same model everywhere, with dense gradients
    for expected in ([first, comparison, *wires], wires, wires):
        counting.sent.clear()
        world.average_gradients(model)
        ranks.check(counting.sent == expected, f"{counting.sent}")


def test_models_that_take_turns_are_compared_in_the_first_turns_only(ranks):
    counting, world = counted(ranks)
    turns = [with_gradients(nn.Linear(2, 2)), with_gradients(nn.Linear(3, 3)), with_gradients(nn.Linear(4, 4))]
    for turn in range(4):
        for model in turns:
            counting.sent.clear()
            world.average_gradients(model)
            if turn > 1:
                n = sum(p.numel() for p in model.parameters())
                ranks.check(counting.sent == [(HEAD + 2 + n, torch.float32)], f"{turn}: {counting.sent}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("wrong", ["model", pytest.param("sparse", marks=NO_SPARSE), "no model"])
def test_average_gradients_refuses_alike_also_after_calls_that_went_well(ranks, wrong):
    bad = ranks.rank == ranks.size - 1
    good = with_gradients(nn.Linear(2, 2), nn.Linear(2, 2).double())
    for _ in range(2):
        ranks.world.average_gradients(good)
    if wrong == "sparse":
        other = nn.Embedding(6, 3, sparse=True)
        other(torch.tensor([1, 2])).sum().backward()
    else:
        other = with_gradients(nn.Linear(2, 7)) if wrong == "model" else None
    kind, part = {
        "model": (ValueError, "same number of tensors"),
        "sparse": (ValueError, "received sparse ones of weight"),
        "no model": (TypeError, "received NoneType"),
    }[wrong]
    given = other if bad else good
    for _ in range(2):
        ranks.raises(kind, lambda: ranks.world.average_gradients(given), part)
        ranks.check_equal(good[0].weight.grad, torch.ones(2, 2), "nothing was averaged")
    ranks.world.average_gradients(good)
    ranks.check_equal(good[1].weight.grad, torch.ones(2, 2, dtype=torch.float64), "the next step works")


@pytest.mark.ranks(2)
def test_a_rank_in_average_gradients_and_another_in_another_call_is_one_error(ranks):
    """Without shared memory, which compares the calls itself: the wires have one length and one dtype."""
    model = with_gradients(nn.Linear(2, 2, dtype=torch.float64))
    counting, world = counted(ranks)
    world.average_gradients(model)
    length = counting.sent[-1][0]

    def call():
        if ranks.rank:
            return world.average_gradients(model)
        return gather.exchange(torch.zeros(length - 7, dtype=torch.float64), counting, "another call")

    ranks.raises(ValueError, call, "All ranks must be in one call", "World.average_gradients", "another call")


def test_pure_mpi_training_with_uneven_shares_equals_one_process(ranks, rng):
    """Without torch.distributed: broadcast once, scale the loss by the share, average the gradients."""
    whole, model = network(rng), network(rng)
    model.load_state_dict(whole.state_dict())
    if ranks.rank > 0:
        with torch.no_grad():
            model[0].weight.zero_()
    sizes = [r + 1 for r in range(ranks.size)]
    mine = ranks.shares(sizes)[ranks.rank]
    syncbn.convert_sync_batchnorm(model)
    ranks.world.broadcast(model)
    for module, rows in ((whole, slice(None)), (model, mine)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        generator = torch.Generator(DEVICE).manual_seed(3)
        for _ in range(4):
            x = torch.randn(sum(sizes), 2, 7, 6, generator=generator, dtype=torch.float64)[rows]
            optimizer.zero_grad()
            scale = ranks.world.loss_scale(len(x)) if module is model else 1.0
            (loss(module, x) * scale).backward()
            if module is model:
                ranks.world.average_gradients(model)
            optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


def test_a_grad_scaler_leaves_out_the_same_step_on_every_rank(ranks):
    """As the documentation says: gradients are averaged before the scaler looks at them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4), nn.Linear(4, 1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model[2].weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3) + ranks.rank).square().mean()).backward()
        if step == 0 and ranks.rank == ranks.size - 1:
            model[2].weight.grad[0, 0] = float("inf")
        ranks.world.average_gradients(model)
        scaler.step(optimizer)
        scaler.update()
        ranks.check(scaler.get_scale() == 2.0, f"step {step}: the scale is {scaler.get_scale()}")
        moved = not torch.equal(model[2].weight, before)
        ranks.check(moved == (step == 1), f"step {step}: moved {moved}")
