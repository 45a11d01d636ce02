# SPDX-License-Identifier: BSD-3-Clause
"""Two or three features at once do what each of them alone promises."""

import contextlib
import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.calls import keys
from syncbn.transports import groups
from tests.calls.test_compile import compiled
from tests.calls.test_compile import pytestmark as warnings_of_torch
from tests.multiprocess import batches, test_collectives
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C

pytestmark = [pytest.mark.ranks(1), pytest.mark.timeout(300), *warnings_of_torch]
counting = test_collectives.counting


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def case(ranks, rng):
    """A global batch with weights for its values, and this rank's part of them."""
    batch = batches.make((3 * ranks.size, C, 4), rng, torch.float64)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    batch.mask = torch.rand(3 * ranks.size, 4, generator=rng) + 0.1
    batch.own = (batch.x[mine], batch.grad_y[mine])
    batch.own_mask, batch.mine = batch.mask[mine], mine
    return batch


def layer_of(**options):
    return syncbn.SyncBatchNorm(C, dtype=torch.float64, **options)


def step(run, x, grad_y, *args):
    x = x.detach().clone().requires_grad_()
    y = run(x, *args)
    y.backward(grad_y)
    return y.detach(), x.grad


def check_same(ranks, results, expected, detail=""):
    for ours, theirs in zip(results, expected, strict=True):
        ranks.check_close(ours, theirs, 1e-12 * (1.0 + theirs.abs().max().item() if theirs.numel() else 1.0), detail)


def no_sync_if(inside, layer):
    return syncbn.no_sync(layer) if inside else contextlib.nullcontext()


@pytest.mark.parametrize("by_name", [True, False])
def test_a_lazy_layer_takes_a_mask_also_on_one_rank_alone(ranks, case, by_name):
    layer = syncbn.LazySyncBatchNorm(dtype=torch.float64)
    mask = torch.ones(3, 4) if ranks.rank == 0 else None
    _ = layer(case.own[0], mask=mask) if by_name else layer(case.own[0], mask)
    ranks.check_close(layer.running_mean, 0.1 * case.x.mean((0, 2)), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_repeated_forward_goes_where_the_first_one_went(ranks, case, reentrant, inside, masked):
    """Forward inside no_sync and backward after it, and the other way round."""
    plain = layer_of()
    layer = copy.deepcopy(plain)
    mask = case.own_mask if masked else None
    x, again = (case.own[0].clone().requires_grad_() for _ in range(2))
    with no_sync_if(inside, plain):
        y = plain(x, mask)
    y.backward(case.own[1])
    with no_sync_if(inside, layer):
        y = checkpoint(layer, again, mask, use_reentrant=reentrant)
    with no_sync_if(not inside, layer):
        y.backward(case.own[1])
    ranks.check_close(again.grad, x.grad, 1e-12, "grad_x")
    ranks.check_close(layer.weight.grad, plain.weight.grad, 1e-12, "weight")
    ranks.check_close(layer.running_var, plain.running_var, 1e-12, "running variance")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_says_the_call_of_the_first_one_wherever_a_rank_is(ranks, case, reentrant):
    """Backward inside no_sync on one rank alone."""
    plain = layer_of()
    layer = copy.deepcopy(plain)
    x, again = (case.own[0].clone().requires_grad_() for _ in range(2))
    plain(x).backward(case.own[1])
    y = checkpoint(layer, again, use_reentrant=reentrant)
    with no_sync_if(ranks.rank == 0, layer):
        y.backward(case.own[1])
    ranks.check_close(again.grad, x.grad, 1e-12, "grad_x")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_no_sync_on_one_rank_says_nothing(ranks, case, counting, reentrant):
    layer = layer_of()
    with no_sync_if(ranks.rank == 0, layer):
        if ranks.rank == 0:
            y = checkpoint(layer, case.own[0].clone().requires_grad_(), use_reentrant=reentrant)
    if ranks.rank == 0:
        y.backward(case.own[1])
    ranks.check(counting.sent == [], f"{counting.sent}")


@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_a_compiled_layer_compares_nothing_anew_after_no_sync_on_one_rank(ranks, case, counting, way):
    layer = layer_of()
    run = compiled(layer)
    step(run, *case.own)
    if ranks.rank == 0:
        with syncbn.no_sync(layer):
            (run if way == "compiled" else layer)(case.own[0])
    counting.sent.clear()
    step(run, *case.own)
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")


ONE = groups.GroupSpec("blocks", (), size=1)
CHANGES = {
    "no_sync": [(), "no_sync", (), "no_sync"],
    "freeze": [(), syncbn.freeze, lambda m: m.train(), syncbn.unfreeze, lambda m: m.train()],
    "group": [lambda m, spec=spec: setattr(m, "process_group", spec) for spec in (None, ONE, None)],
    "limits": [lambda m, limits=limits: setattr(m, "renorm_limits", limits) for limits in (None, (1.1, 0.2), None)],
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_compilation_is_heard(ranks, case, what, masked):
    layer = layer_of()
    eager, run = copy.deepcopy(layer), compiled(layer)
    mask = case.own_mask if masked else None
    for change in CHANGES[what]:
        results = []
        for one, way in ((layer, run), (eager, eager)):
            if callable(change):
                change(one)
            with no_sync_if(change == "no_sync", one):
                results.append((*step(way, *case.own, mask), one.running_mean, one.running_var))
        check_same(ranks, *results, f"{what} {change}")


def test_a_compiled_layer_is_recalibrated_in_other_groups(ranks, case):
    layer = layer_of()
    run = compiled(layer)
    for size in (ranks.size, 1):
        layer.process_group = groups.GroupSpec("blocks", (), size=size)
        step(run, *case.own)
        syncbn.recalibrate(run, [case.own[0]])
        ranks.check_close(layer.running_mean, case.x.mean((0, 2)), 1e-12)


@pytest.mark.parametrize("alone", ["no_sync", "group_size"])
def test_a_mask_counts_in_the_own_share_alone(ranks, case, alone):
    layer = layer_of(group_size=1 if alone == "group_size" else None)
    mask = case.own_mask > 0.5
    with no_sync_if(alone == "no_sync", layer):
        step(layer, *case.own, mask)
    expected = nn.BatchNorm1d(C, dtype=torch.float64)
    expected(case.own[0].transpose(1, 2)[mask])
    ranks.check_close(layer.running_var, expected.running_var, 1e-12)


def test_masks_count_in_recalibration_and_nothing_of_it_stays(ranks, case):
    layer, mask = layer_of(), case.mask > 0.5
    before = len(keys.resolvers), len(keys.keys)
    own = {"input": case.own[0], "mask": mask[case.mine]}
    syncbn.recalibrate(layer, [own] * (ranks.rank + 1))
    shares = ranks.shares([3] * ranks.size)
    rows = torch.cat([case.x[s].transpose(1, 2)[mask[s]].repeat(r + 1, 1) for r, s in enumerate(shares)])
    ranks.check_close(layer.running_mean, rows.mean(0), 1e-12)
    ranks.check_close(layer.running_var, rows.var(0), 1e-12)
    gc.collect()
    ranks.check((len(keys.resolvers), len(keys.keys)) == before, "the recorder is kept")


def test_weights_that_sum_to_less_than_two_are_recalibrated(ranks):
    layer = layer_of()
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(2, C)
    weights = torch.tensor([0.75, 0.75] if ranks.rank == 0 else [0.0, 0.0])
    syncbn.recalibrate(layer, [{"input": x, "mask": weights}])
    ranks.check_close(layer.running_mean, torch.full((C,), 2.0), 1e-12)
    ranks.check_close(layer.running_var, torch.full((C,), 3.0), 1e-12)  # 1 * 1.5 / (1.5 - 1)


def penalty(run, layer, x):
    x = x.detach().clone().requires_grad_()
    y = run(x)
    (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (slope.square().sum() + y.square().sum()).backward()
    return x.grad, layer.weight.grad, layer.bias.grad, layer.running_var


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limits", [None, (1.2, 0.3)])
@pytest.mark.parametrize("where", ["everyone", "no_sync", "blocks", "an empty rank"])
def test_second_derivatives_of_a_checkpoint_are_the_plain_ones(ranks, case, masked, limits, where):
    part = slice(0, 0) if where == "an empty rank" and ranks.rank == 0 and ranks.size > 1 else slice(None)
    mask = case.own_mask[part] if masked else None
    results = []
    for checkpointed in (False, True):
        layer = batches.load(layer_of(renorm_limits=limits, group_size=1 if where == "blocks" else None), case)

        def run(x, layer=layer, checkpointed=checkpointed):
            with no_sync_if(where == "no_sync", layer):
                return checkpoint(layer, x, mask, use_reentrant=False) if checkpointed else layer(x, mask)

        results.append(penalty(run, layer, case.own[0][part]))
    check_same(ranks, *results)
    if where in ("no_sync", "blocks") and not masked and limits is None:
        alone = batches.load(nn.BatchNorm1d(C, dtype=torch.float64), case)
        check_same(ranks, results[0], penalty(alone, alone, case.own[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_compiled_layer_moves_statistics_once(ranks, case, reentrant):
    """It communicates again, on every rank alike."""
    layer = layer_of()
    plain, run = copy.deepcopy(layer), compiled(layer)
    for _ in range(2):
        got = step(lambda x: checkpoint(run, x, use_reentrant=reentrant), *case.own)
        check_same(ranks, got, step(plain, *case.own))
    ranks.check_close(layer.weight.grad, plain.weight.grad, 1e-12)
    check_same(ranks, layer.buffers(), plain.buffers())


def test_a_checkpoint_around_a_compiled_layer_that_renormalizes_is_refused(ranks):
    run = compiled(syncbn.SyncBatchNorm(C, renorm_limits=(2, 1)))
    y = checkpoint(run, torch.randn(3, C, requires_grad=True), use_reentrant=False)
    ranks.raises(RuntimeError, y.square().sum().backward, "running statistics of its first forward", "run it eagerly")


def test_a_lazy_layer_compiles(ranks, case):
    layer, plain = syncbn.LazySyncBatchNorm(dtype=torch.float64), layer_of()
    run = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        check_same(ranks, step(run, *case.own), step(plain, *case.own))


class Block(nn.Module):
    def __init__(self, layer, checkpointed):
        super().__init__()
        self.layer, self.checkpointed = layer, checkpointed

    def forward(self, x, mask):
        return checkpoint(self.layer, x, mask, use_reentrant=False) if self.checkpointed else self.layer(x, mask)


@pytest.mark.parametrize("limits", [None, (1.5, 0.5)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", ["eager", "compiled", "checkpoint"])
def test_in_ddp_it_equals_one_process(ranks, torch_world, case, way, masked, limits):
    layer, one = layer_of(renorm_limits=limits), layer_of(renorm_limits=limits)
    one.process_group = groups.ALONE
    model = DistributedDataParallel(Block(layer, way == "checkpoint"))
    run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    for _ in range(3):
        model.zero_grad()
        one.zero_grad()
        got = step(run, *case.own, case.own_mask if masked else None)
        exact = step(one, case.x, case.grad_y, case.mask if masked else None)
        check_same(ranks, got, [t[case.mine] for t in exact])
        ranks.check_close(layer.weight.grad * ranks.size, one.weight.grad, 1e-12, "weight")
        check_same(ranks, layer.buffers(), one.buffers())


def test_a_used_layer_copies_pickles_and_saves_only_its_state(ranks, case):
    layer = layer_of(renorm_limits=(2, 1), group_size=1)
    for run in (layer, compiled(layer)):
        step(run, *case.own, case.own_mask)
    penalty(layer, layer, case.own[0])
    with syncbn.no_sync(layer):
        step(lambda x: checkpoint(layer, x, use_reentrant=False), *case.own)
    syncbn.recalibrate(layer, [case.own[0]])
    syncbn.unfreeze(syncbn.freeze(layer)).train()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    ranks.check(torch.load(file, weights_only=True).keys() == nn.BatchNorm1d(C).state_dict().keys())
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    expected = (*step(layer, *case.own, case.own_mask), layer.running_var)
    for twin in twins:
        check_same(ranks, (*step(twin, *case.own, case.own_mask), twin.running_var), expected)
