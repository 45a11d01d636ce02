# SPDX-License-Identifier: BSD-3-Clause
"""A compiled model over ranks: no graph break, the eager result, one order of collectives, the same errors."""

import copy
import shutil

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import syncbn
from tests.calls.test_compile import compiled
from tests.calls.test_compile import pytestmark as warnings_of_torch
from tests.multiprocess import batches, test_collectives
from tests.multiprocess.test_bad_input import FAULTS
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C
from tests.tolerances import allowed, error

UNTRACEABLE = ("no tensor", "sparse")
"""What torch.compile itself refuses, on its rank alone."""

pytestmark = [pytest.mark.ranks(1), pytest.mark.timeout(300), *warnings_of_torch]
counting = test_collectives.counting


@pytest.fixture(autouse=True)
def _compiler(request):
    """A fresh one for each test, but for those of bad input: later ones meet sizes that the graph holds as symbols."""
    if getattr(request.function, "__name__", "") != test_bad_input_on_one_rank_is_one_error_on_all.__name__:
        torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


@pytest.fixture(params=["everyone", "a torch group"])
def group(request, ranks):
    """None, which is MPI under mpirun, and a group of torch.distributed over gloo."""
    if request.param == "everyone":
        return None
    request.getfixturevalue("torch_world")
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def compare(ranks, batch, sizes, run):
    """Checks this rank's part of a global batch against the definition, as close as torch's own layer comes."""
    mine, dtype = ranks.shares(sizes)[ranks.rank], batch.x.dtype
    exact = batches.exact(batch)
    theirs = batches.load(batches.torch_layer(batch.x.dim(), batch.x.size(1)), batch)
    theirs = batches.run(theirs.double() if dtype == torch.float64 else theirs, batch.x, batch.grad_y)
    x = batch.x[mine].detach().clone().requires_grad_()
    y = run(x)
    y.backward(batch.grad_y[mine])
    for name, got in (("y", y.detach()), ("grad_x", x.grad)):
        bound = allowed(error(getattr(theirs, name), getattr(exact, name)), dtype)
        ranks.check_close(got, getattr(exact, name)[mine], bound, name)
        ranks.check(got.dtype == dtype, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shares", ["uneven", "an empty rank"])
def test_a_compiled_layer_equals_one_process(ranks, rng, group, shares, dtype):
    sizes = batches.SHARES[shares](ranks.size)
    batch = batches.make((sum(sizes), 5, 4, 3), rng, dtype)
    layer = batches.ours(batch, process_group=group, dtype=torch.float64 if dtype == torch.float64 else None)
    compare(ranks, batch, sizes, compiled(layer))


class Branches(nn.Module):
    """Two branches that do not depend on each other, of different width, and a residual sum."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(5)
        self.wide = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), syncbn.SyncBatchNorm(6, process_group=group))
        self.narrow = nn.Sequential(nn.Conv2d(3, 4, 1), syncbn.SyncBatchNorm(4, process_group=group), nn.SiLU())
        self.join = nn.Sequential(nn.Conv2d(4, 6, 1), syncbn.SyncBatchNorm(6, process_group=group))

    def forward(self, x):
        return nn.functional.silu(self.wide(x) + self.join(self.narrow(x)))


def track(ranks, run, eager, sizes, rng, *, steps=4, more=1):
    """Trains both, with more samples at every step, and checks that they stay together."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (run, eager)]
    for step in range(steps):
        n = sizes[ranks.rank] + more * step
        x = torch.randn(sum(sizes) + ranks.size * more * step, 3, 5, 5, generator=rng)[:n] + ranks.rank
        for model, optimizer in zip((run, eager), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(run.state_dict().items(), eager.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-5, name)


def test_branches_and_changing_batches_equal_the_eager_model(ranks, rng, group):
    eager = Branches(group)
    model = copy.deepcopy(eager)
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    track(ranks, compiled(model, backend=backend), eager, [r + 2 for r in range(ranks.size)], rng)
    ranks.check(backend.frame_count <= 2, f"{backend.frame_count} graphs: one of the first size, one of any")


@pytest.mark.parametrize("frozen", [False, True])
def test_collectives_of_branches_keep_the_order_of_the_program(ranks, counting, frozen):
    """Also on a rank where nothing requires a gradient: the anchor makes it join."""
    model = Branches(None)
    run = compiled(model)
    x = torch.randn(3, 3, 5, 5)
    run(x).sum().backward()
    counting.sent.clear()
    model.requires_grad_(not (frozen and ranks.rank == ranks.size - 1))
    run(x).sum().backward()
    numbers = [count for count, _ in counting.sent]
    ranks.check(numbers[:3] == [2 * 6 + 15, 2 * 4 + 15, 2 * 6 + 15], f"forward {numbers}")
    ranks.check(sorted(numbers[3:]) == [2 * 4 + 7, 2 * 6 + 7, 2 * 6 + 7], f"backward {numbers}")
    table = ranks.transport.all_reduce(torch.tensor(numbers, dtype=torch.float64))
    ranks.check_equal(table, torch.tensor(numbers, dtype=torch.float64) * ranks.size, "one order on all ranks")


def test_the_first_compiled_step_compares_settings_once(ranks, counting):
    layer = syncbn.SyncBatchNorm(C)
    run = compiled(layer)
    x = torch.randn(3, C)
    run(x).sum().backward()
    run(x).sum().backward()
    layer(x)  # and the eager layer knows
    agreement = [] if ranks.size == 1 else [(7 * ranks.size + 7, torch.float64)]
    ranks.check(counting.sent == [*agreement, *[FORWARD, BACKWARD] * 2, FORWARD], f"{counting.sent}")


def test_a_compiled_rank_meets_eager_ranks(ranks, rng):
    """A compiler may give up on one rank: both ways send the same wires at the same time."""
    sizes = batches.SHARES["uneven"](ranks.size)
    batch = batches.make((sum(sizes), 5, 4, 3), rng)
    layer = batches.ours(batch)
    run = compiled(layer) if ranks.rank == 0 else layer
    compare(ranks, batch, sizes, run)
    compare(ranks, batch, sizes, run)


def test_a_mask_is_compiled_with_the_rest(ranks, rng):
    batch = batches.make((3 * ranks.size, 5, 4), rng, torch.float64)
    mask = torch.rand(3 * ranks.size, 4, generator=rng) > 0.3
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    eager = batches.ours(batch, dtype=torch.float64)
    layer = copy.deepcopy(eager)
    results = []
    for run in (compiled(layer), eager):
        x = batch.x[mine].detach().clone().requires_grad_()
        y = run(x, mask[mine])
        y.backward(batch.grad_y[mine])
        results.append((y.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        ranks.check_close(ours, theirs, 1e-12)
    ranks.check_close(layer.running_var, eager.running_var, 1e-12)


@pytest.mark.immediate_errors
def test_a_bad_mask_on_one_rank_is_one_error_on_all(ranks):
    bad = torch.ones(3, 4) - 2 * float(ranks.rank == 0)
    run = compiled(syncbn.SyncBatchNorm(5))
    ranks.raises(ValueError, lambda: run(torch.randn(3, 5, 4), bad), "On rank 0", "finite mask values >= 0")


@pytest.mark.immediate_errors
def test_sizes_that_a_graph_holds_as_symbols_are_numbers_in_an_error(ranks):
    run = compiled(syncbn.SyncBatchNorm(5))
    for n in (3, 4):
        run(torch.randn(n, 5, 4), torch.ones(n, 4))
    mask = torch.ones(5, 4 - (ranks.rank == 0))
    parts = ("On rank 0", "received (5, 3) for an input of shape (5, 5, 4)")
    ranks.raises(ValueError, lambda: run(torch.randn(5, 5, 4), mask), *parts)


@pytest.mark.immediate_errors
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in UNTRACEABLE])
def test_bad_input_on_one_rank_is_one_error_on_all(ranks, fault):
    make, kind, parts = FAULTS[fault]
    layer = syncbn.SyncBatchNorm(5)
    run, good = compiled(layer), torch.randn(3, 5)
    x = make() if ranks.rank == ranks.size - 1 else good
    ranks.raises(kind, lambda: run(x), f"rank {ranks.size - 1}", *parts)
    ranks.check(layer.num_batches_tracked == 0, "nothing was tracked")
    run(good).sum().backward()
    ranks.check(layer.num_batches_tracked == 1, "the next step works")


@pytest.mark.ranks(2)
@pytest.mark.immediate_errors
def test_disagreements_are_one_error_on_all(ranks):
    run = compiled(syncbn.SyncBatchNorm(5))
    x = torch.randn(3, 5)
    half = x.to(torch.bfloat16 if ranks.rank == 1 else torch.float32)
    ranks.raises(TypeError, lambda: run(half), "one dtype on every rank", "bfloat16 on rank 1")

    def call():
        with torch.set_grad_enabled(ranks.rank != 1):
            run(x)

    ranks.raises(ValueError, call, "torch.is_grad_enabled()", "False on rank 1")
    one = x[: int(ranks.rank == 0)]
    ranks.raises(ValueError, lambda: run(one), "at least 2 values per channel", "received 1")
    other = compiled(syncbn.SyncBatchNorm(5, eps=0.25 if ranks.rank == 1 else 0.5))
    ranks.raises(ValueError, lambda: other(x), "same eps", "0.25 on rank 1")


@pytest.mark.ranks(2)
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # it imports parts of torch that torch itself has deprecated
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.cpu("torch generates no code for the device of host memory")
def test_torchs_own_code_generator_equals_the_eager_model(ranks, rng):
    """A graph of one size. Those of any size: test_compile_order.py."""
    if ranks.size > 3:
        pytest.skip("every rank compiles, and cores are few")
    eager = Branches(None)
    model = copy.deepcopy(eager)
    track(ranks, compiled(model, backend="inductor"), eager, [2, 3, 4][: ranks.size], rng, steps=3, more=0)
