# SPDX-License-Identifier: BSD-3-Clause
"""join(model, optimizer): over several epochs every rank goes on with the optimizer state of the rank that went on."""

import warnings
from collections import Counter, OrderedDict

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.training.join import nested_values
from syncbn.training.join.nested_values import Encoder, Group
from tests.conftest import DEVICE
from tests.multiprocess.joined_epochs import LR, OPTIMIZERS, batch, loss, network

pytestmark = [
    pytest.mark.ranks(1),
    pytest.mark.filterwarnings("ignore:.*does not match bucket view strides.*"),
    pytest.mark.filterwarnings("ignore:.*call of `lr_scheduler.step.. before `optimizer.step:UserWarning"),
]

SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 6]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2 * LR, total_steps=100),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5)],
        milestones=[3],
    ),
}
EPOCHS = 3


def steps_of(epoch, size):
    """Steps of every rank: in the first epoch rank 0 makes none, and later another rank makes the most."""
    return [2 * ((rank + epoch) % size) + (epoch > 0 or size == 1) for rank in range(size)]


def one_process(size, make, make_scheduler=None):
    """What the ranks that still train do in each step, in one process on all of their samples."""
    model = network()
    optimizer = make(model.parameters())
    scheduler = make_scheduler and make_scheduler(optimizer)
    for epoch in range(EPOCHS):
        steps = steps_of(epoch, size)
        for step in range(max(steps)):
            x = torch.cat([batch(epoch, step, rank) for rank, own in enumerate(steps) if step < own])
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    return model, optimizer


def train(ranks, world, model, optimizer, epoch, given=None, scheduler=None):
    with syncbn.join(model, given):
        for step in range(steps_of(epoch, ranks.size)[ranks.rank]):
            x = batch(epoch, step, ranks.rank)
            optimizer.zero_grad()
            (loss(model, x) * world.loss_scale(len(x))).backward()
            if not isinstance(model, DistributedDataParallel):
                world.average_gradients(model)
            optimizer.step()
            if scheduler:
                scheduler.step()


def check_equal_to_one_process(ranks, model, optimizer, *how):
    whole, exact = one_process(ranks.size, *how)
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        ranks.check(optimizer.state[p].keys() == exact.state[q].keys(), str(list(optimizer.state[p])))
        for key, theirs in exact.state[q].items():
            ranks.check_close(optimizer.state[p][key], theirs, 1e-12, key)
    settings = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, exact)]
    ranks.check(settings[0] == settings[1], f"{settings}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epochs_of_a_plain_model_end_as_in_one_process(ranks, world, name):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = OPTIMIZERS[name](model.parameters())
    for epoch in range(EPOCHS):
        train(ranks, world, model, optimizer, epoch, optimizer)
    check_equal_to_one_process(ranks, model, optimizer, OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_epochs_in_ddp_end_as_in_one_process(ranks, torch_world, world, name):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network()))
    optimizer = OPTIMIZERS[name](model.parameters())
    for epoch in range(EPOCHS):
        train(ranks, world, model, optimizer, epoch, optimizer)
    check_equal_to_one_process(ranks, model.module, optimizer, OPTIMIZERS[name])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_steps_in_the_loop_goes_on_as_in_one_process(ranks, world, name):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    scheduler = SCHEDULERS[name](optimizer)
    for epoch in range(EPOCHS):
        train(ranks, world, model, optimizer, epoch, (optimizer, scheduler), scheduler)
    check_equal_to_one_process(ranks, model, optimizer, OPTIMIZERS["SGD with momentum"], SCHEDULERS[name])


@pytest.mark.ranks(2)
def test_ranks_that_ended_early_warn_of_a_scheduler_that_was_not_passed(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(ranks, world, model, optimizer, 0, optimizer, scheduler)
    texts = [str(each.message) for each in caught if each.category is RuntimeWarning]
    last = ranks.rank == ranks.size - 1
    ok = not texts if last else len(texts) == 1 and "received lr 0" in texts[0] and "[optimizer, scheduler]" in texts[0]
    ranks.check(ok, f"{texts}")
    ranks.check(optimizer.param_groups[0]["lr"] == LR * 0.5 ** (2 * ranks.size - 2))


def test_two_optimizers_of_one_model_end_as_one(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    parts = [OPTIMIZERS["Adam"](model[i : i + 2].parameters()) for i in (0, 3)]
    for epoch in range(EPOCHS):
        with syncbn.join(model, parts):
            for step in range(steps_of(epoch, ranks.size)[ranks.rank]):
                x = batch(epoch, step, ranks.rank)
                model.zero_grad()
                (loss(model, x) * world.loss_scale(len(x))).backward()
                world.average_gradients(model)
                for part in parts:
                    part.step()
    whole, _ = one_process(ranks.size, OPTIMIZERS["Adam"])
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


def test_a_grad_scaler_has_the_scale_of_the_rank_that_went_on(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**4, growth_interval=1)
    with syncbn.join(model, scaler):
        for step in range(ranks.rank):
            scaler.scale(loss(model, batch(0, step, ranks.rank))).backward()
            scaler.update(2.0 ** (5 + step))
    scale = 2.0 ** (3 + ranks.size) if ranks.size > 1 else 2.0**4
    ranks.check(scaler.state_dict()["scale"] == scale, f"{scaler.state_dict()}")


def test_state_in_another_dtype_than_its_parameter_keeps_its_bits(ranks, world):
    """As that of an optimizer with float32 state for bfloat16 parameters; load_state_dict would round it."""
    model = syncbn.SyncBatchNorm(4).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    exact = torch.arange(4) / 3
    with syncbn.join(model, optimizer):
        for _ in range(ranks.size - ranks.rank):
            model(torch.randn(3, 4).bfloat16()).sum().backward()
            optimizer.state[model.weight] = {"master": exact.clone()}
    ranks.check_equal(optimizer.state[model.weight]["master"], exact)


VALUES = {
    "numbers": [1, -2.5, True, None, "text", float("inf")],
    "containers": ({3: [], "a": ()}, OrderedDict(z=1), Counter([1, 1, 2])),
    "tensors": [
        torch.arange(6, device=DEVICE).reshape(2, 3).t(),
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), device="cpu").contiguous(
            memory_format=torch.channels_last
        ),
        torch.ones((), dtype=torch.bfloat16, device=DEVICE),
        torch.empty(0, 3, device=DEVICE),
        torch.tensor([True, False], device="cpu"),
        torch.ones(1, device=DEVICE).expand(4),
    ],
}


@pytest.mark.parametrize("pack_bytes", [1, 2**26])
def test_nested_values_travel_as_they_are(ranks, world, monkeypatch, pack_bytes):
    monkeypatch.setattr(nested_values, "PACK_BYTES", pack_bytes)
    encoder, root = Encoder(), ranks.size - 1
    encoded = encoder.encode(VALUES, "values") if ranks.rank == root else None
    host = syncbn.transports.choose(None)
    values = nested_values.broadcast(encoded, encoder.tensors, root, Group(host, world.transport, DEVICE))
    for name in ("numbers", "containers"):
        ranks.check(repr(values[name]) == repr(VALUES[name]), repr(values[name]))
    for theirs, ours in zip(VALUES["tensors"], values["tensors"], strict=True):
        ranks.check_equal(ours, theirs)
        ranks.check(ours.device.type == theirs.device.type, f"{ours.device}")
    ranks.check(values["tensors"][1].is_contiguous(memory_format=torch.channels_last))


@pytest.mark.ranks(2)
def test_a_state_that_cannot_travel_is_an_error_that_names_its_key(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = OPTIMIZERS["Adam"](model.parameters())

    def loop():
        with syncbn.join(model, optimizer):
            for step in range(ranks.rank):
                loss(model, batch(0, step, ranks.rank)).backward()
                optimizer.step()
                optimizer.state[model[1].weight]["history"] = {"seen": {3}}

    ranks.raises(TypeError, loop, "received builtins.set in Adam['state'][1]['history']['seen']", "Take it out")
    ranks.raises(RuntimeError, optimizer.step, "Adam.step() needs the same optimizer state on every rank")


@pytest.mark.ranks(2)
def test_other_optimizers_on_a_rank_are_an_error_on_all_at_entering(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    sgd, adam = (OPTIMIZERS[name](model.parameters()) for name in ("SGD with momentum", "Adam"))
    reverse = torch.optim.Adam(list(model.parameters())[::-1])
    first = ranks.rank == 0
    of = "of 6 parameters (checksum "
    for mine, parts in (
        (sgd if first else adam, ("received SGD " + of, "Adam " + of)),
        (None if first else adam, ("received no optimizer (", "Adam " + of)),
        (reverse if first else adam, ("over the same parameters in the same order", "received Adam " + of)),
        ([sgd, adam] if first else [adam, sgd], ("received SGD of 6 parameters, Adam",)),
    ):
        ranks.raises(ValueError, syncbn.join(model, mine).__enter__, "the same optimizers on every rank", *parts)
    wrong = syncbn.join(model, model.parameters() if first else adam)
    ranks.raises(TypeError, wrong.__enter__, "On rank 0: syncbn.join needs an optimizer, or a list", "generator")
