# SPDX-License-Identifier: BSD-3-Clause
"""join() with masks, renormalization, checkpoints and compiled models equals one process, or is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.transports import groups
from tests.calls.test_compile import pytestmark as warnings_of_torch
from tests.conftest import DEVICE

pytestmark = [pytest.mark.ranks(1), pytest.mark.timeout(300), *warnings_of_torch]

C = 3


@pytest.fixture
def world(ranks):
    """Made now: tests before this one may have connected everyone anew."""
    torch._dynamo.reset()
    return syncbn.init(device=DEVICE)


class Network(nn.Module):
    def __init__(self, norm, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(C, C), norm, nn.Linear(C, 2)
        self.reentrant = reentrant
        self.double()

    def block(self, x, mask):
        return self.norm(self.first(x).tanh(), mask).tanh()

    def forward(self, x, mask=None):
        if self.reentrant is None:
            return self.last(self.block(x, mask))
        return self.last(checkpoint(self.block, x, mask, use_reentrant=self.reentrant))


def network():
    return Network(syncbn.SyncBatchNorm(C))


def batch(step, rank):
    """A share, and weights of its samples."""
    rng = torch.Generator(DEVICE).manual_seed(100 * step + rank)
    x = torch.randn(3 + rank, C, generator=rng, dtype=torch.float64)
    return x, torch.rand(3 + rank, generator=rng) + 0.1


def one_process(steps, masked, limits):
    model = Network(syncbn.SyncBatchNorm(C, process_group=groups.ALONE, renorm_limits=limits))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(max(steps)):
        parts = [batch(step, rank) for rank, own in enumerate(steps) if step < own]
        x, mask = (torch.cat(part) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        model(x, mask if masked else None).square().mean().backward()
        optimizer.step()
    return model


WAYS = ["plain", "checkpoint", "reentrant checkpoint", "compiled", "join of what is compiled"]


@pytest.mark.parametrize("limits", [None, (1.5, 0.5)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_it_ends_as_in_one_process(ranks, world, way, masked, limits):
    steps = [2 * rank + (ranks.size == 1) for rank in range(ranks.size)]
    reentrant = way.startswith("reentrant") if "checkpoint" in way else None
    model = Network(syncbn.SyncBatchNorm(C, renorm_limits=limits), reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(model, backend="aot_eager") if "compiled" in way else model
    with syncbn.join(run if way == "compiled" else model):
        for step in range(steps[ranks.rank]):
            x, mask = batch(step, ranks.rank)
            x.requires_grad_(way == "reentrant checkpoint")  # as such a checkpoint wants
            optimizer.zero_grad()
            (run(x, mask if masked else None).square().mean() * world.loss_scale(len(x))).backward()
            world.average_gradients(model)
            optimizer.step()
    exact = one_process(steps, masked, limits).state_dict()
    for (name, ours), theirs in zip(model.state_dict().items(), exact.values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


@pytest.mark.ranks(2)
def test_no_sync_inside_is_followed(ranks, world):
    model = network()
    with syncbn.join(model):
        for step in range(1 + ranks.rank):
            x, _ = batch(step, ranks.rank)
            with syncbn.no_sync(model):
                model(x).square().sum().backward()
            model(x).square().sum().backward()
    ranks.check(model.norm.num_batches_tracked == 2 * ranks.size)


@pytest.mark.ranks(2)
def test_no_sync_of_a_part_is_for_outside(ranks, world):
    model = nn.Sequential(syncbn.SyncBatchNorm(C), syncbn.SyncBatchNorm(C))

    def inside():
        with syncbn.join(model), syncbn.no_sync(model[0]):
            model(torch.randn(3, C))

    ranks.raises(ValueError, inside, "needs the whole model", "put no_sync of a part around the join")
    with syncbn.no_sync(model[0]), syncbn.join(model):
        for _ in range(1 + ranks.rank):
            model(torch.randn(3, C)).sum().backward()
    ranks.check(model[1].num_batches_tracked == ranks.size)


def test_a_second_derivative_is_refused(ranks, world):
    model = network()

    def loop():
        with syncbn.join(model):
            x, _ = batch(0, ranks.rank)
            y = model(x.requires_grad_()).square().sum()
            torch.autograd.grad(y, x, create_graph=True)

    ranks.raises(RuntimeError, loop, "create_graph=True", "outside the join")


def test_a_lazy_model_is_refused(ranks, world):
    def enter():
        with syncbn.join(Network(syncbn.LazySyncBatchNorm())):
            pass

    ranks.raises(ValueError, enter, "received 4 lazy tensors", "Run one batch through the model first")


def test_recalibrate_is_for_after_it(ranks, world):
    model = network()

    def loop():
        with syncbn.join(model):
            syncbn.recalibrate(model, [batch(0, ranks.rank)[0]])

    ranks.raises(RuntimeError, loop, "inside syncbn.join", "Call it after the join")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_not_in_the_join(ranks, world, copier):
    model = network()
    with syncbn.join(model):
        for step in range(1 + ranks.rank):
            x, _ = batch(step, ranks.rank)
            model(x).square().sum().backward()
            twin = copier(model)
            with syncbn.no_sync(twin):  # it announces nothing: a copy may be used on one rank
                for _ in range(ranks.rank):
                    twin(x).square().sum().backward()
    ranks.check(model.norm.num_batches_tracked == ranks.size)
