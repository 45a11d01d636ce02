# SPDX-License-Identifier: BSD-3-Clause
"""drift changes nothing of the training that it measures, and what it refuses is one error on every rank."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.multiprocess.test_collectives import counting  # noqa: F401
from tests.multiprocess.test_drift import C, equal_everywhere, measured, pytestmark  # noqa: F401


class Net(nn.Module):
    """Plain and synchronised layers, dropout, one layer that is called twice, one with a mask, one never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.first = nn.Conv1d(3, C, 3, padding=1), nn.BatchNorm1d(C)
        self.drop, self.ours = nn.Dropout(0.3), syncbn.SyncBatchNorm(C)
        self.shared, self.head = nn.BatchNorm1d(C, momentum=None), nn.Linear(C, 2)
        self.unused = nn.BatchNorm1d(C)

    def forward(self, x, block=lambda part, x: part(x)):
        x = block(self.part, self.conv(x))
        return self.head(self.ours(self.shared(self.shared(x)).relu(), mask=x[:, 0] > -1).mean(2))

    def part(self, x):
        return self.drop(self.first(x).relu())


def trained(ranks, rng, opened, block=None, wrap=None, **options):
    """The parameters, buffers, gradients and random state after some steps, with the report open or not."""
    rng = rng.clone_state()
    model = Net()
    ranks.world.broadcast(model)
    outer = model if wrap is None else wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [[torch.randn(2 + r, 3, 8, generator=rng) for r in range(ranks.size)] for _ in range(3)]
    torch.manual_seed(11 + ranks.rank)
    report = None
    for step, batch in enumerate(data):
        if opened and step == 1:  # the third step is after the report
            with syncbn.drift(outer, **options) as report:
                one_step(outer, optimizer, batch[ranks.rank], block)
        else:
            one_step(outer, optimizer, batch[ranks.rank], block)
    found = {**model.state_dict(), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}
    return {**found, "random": torch.get_rng_state()}, report


def one_step(model, optimizer, x, block):
    optimizer.zero_grad()
    out = model(x) if block is None else model(x, block)
    out.square().mean().backward()
    optimizer.step()


BLOCKS = {
    "no checkpoint": None,
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_training_has_the_same_bits_with_the_report_open(ranks, rng, block):
    without, _ = trained(ranks, rng, opened=False, block=BLOCKS[block])
    with_it, report = trained(ranks, rng, opened=True, block=BLOCKS[block])
    for name, value in without.items():
        if value is not None:
            ranks.check_equal(with_it[name], value, name)
    ranks.check([row.name for row in report.rows] == ["first", "shared", "ours"], "in the order of the calls")
    ranks.check([row.calls for row in report.rows] == [1, 2, 1], f"a repeated forward is no call: {report.rows}")
    equal_everywhere(ranks, report)


@pytest.mark.ranks(2)
def test_ddp_trains_to_the_same_bits_and_names_are_those_of_the_model_inside(ranks, rng, torch_world):
    wrap = functools.partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    without, _ = trained(ranks, rng, opened=False, wrap=wrap)
    with_it, report = trained(ranks, rng, opened=True, wrap=wrap)
    for name, value in without.items():
        if value is not None:
            ranks.check_equal(with_it[name], value, name)
    ranks.check([row.name for row in report.rows] == ["first", "shared", "ours"])
    model = Net()
    outer = wrap(model)
    syncbn.convert_sync_batchnorm(outer, only=["first"])
    ranks.check(isinstance(model.first, syncbn.SyncBatchNorm), "the names of the report fit the model in DDP too")


def test_one_all_reduce_for_each_call_and_none_afterwards(ranks, rng, counting):  # noqa: F811
    model = nn.Sequential(nn.BatchNorm1d(C), syncbn.SyncBatchNorm(C))
    x = torch.randn(4, C, generator=rng, requires_grad=True)
    model(x).sum().backward()
    counting.sent.clear()
    with syncbn.drift(model):
        opening = [n for n, _ in counting.sent]
        model(x).sum().backward()
        inside = [n for n, _ in counting.sent][len(opening) :]
        model.eval()(x)
        model.train()
        ranks.check(len(counting.sent) == len(opening) + len(inside), "eval sends nothing")
        counting.sent.clear()
    model(x).sum().backward()
    W, table = ranks.size, ranks.size * (4 * C + 3) + 7
    ranks.check(opening == [3 * W + 7], f"{opening}")
    ranks.check(inside == [table, table, 2 * C + 15, 2 * C + 7], f"{inside}")
    ranks.check([n for n, _ in counting.sent] == [2 * C + 15, 2 * C + 7], f"{counting.sent}")


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks]


@pytest.mark.ranks(2)
def test_an_exception_on_one_rank_leaves_no_hook_and_no_one_waiting(ranks, rng):
    """The ranks meet again in their next collective, whatever it is."""
    model, x = Net(), torch.randn(3, 3, 8, generator=rng)
    caught = None
    try:
        with syncbn.drift(model) as report:
            model(x)
            if ranks.rank == 0:
                raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        caught = error
    ranks.check((caught is not None) == (ranks.rank == 0))
    ranks.check(not hooks(model) and model.ours.process_group is None, "as before")
    ranks.check(report.rows[0].calls == 1, "what was measured is kept")
    ranks.check(not any(spec is not None and spec.kind == "timer" for spec, _ in syncbn.transports.dispatch.made))
    model(x).sum().backward()
    ranks.world.average_gradients(model)


@pytest.mark.ranks(2)
def test_different_numbers_of_steps_are_one_error_that_names_the_call(ranks, rng):
    if ranks.transport.name.startswith("mpi"):
        pytest.skip("messages of other length: MPI refuses them on some ranks, with words of its own")
    model = nn.Sequential(nn.BatchNorm1d(C))
    x = torch.randn(4, C, generator=rng)

    def steps():
        with syncbn.drift(model):
            for _ in range(2 + (ranks.rank == 0)):
                model(x)
        ranks.world.average_gradients(model)

    ranks.raises(ValueError, steps, "syncbn.drift before the forward of '0', call 3", "World.average_gradients")
    ranks.check(not hooks(model))


@pytest.mark.ranks(2)
def test_layers_in_another_order_are_one_error(ranks, rng):
    first, second = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
    x = torch.randn(4, C, generator=rng)

    def steps():
        with syncbn.drift(nn.ModuleDict({"a": first, "b": second})):
            for layer in (first, second) if ranks.rank else (second, first):
                layer(x)

    ranks.raises(ValueError, steps, "one call", "'a'", "'b'", "Look for code that depends on the rank")


@pytest.mark.ranks(2)
def test_an_input_that_one_rank_refuses_is_its_error_and_the_others_miss_nothing(ranks, rng):
    """Its layer raises as without the report; the other ranks have measured that rank as empty."""
    layer = nn.BatchNorm1d(C)
    x = torch.randn(4, C + (ranks.rank == 0), generator=rng)
    raised = None
    with syncbn.drift(layer) as report:
        try:
            layer(x)
        except (RuntimeError, ValueError) as error:
            raised = error
    ranks.check((raised is not None) == (ranks.rank == 0), f"{raised}")
    ranks.check(report.rows[0].count_global == 4 * (ranks.size - 1), f"{report.rows}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, where dynamo is imported
def test_a_compiled_model_is_refused_with_the_reason(ranks):
    model = nn.Sequential(nn.BatchNorm1d(C))
    compiled = [torch.compile(model), nn.ModuleList([torch.compile(model)])]
    in_place = nn.Sequential(nn.BatchNorm1d(C))
    in_place.compile()
    for each in (*compiled, in_place):
        ranks.raises(RuntimeError, lambda each=each: enter(each), "not compiled", "without its hooks")


def enter(*args):
    with syncbn.drift(*args):
        pass


@pytest.mark.ranks(2)
def test_what_cannot_be_measured_is_one_error_on_every_rank(ranks):
    last = ranks.rank == ranks.size - 1
    ranks.raises(ValueError, lambda: enter(nn.Linear(2, 2)), "with batch norms", "received none")
    ranks.raises(ValueError, lambda: enter(nn.LazyBatchNorm1d()), "lazy ones: ''", "Run one batch")
    ranks.raises(ValueError, lambda: enter(nn.BatchNorm1d(C + last)), "same number of their channels", "Build the same")
    ranks.raises(TypeError, lambda: enter([nn.BatchNorm1d(C)]), "needs a torch.nn.Module", "received list")
    inside = syncbn.join(nn.Linear(2, 2))
    with inside:
        ranks.raises(RuntimeError, lambda: enter(nn.BatchNorm1d(C)), "inside syncbn.join", "around the join")


@pytest.mark.ranks(2)
def test_join_may_be_used_inside(ranks, rng):
    """A rank that has finished takes part with an empty local batch, as in the training itself."""
    model = nn.Sequential(syncbn.SyncBatchNorm(C), nn.Linear(C, 2))
    x = torch.randn(4, C, generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with syncbn.drift(model) as report, syncbn.join(model, optimizer):
        for _ in range(1 + ranks.rank):
            loss = model(x).square().mean()
            loss.backward()
            ranks.world.average_gradients(model)
            optimizer.step()
    ranks.check(report.rows[0].calls == ranks.size, f"{report.rows}")
    equal_everywhere(ranks, report)
