# SPDX-License-Identifier: BSD-3-Clause
"""An optimizer that was not passed to join is refused at its next step, if its state has fallen behind on a rank."""

import copy

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

import syncbn
from tests.multiprocess.joined_epochs import LR, OPTIMIZERS, batch, loss, network

pytestmark = pytest.mark.ranks(1)

STALE = {
    "SGD with momentum": OPTIMIZERS["SGD with momentum"],
    "Adam": OPTIMIZERS["Adam"],
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=1),
}


def step(model, optimizer):
    """Without communication: in eval."""
    model.eval()

    def closure():
        optimizer.zero_grad()
        value = loss(model, batch(9, 9, 9))
        value.backward()
        return value

    optimizer.step(closure)
    model.train()


def uneven(ranks, model, optimizer, given=None):
    """A join in which rank 0 makes no step."""
    with syncbn.join(model, given):
        for number in range(ranks.rank):
            loss(model, batch(0, number, ranks.rank)).backward()
            optimizer.step(lambda: torch.zeros(()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", STALE)
@pytest.mark.parametrize("trained", [True, False])
def test_the_next_step_of_an_optimizer_that_was_not_passed_is_an_error(ranks, world, name, trained):
    """Also where rank 0 has not made a step yet, so that its optimizer has no state."""
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = STALE[name](model.parameters())
    if trained:
        step(model, optimizer)
    uneven(ranks, model, optimizer)
    received = "received 0 forwards on rank 0 and 1 forwards on rank 1"
    for _ in range(2):
        ranks.raises(
            RuntimeError,
            lambda: step(model, optimizer),
            f"{type(optimizer).__name__}.step() needs the same optimizer state on every rank",
            received,
            "Write syncbn.join(model, optimizer)",
        )


def stale(ranks, name="Adam"):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = STALE[name](model.parameters())
    uneven(ranks, model, optimizer)
    return model, optimizer


def test_a_new_optimizer_is_let_through(ranks, world):
    model, _ = stale(ranks)
    step(model, STALE["Adam"](model.parameters()))
    ranks.check(True)


def test_an_optimizer_with_a_loaded_state_is_let_through(ranks, world):
    model, optimizer = stale(ranks)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    ranks.check(True)


def test_an_optimizer_that_a_later_join_copies_is_let_through(ranks, world):
    model, optimizer = stale(ranks)
    with syncbn.join(model, optimizer):
        for number in range(ranks.size - ranks.rank):
            loss(model, batch(1, number, ranks.rank)).backward()
    step(model, optimizer)
    ranks.check(True)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: it has the state of the optimizer inside, and no hooks."""

    state = property(lambda self: self.inner.state)
    param_groups = property(lambda self: self.inner.param_groups)
    defaults = property(lambda self: self.inner.defaults)

    def __init__(self, inner):
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)


def test_an_optimizer_in_a_wrapper_may_be_passed(ranks, world):
    model, optimizer = stale(ranks)
    wrapper = Wrapper(optimizer)
    with syncbn.join(model, wrapper):
        for number in range(ranks.size - ranks.rank):
            loss(model, batch(1, number, ranks.rank)).backward()
    uneven(ranks, model, wrapper, wrapper)
    step(model, wrapper)
    made = optimizer.state[model[1].weight]["step"]  # ranks.size - 1 in the last join, and one after it
    ranks.check(made == ranks.size, f"{made}")


def test_an_optimizer_without_state_or_of_another_model_is_let_through(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    plain = torch.optim.SGD(model.parameters(), lr=LR)
    plain.state[model[0].weight] = {"momentum_buffer": None}  # as checkpoints of old torch bring it
    uneven(ranks, model, plain)
    step(model, plain)
    ranks.check(not plain._optimizer_step_pre_hooks)
    model, _ = stale(ranks)
    other = network()
    step(other, STALE["Adam"](other.parameters()))
    step(model, torch.optim.SGD(model.parameters(), lr=LR))
    ranks.check(True)


def test_equal_numbers_of_steps_ask_nothing_of_an_optimizer(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    optimizer = STALE["Adam"](model.parameters())
    with syncbn.join(model):
        loss(model, batch(0, 0, ranks.rank)).backward()
        optimizer.step()
    step(model, optimizer)
    ranks.check(not _global_optimizer_pre_hooks)


@pytest.mark.ranks(2)
def test_one_optimizer_that_was_forgotten_is_refused_and_the_other_is_not(ranks, world):
    model = syncbn.convert_sync_batchnorm(network())
    passed, forgotten = (OPTIMIZERS["Adam"](model[i : i + 2].parameters()) for i in (0, 3))
    with syncbn.join(model, passed):
        for number in range(ranks.rank):
            loss(model, batch(0, number, ranks.rank)).backward()
            passed.step()
            forgotten.step()
    step(model, passed)
    ranks.raises(RuntimeError, forgotten.step, "Adam.step() needs the same optimizer state")
