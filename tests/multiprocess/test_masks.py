# SPDX-License-Identifier: BSD-3-Clause
"""A mask over padded sequences equals dropping the padding, over ranks of which some may have nothing left."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import syncbn
from syncbn import functional
from tests.multiprocess import batches, test_collectives
from tests.multiprocess.test_collectives import BACKWARD, FORWARD, C, settled

pytestmark = pytest.mark.ranks(1)
counting = test_collectives.counting

LENGTHS = {
    "uneven": lambda rank, size: [(3 * rank + i) % 7 + 1 for i in range(rank + 2)],
    "a rank all masked": lambda rank, size: [0, 0] if rank == size - 1 and size > 1 else [4, 7, 1],
    "a rank without sequences": lambda rank, size: [] if rank == 0 and size > 1 else [2, 5],
}
L = 7


def padded(ranks, rng, which, dtype=torch.float64):
    """Sequences of every rank, padded with what must not count, and this rank's rows."""
    lengths = [LENGTHS[which](rank, ranks.size) for rank in range(ranks.size)]
    flat = torch.tensor([length for own in lengths for length in own])
    mask = torch.arange(L) < flat.view(-1, 1)
    batch = batches.make((len(flat), C, L), rng, dtype)
    batch.x[(~mask).unsqueeze(1).expand_as(batch.x)] = 1e6
    batch.grad_y[(~mask).unsqueeze(1).expand_as(batch.x)] = 0
    return SimpleNamespace(batch=batch, mask=mask, mine=ranks.shares([len(own) for own in lengths])[ranks.rank])


def dropped(case):
    """What torch's layer makes of the sequences without their padding, as one batch of single values."""
    batch, rows = case.batch, lambda t: t.transpose(1, 2)[case.mask]
    layer = batches.load(nn.BatchNorm1d(C, dtype=torch.float64), batch)
    exact = batches.run(layer, rows(batch.x.double()), rows(batch.grad_y.double()))
    return exact, layer


@pytest.mark.parametrize("form", ["(N, L)", "(N, 1, L)", "weights"])
@pytest.mark.parametrize("which", LENGTHS)
def test_a_mask_equals_dropping_the_padding(ranks, rng, which, form):
    case = padded(ranks, rng, which)
    exact, theirs = dropped(case)
    mask = case.mask[case.mine]
    own = {"(N, L)": mask, "(N, 1, L)": mask.unsqueeze(1), "weights": mask.float()}[form]
    layer = batches.ours(case.batch, dtype=torch.float64)
    x = case.batch.x[case.mine].clone().requires_grad_()
    y = layer(x, own)
    y.backward(case.batch.grad_y[case.mine])
    before = int(case.mask[: case.mine.start].sum())
    rows = slice(before, before + int(mask.sum()))
    ranks.check_close(y.detach().transpose(1, 2)[mask], exact.y[rows], 1e-10, "y")
    ranks.check_close(x.grad.transpose(1, 2)[mask], exact.grad_x[rows], 1e-10, "grad_x")
    ranks.check(bool((x.grad.transpose(1, 2)[~mask] == 0).all()), "padding gets no gradient")
    ranks.check_close(layer.running_mean, exact.mean, 1e-10, "running mean")
    ranks.check_close(layer.running_var, exact.var, 1e-10, "running variance")
    summed = ranks.transport.all_reduce(torch.stack((layer.weight.grad, layer.bias.grad)))
    ranks.check_close(summed, torch.stack((theirs.weight.grad, theirs.bias.grad)), 1e-10, "parameters")


def test_without_the_mask_the_padding_counts(ranks, rng):
    """The negative control: the comparison above can fail."""
    case = padded(ranks, rng, "uneven")
    exact, _ = dropped(case)
    layer = batches.ours(case.batch, dtype=torch.float64)
    layer(case.batch.x[case.mine])
    ranks.check((layer.running_mean - exact.mean).abs().max() > 1, "running mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_mask_works_in_every_dtype(ranks, rng, dtype):
    case = padded(ranks, rng, "uneven", dtype)
    exact, _ = dropped(case)
    mask = case.mask[case.mine]
    x = case.batch.x[case.mine].clone().requires_grad_()
    y = batches.ours(case.batch)(x, mask=mask)
    y.backward(case.batch.grad_y[case.mine])
    ranks.check(y.dtype == x.grad.dtype == dtype)
    before = int(case.mask[: case.mine.start].sum())
    expected = exact.y[before : before + int(mask.sum())].to(dtype)
    ranks.check_close(y.detach().transpose(1, 2)[mask], expected, 4e-2 if dtype == torch.bfloat16 else 2e-6, "y")


def test_a_rank_with_a_mask_meets_ranks_without(ranks, rng, counting):
    """Both send the same wires: what is given on one rank decides nothing."""
    batch = batches.make((3 * ranks.size, C, 4), rng, torch.float64)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    layer = batches.load(settled(counting, dtype=torch.float64, momentum=1.0), batch)
    x = batch.x[mine].detach().clone().requires_grad_()
    y = layer(x, mask=torch.ones(3, 4) if ranks.rank == 0 else None)
    y.backward(batch.grad_y[mine])
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")
    exact = batches.exact(batch)
    ranks.check_close(y.detach(), exact.y[mine], 1e-12, "y")
    ranks.check_close(x.grad, exact.grad_x[mine], 1e-12, "grad_x")


def test_all_masked_everywhere_leaves_the_statistics_alone(ranks):
    layer = syncbn.SyncBatchNorm(C)
    x = torch.randn(3, C, 4, requires_grad=True)
    layer(x, mask=torch.zeros(3, 4)).sum().backward()
    ranks.check_equal(layer.running_mean, torch.zeros(C))
    ranks.check_equal(layer.running_var, torch.ones(C))
    ranks.check(
        layer.num_batches_tracked == 1 and bool(x.grad.isfinite().all()), "the batch is counted, and moves nothing"
    )


def ones():
    return torch.ones(3, 4)


def changed(value):
    mask = ones()
    mask[1, 2] = value
    return mask


FAULTS = {
    "shape": (lambda: torch.ones(4, 3), ValueError, ["mask.shape", "(N, *spatial)", "(4, 3)", "(3, 5, 4)"]),
    "one a channel": (lambda: torch.ones(3, 5, 4), ValueError, ["(3, 5, 4)", "One weight counts for all channels"]),
    "negative": (lambda: changed(-2.0), ValueError, ["finite mask values >= 0", "from -2 to 1", "Use booleans"]),
    "all negative": (lambda: -ones(), ValueError, ["finite mask values >= 0", "from -1 to -1"]),
    "huge": (lambda: -1e300 * ones().double(), ValueError, ["finite mask values >= 0", "from -1e+300"]),
    "NaN": (lambda: changed(torch.nan), ValueError, ["finite mask values >= 0", "1 of them NaN"]),
    "infinite": (lambda: changed(torch.inf), ValueError, ["finite mask values >= 0", "to inf"]),
    "complex": (lambda: ones().to(torch.complex64), TypeError, ["booleans or weights", "complex64"]),
    "a list": (lambda: [1, 1, 0], TypeError, ["torch.Tensor as mask", "list"]),
    "a gradient": (lambda: ones().requires_grad_(), ValueError, ["requires_grad=True", "mask.detach()"]),
}


@pytest.mark.immediate_errors
@pytest.mark.parametrize("others", ["masked", "unmasked"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_mask_on_one_rank_is_one_error_on_all(ranks, fault, others):
    make, kind, parts = FAULTS[fault]
    layer, bad = syncbn.SyncBatchNorm(C), ranks.rank == ranks.size - 1
    before = copy.deepcopy(layer.state_dict())
    mask = make() if bad else ones() if others == "masked" else None
    ranks.raises(kind, lambda: layer(torch.randn(3, C, 4), mask=mask), f"rank {ranks.size - 1}", *parts)
    for key, value in before.items():
        ranks.check_equal(layer.state_dict()[key], value, key)
    layer(torch.randn(3, C, 4), mask=ones())
    ranks.check(layer.num_batches_tracked == 1, "the next step works")


@pytest.mark.parametrize("others", ["masked", "unmasked"])
@pytest.mark.parametrize("fault", ["shape", "negative", "NaN"])
def test_after_a_bad_mask_all_ranks_are_in_step(ranks, rng, fault, others):
    """Also where ranks with a mask know of the error at once, and those without later."""
    make, kind, parts = FAULTS[fault]
    layer, bad, text = syncbn.SyncBatchNorm(C), ranks.rank == ranks.size - 1, ""
    mask = make() if bad else ones() if others == "masked" else None
    try:
        layer(torch.randn(3, C, 4), mask=mask)
        ranks.world.check()
    except kind as error:
        text = str(error)
    alone = "received a wrong one on 1 of" in text
    ranks.check(all(part in text for part in parts) or (alone and not bad), text)
    ranks.check_equal(layer.running_var, torch.ones(C), "nothing moved")
    batch = batches.make((2 * ranks.size, C, 4), rng)
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    got = batches.run(batches.load(layer, batch), batch.x[mine], batch.grad_y[mine])
    ranks.check_close(got.y, batches.exact(batch).y[mine], 1e-5, "y")
    ranks.check_close(got.grad_x, batches.exact(batch).grad_x[mine], 1e-5, "grad_x")


@pytest.mark.ranks(2)
def test_weights_below_one_are_too_few_also_for_an_empty_share_without_a_mask(ranks):
    layer, text = syncbn.SyncBatchNorm(C), ""
    mask = torch.zeros(3, 4)
    mask[0, 0] = 0.5
    try:
        layer(torch.randn(3, C, 4), mask) if ranks.rank == 0 else layer(torch.randn(0, C, 4))
        ranks.world.check()
    except ValueError as error:
        text = str(error)
    ranks.check("at least 2 values per channel" in text and "received 0.5" in text, text)
    ranks.check_equal(layer.running_var, torch.ones(C), "nothing moved")


def test_weights_that_sum_to_one_are_too_few(ranks):
    mask = torch.zeros(3, 4)
    mask[0, 0] = 0.5 if ranks.rank == 0 else 0.0
    layer = syncbn.SyncBatchNorm(C)
    parts = ["at least 2 values per channel", "received 0.5", "model.eval()"]
    ranks.raises(ValueError, lambda: layer(torch.randn(3, C, 4), mask), *parts)


def test_the_function_takes_a_mask_too(ranks, rng):
    case = padded(ranks, rng, "a rank all masked")
    exact, _ = dropped(case)
    mean, var = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    functional.sync_batch_norm(case.batch.x[case.mine], mean, var, mask=case.mask[case.mine])
    ranks.check_close(mean, exact.mean, 1e-10, "running mean")
    ranks.check_close(var, exact.var, 1e-10, "running variance")
