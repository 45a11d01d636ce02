# SPDX-License-Identifier: BSD-3-Clause
"""Sums of two calls are never added: ranks that are in different calls get one error, and nothing has moved."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.transports import launchers
from tests import processes
from tests.calls.test_compile import compiled
from tests.calls.test_compile import pytestmark as warnings_of_torch
from tests.conftest import DEVICE
from tests.multiprocess import batches

pytestmark = [pytest.mark.ranks(2), pytest.mark.immediate_errors, *warnings_of_torch]
C = 5


def pair(**options):
    """Two layers of one width, named, that have made a step."""
    model = syncbn.name_layers(nn.ModuleDict({name: syncbn.SyncBatchNorm(C, **options) for name in "ab"}))
    for layer in model.values():
        layer(sample()).sum().backward()
    return model


def sample(n=3):
    return torch.randn(n, C, 4, generator=torch.Generator(DEVICE).manual_seed(n), requires_grad=True)


def state(model):
    return copy.deepcopy(model.state_dict())


def check_untouched(ranks, model, before):
    for name, value in model.state_dict().items():
        ranks.check_equal(value, before[name], f"{name} moved")


def check_in_step(ranks, model):
    """After an error of all ranks alike the next step is right."""
    batch = batches.make((2 * ranks.size, C, 4), torch.Generator(DEVICE).manual_seed(3), torch.float64)
    mine, exact = ranks.shares([2] * ranks.size)[ranks.rank], batches.exact(batch)
    for layer in model.double().values():
        batches.load(layer, batch)
        got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
        ranks.check_close(got.y, exact.y[mine], 1e-12)
        ranks.check_close(got.grad_x, exact.grad_x[mine], 1e-12)


def others(ranks):
    """The ranks beside rank 1, as errors list them."""
    rest = [r for r in range(ranks.size) if r != 1]
    return f"rank{'s' if len(rest) > 1 else ''} {', '.join(map(str, rest))}"


@pytest.mark.parametrize("masked", [False, True])
def test_another_order_of_layers_is_one_error(ranks, masked):
    model = pair()
    mask = torch.ones(3, 4) if masked else None
    before, names = state(model), "ba" if ranks.rank == 1 else "ab"
    ranks.raises(
        ValueError,
        lambda: [model[name](sample(), mask) for name in names],
        "All ranks must be in one call; received forward of 'a' (call ",
        f") on {others(ranks)} and forward of 'b' (call ",
        ") on rank 1. Ranks took different branches",
        "Look for code that depends on the rank",
    )
    check_untouched(ranks, model, before)
    check_in_step(ranks, model)


def test_another_order_at_the_first_step_is_one_error(ranks):
    model = syncbn.name_layers(nn.ModuleDict({name: syncbn.SyncBatchNorm(C) for name in "ab"}))
    before = state(model)
    layer = model["b" if ranks.rank == 1 else "a"]
    ranks.raises(ValueError, lambda: layer(sample()), "the first forward of 'a'", "'b' on rank 1")
    check_untouched(ranks, model, before)
    check_in_step(ranks, model)


def test_another_order_of_two_backward_passes_is_one_error(ranks):
    model = pair()
    losses = [model[name](sample()).square().sum() for name in "ab"]
    first = losses[1 if ranks.rank == 1 else 0]
    ranks.raises(ValueError, first.backward, "backward of 'a'", "backward of 'b'", "on rank 1")
    check_in_step(ranks, model)


def test_another_order_of_the_backward_passes_of_one_layer_is_one_error(ranks):
    """The layer is the same; the forwards are not."""
    model = pair()
    losses = [model["a"](sample(n)).square().sum() for n in (2, 3)]
    first = losses[1 if ranks.rank == 1 else 0]
    ranks.raises(ValueError, first.backward, "All ranks must be in one call", "backward of 'a' (call ", "on rank 1")


def test_a_forward_beside_a_backward_is_one_error(ranks):
    model = pair()
    loss = model["a"](sample()).sum()
    x = torch.randn(3, C - 4, 4) if ranks.rank == 1 else None  # a forward wire of the length of a backward wire
    layer = syncbn.SyncBatchNorm(C - 4)
    layer(torch.randn(3, C - 4, 4))
    call = loss.backward if x is None else lambda: layer(x)
    ranks.raises(ValueError, call, "backward of 'a'", f"forward of SyncBatchNorm({C - 4})", "on rank 1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 0.5), ("momentum", None), ("momentum", 0.01), ("track_running_stats", False), ("renorm_limits", (2, 1))],
)
def test_a_setting_changed_on_one_rank_after_the_first_step_is_one_error(ranks, name, value):
    model = pair()
    before = state(model)
    if ranks.rank == 1:
        setattr(model["a"], name, value)
    ranks.raises(ValueError, lambda: model["a"](sample()), "the same settings of 'a'", "on rank 1", "at the same step")
    check_untouched(ranks, model, before)


def test_settings_changed_alike_on_all_ranks_are_fine(ranks):
    model = pair()
    for name, value in (("eps", 0.5), ("momentum", None), ("renorm_limits", (2, 1)), ("momentum", 0.2)):
        for layer in model.values():
            setattr(layer, name, value)
            layer(sample()).sum().backward()
    ranks.check(model["a"].num_batches_tracked == 5)


def test_second_derivatives_in_another_order_are_one_error(ranks):
    model, penalties = pair(), []
    for name in "ab":
        x = sample()
        (slope,) = torch.autograd.grad(model[name](x).pow(3).sum(), x, create_graph=True)
        penalties.append(slope.square().sum())
    first = penalties[1 if ranks.rank == 1 else 0]
    ranks.raises(ValueError, first.backward, "derivative 2 through the", "of 'a'", "of 'b'", "on rank 1")


def test_copies_of_a_model_are_told_apart_and_may_be_used_by_turns(ranks):
    model = pair()
    twin = copy.deepcopy(model)
    for _ in range(2):
        for each in (model, twin):
            each["a"](sample()).sum().backward()
    layer = (twin if ranks.rank == 1 else model)["a"]
    ranks.raises(ValueError, lambda: layer(sample()), "must call the same layer", "of the group", "copies of a model")
    check_in_step(ranks, model)


def test_layers_without_a_name_are_called_by_class_and_width(ranks):
    layers = [syncbn.SyncBatchNorm(C) for _ in range(2)]
    for layer in layers:
        layer(sample())
    layer = layers[ranks.rank == 1]
    ranks.raises(ValueError, lambda: layer(sample()), f"forward of SyncBatchNorm({C})", "layer ", "of the group")


def test_other_names_at_the_first_step_are_one_error(ranks):
    model = nn.ModuleDict({"x" if ranks.rank == 1 else "a": syncbn.SyncBatchNorm(C)})
    (layer,) = syncbn.name_layers(model).values()
    ranks.raises(ValueError, lambda: layer(sample()), "the first forward of 'a'", "and 'x' on rank 1", "the same model")


@pytest.mark.timeout(300)
def test_compiled_layers_in_another_order_are_one_error(ranks):
    torch._dynamo.reset()
    model = pair()
    before, names = state(model), "ba" if ranks.rank == 1 else "ab"
    run = compiled(lambda x: sum(model[name](x) for name in names))
    ranks.raises(ValueError, lambda: run(sample()), "All ranks must be in one call", "forward of 'a'", "on rank 1")
    check_untouched(ranks, model, before)
    check_in_step(ranks, model)


def test_recalibration_in_another_order_is_one_error_and_changes_nothing(ranks):
    model = pair()
    before = state(model)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return [self.layers[name](x) for name in ("ba" if ranks.rank == 1 else "ab")]

    call = lambda: syncbn.recalibrate(Branch(), [sample().detach()])  # noqa: E731
    ranks.raises(ValueError, call, "All ranks must be in one call", "on rank 1")
    check_untouched(ranks, model, before)


def test_the_function_with_another_eps_is_one_error(ranks):
    x = sample()
    eps = 0.5 if ranks.rank == 1 else 0.25
    call = lambda: syncbn.functional.sync_batch_norm(x, eps=eps)  # noqa: E731
    ranks.raises(ValueError, call, "same settings of sync_batch_norm", "eps=0.5", "on rank 1")


def test_a_group_that_rounds_what_it_sums_is_an_error(ranks, monkeypatch):
    """As a hook that compresses messages would: the numbers of the call do not survive it."""
    layer, kind = pair()["a"], type(ranks.transport)
    original = kind.all_reduce
    monkeypatch.setattr(kind, "all_reduce", lambda self, wire: original(self, wire.bfloat16().double()))
    raised = ""
    try:
        layer(sample())
    except ValueError as error:
        raised = str(error)
    monkeypatch.undo()
    ranks.check("every bit of float64" in raised, raised)


def test_what_may_differ_between_ranks_is_no_disagreement(ranks):
    """no_sync on one rank, a checkpoint on one rank, a mask on one rank, an empty local batch, a repeated forward."""
    model = pair()
    layer, x = model["a"], sample(0 if ranks.rank == 1 else 3)
    if ranks.rank == 1:
        with syncbn.no_sync(model):
            layer(sample()).sum().backward()
    y = checkpoint(layer, x, use_reentrant=False) if ranks.rank == 1 else layer(x)
    y.square().sum().backward()
    mask = torch.ones(len(x), 4) if ranks.rank == 0 else None
    layer(x, mask).square().sum().backward()
    check_in_step(ranks, model)


def test_layers_may_be_added_and_dropped(ranks):
    model = pair()
    model["c"] = syncbn.SyncBatchNorm(C)
    del model["a"]
    for layer in syncbn.name_layers(model).values():
        layer(sample()).sum().backward()
    check_in_step(ranks, model)


LENGTHS = """
import sys, torch, syncbn
from syncbn.transports import launchers
world = syncbn.init()
wide, narrow = (syncbn.SyncBatchNorm(C) for C in (6, 4))
for layer in (wide, narrow):
    layer(torch.randn(3, layer.num_features)).sum().backward()
model = torch.nn.Linear(40, 40)
model.weight.grad = torch.ones(40, 40)
try:
    if world.rank != 1:
        wide(torch.randn(3, 6))
    elif sys.argv[1] == "layer":
        narrow(torch.randn(3, 4))
    else:
        world.average_gradients(model)
except ValueError as error:
    print(f"rank {world.rank}: {error}", flush=True)
    raise SystemExit(3)
print("silent", flush=True)
"""


@pytest.mark.parametrize("other", ["layer", "World.average_gradients"])
def test_wires_of_different_length_are_never_mixed(ranks, tmp_path_factory, other):
    """In processes of their own: what is left of such a message may end a group. No rank goes on without an error."""
    text = ""
    if ranks.rank == 0:
        script = tmp_path_factory.mktemp("lengths") / "lengths.py"
        script.write_text(LENGTHS)
        start = processes.mpirun if launchers.detect().speaks_mpi else processes.torchrun
        try:
            result = start(ranks.size, script, other, limit=90)
        except AssertionError as error:  # past the limit: for all ranks to hear
            result = subprocess.CompletedProcess([], 0, str(error), "")
        told = ["SyncBatchNorm" if other == "layer" else other]
        if ranks.size == 2 or not launchers.detect().speaks_mpi:  # on more MPI may tell one rank alone
            told += [f"rank {rank}: " for rank in range(ranks.size)]
        output = result.stdout + result.stderr
        right = result.returncode != 0 and all(each in output for each in told) and "silent" not in output
        found = "All ranks must be in one call" in output
        if launchers.detect().speaks_mpi:  # or the watchdog ends ranks that MPI tells nothing
            found = found or "each other in different calls" in output
        right = right and found
        text = "" if right else f"{result.returncode} {told} {output[:800]}"
    ranks.check(not text, text)
    sys.stdout.flush()
