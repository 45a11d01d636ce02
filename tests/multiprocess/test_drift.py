# SPDX-License-Identifier: BSD-3-Clause
"""drift measures what one process computes from all local batches, on every rank alike."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import moments
from syncbn.training.drift import local
from syncbn.transports import gather
from tests.multiprocess.test_collectives import counting  # noqa: F401

pytestmark = [
    pytest.mark.ranks(1),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

C = 6


def equal_everywhere(ranks, report):
    """Asserts that every rank has the same rows."""
    own = report.to_json()
    digest = torch.tensor(moments.text_hash(own), dtype=torch.float64, device="cpu")
    table = gather.gather(digest, ranks.transport)
    ranks.check(bool((table == table[0]).all()), own)


def measured(ranks, layer, calls, masks=None):
    """The row of a layer after these calls. Each call is the list of the local batches of all ranks."""
    with syncbn.drift(layer) as report:
        for i, batch in enumerate(calls):
            layer(batch[ranks.rank], *(() if masks is None else (masks[i][ranks.rank],)))
    equal_everywhere(ranks, report)
    return report.rows[0]


def flat(x):
    return x.transpose(0, 1).reshape(x.size(1), -1).double()


def oracle(calls):
    """mean_drift and var_drift by their definition, in one process."""
    shifts, logs = [], []
    for batch in calls:
        everything = flat(torch.cat(batch))
        for x in (flat(part) for part in batch if part.numel()):
            shifts.append((x.mean(1) - everything.mean(1)) / everything.std(1))
            if x.size(1) > 1:
                logs.append((x.var(1) / everything.var(1)).log())
    return tuple(math.sqrt(torch.stack(each).square().mean()) for each in (shifts, logs))


def plain(kind=nn.BatchNorm2d, width=C, **options):
    return kind(width, **options)


KINDS = {"torch's": nn.BatchNorm2d, "ours": syncbn.SyncBatchNorm}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_drift_is_what_one_process_computes_from_all_local_batches(ranks, rng, kind, mean):
    """Uneven local batches, other means and widths on each rank."""
    calls = [
        [torch.randn(2 + r, C, 3, 4, generator=rng) * (1 + r) + mean + r * step for r in range(ranks.size)]
        for step in range(3)
    ]
    row = measured(ranks, plain(KINDS[kind]), calls)
    mean_drift, var_drift = oracle(calls)
    ranks.check(math.isclose(row.mean_drift, mean_drift, rel_tol=1e-9, abs_tol=1e-9), f"{row} {mean_drift}")
    ranks.check(math.isclose(row.var_drift, var_drift, rel_tol=1e-9, abs_tol=1e-9), f"{row} {var_drift}")
    sizes = [12 * (2 + r) for r in range(ranks.size)]
    ranks.check((row.name, row.kind, row.C, row.calls) == ("", KINDS[kind].__name__, C, 3), f"{row}")
    ranks.check((row.count_local, row.count_global) == (sum(sizes) / ranks.size, sum(sizes)), f"{row}")


@pytest.mark.ranks(2)
def test_a_known_shift_and_a_known_scale_are_found(ranks, rng):
    """Even ranks have mean +1 and std 1, odd ones mean -1 and std 3: on 2 ranks all of it follows by hand."""
    n, W = 4000, ranks.size
    means, stds = [1.0 - 2 * (r % 2) for r in range(W)], [1.0 + 2 * (r % 2) for r in range(W)]
    batch = [torch.randn(n, C, generator=rng) * stds[r] + means[r] for r in range(W)]
    row = measured(ranks, nn.BatchNorm1d(C), [batch, batch])
    middle = sum(means) / W
    var = sum(s**2 + (m - middle) ** 2 for s, m in zip(stds, means, strict=True)) / W
    shift = math.sqrt(sum((m - middle) ** 2 for m in means) / W / var)
    scale = math.sqrt(sum(math.log(s**2 / var) ** 2 for s in stds) / W)
    ranks.check(math.isclose(row.mean_drift, shift, rel_tol=0.02), f"{row} {shift}")
    ranks.check(math.isclose(row.var_drift, scale, rel_tol=0.02), f"{row} {scale}")
    ranks.check(math.isclose(row.steady, row.mean_drift, rel_tol=1e-6), f"the same at every step: {row}")
    ranks.check(row.excess > 0.9 * (shift**2 + scale**2 / 4), f"{row}")


COUNTS = {
    "2 samples": lambda W: [2] * W,
    "16 samples": lambda W: [16] * W,
    "uneven": lambda W: [3 + 9 * r for r in range(W)],
    "one sample, and an empty rank": lambda W: [8, 1, 0, 5][:W],
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("counts", COUNTS)
def test_independent_samples_have_the_expected_drift(ranks, rng, counts):
    sizes, width = COUNTS[counts](ranks.size), 400
    calls = [[torch.randn(n, width, generator=rng) for n in sizes] for _ in range(12)]
    row = measured(ranks, syncbn.SyncBatchNorm(width), calls)
    ranks.check(math.isclose(row.mean_ratio, 1.0, abs_tol=0.05), f"{row}")
    ranks.check(math.isclose(row.var_ratio, 1.0, abs_tol=0.05), f"{row}")
    if len(set(sizes)) == 1:
        formula = math.sqrt((1 - 1 / ranks.size) / sizes[0])
        ranks.check(math.isclose(row.mean_expected, formula, rel_tol=1e-12), f"{row} {formula}")
    ranks.check(row.steady < 0.5 * row.mean_drift, f"nothing is steady: {row}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["uniform", "exponential"])
def test_the_tails_of_a_distribution_are_no_drift(ranks, rng, name):
    """The variance of uniform samples varies 0.4 times as much as that of normal ones, of exponential 4 times."""
    draw = {"uniform": lambda u: u, "exponential": lambda u: -u.log1p()}[name]
    make = lambda: draw(-torch.rand(2000, 50, generator=rng))  # noqa: E731
    row = measured(ranks, syncbn.SyncBatchNorm(50), [[make() for _ in range(ranks.size)] for _ in range(8)])
    normal = math.sqrt(2 * (1 - 1 / ranks.size) / 2000)
    factor = {"uniform": math.sqrt(0.4), "exponential": 2.0}[name]
    ranks.check(math.isclose(row.var_expected, normal * factor, rel_tol=0.05), f"{row}")
    ranks.check(math.isclose(row.var_ratio, 1.0, abs_tol=0.1), f"{row}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("per_rank", [2, 8])
def test_maps_of_repeated_values_have_their_known_effective_size(ranks, rng, per_rank):
    """Each value fills a square of 4 x 4 pixels: of 64 pixels 4 are independent."""
    width = 300
    make = lambda: torch.randn(per_rank, width, 2, 2, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)  # noqa: E731
    row = measured(ranks, syncbn.SyncBatchNorm(width), [[make() for _ in range(ranks.size)] for _ in range(12)])
    ranks.check(row.count_local == 64 * per_rank, f"{row}")
    ranks.check(math.isclose(row.count_effective, 4 * per_rank, rel_tol=0.05), f"{row}")
    ranks.check(3.9 < row.mean_ratio < 4.7, f"sqrt(16), and more where the batch is small: {row}")


@pytest.mark.ranks(2)
def test_a_mask_leaves_out_what_it_covers(ranks, rng):
    """Covered values are NaN: they count nowhere. The layer gets them as 0, since it normalises them too."""
    batch = [torch.randn(4, C, 5, generator=rng) + r for r in range(ranks.size)]
    masks = [torch.rand(4, 5, generator=rng) > 0.3 for _ in batch]
    row = measured(ranks, syncbn.SyncBatchNorm(C), [batch], [masks])
    kept = [x.transpose(1, 2)[mask] for x, mask in zip(batch, masks, strict=True)]
    mean_drift, var_drift = oracle([kept])
    ranks.check(math.isclose(row.mean_drift, mean_drift, rel_tol=1e-9), f"{row} {mean_drift}")
    ranks.check(math.isclose(row.var_drift, var_drift, rel_tol=1e-9), f"{row} {var_drift}")
    spoilt = torch.where(masks[0][:, None], batch[0], math.nan)
    ranks.check(local.moments(spoilt, masks[0], C)[0] == masks[0].sum(), "count")
    ranks.check(bool(local.moments(spoilt, masks[0], C)[3].isfinite().all()), "NaN under a mask")


def test_constant_channels_and_values_that_are_not_finite_are_left_out(ranks, rng):
    batch = [torch.randn(5, C, 3, generator=rng) + r for r in range(ranks.size)]
    expected = oracle([[x[:, 2:] for x in batch]])
    for x in batch:
        x[:, 0] = 0.1
    batch[-1][0, 1, 0] = math.nan
    row = measured(ranks, syncbn.SyncBatchNorm(C), [batch])
    ranks.check(row.constant == 2, f"{row}")
    ranks.check(math.isclose(row.mean_drift, expected[0], rel_tol=1e-9, abs_tol=1e-12), f"{row} {expected}")
    ranks.check(math.isclose(row.var_drift, expected[1], rel_tol=1e-9, abs_tol=1e-12), f"{row} {expected}")


@pytest.mark.ranks(2)
def test_a_channel_that_is_constant_on_one_rank_has_no_variance_there(ranks, rng):
    """In float64 the mean of fifteen times 0.1 is not 0.1, so the variance is not 0 but rounding, of 1e-34."""
    batch = [torch.randn(5, C, 3, generator=rng, dtype=torch.float64) for _ in range(ranks.size)]
    batch[0][:, 0] = 0.1
    row = measured(ranks, syncbn.SyncBatchNorm(C, dtype=torch.float64), [batch])
    ranks.check(local.moments(batch[0], None, C)[3][0] == 0, "the variance of the constant channel")
    ranks.check(row.constant == 0 and row.var_drift < 3, f"{row}")


def test_of_very_many_channels_some_are_measured(ranks, rng, monkeypatch):
    monkeypatch.setattr(local, "LIMIT", 8 * ranks.size)
    monkeypatch.setattr(local, "LEAST", 1)
    batch = [torch.randn(5, 32, generator=rng) + r for r in range(ranks.size)]
    row = measured(ranks, syncbn.SyncBatchNorm(32), [batch])
    ranks.check(math.isclose(row.mean_drift, oracle([[x[:, ::4] for x in batch]])[0], abs_tol=1e-12), f"{row}")
    ranks.check(row.C == 32)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("off", [0, 1])
def test_the_rank_whose_data_is_off_is_named_and_no_other(ranks, rng, off):
    shift = lambda r: 3.0 * (r == off)  # noqa: E731
    model = nn.Sequential(nn.BatchNorm1d(C), nn.BatchNorm1d(C))
    even = [[torch.randn(64, C, generator=rng) for r in range(ranks.size)] for _ in range(4)]
    with syncbn.drift(model) as report:
        for batch in even:
            model(batch[ranks.rank])
    ranks.check(report.warnings == [] and report.rows[0].rank_off is None, f"{report.warnings}")
    with syncbn.drift(model) as report:
        for batch in even:
            model(batch[ranks.rank] + shift(ranks.rank))
    ranks.check(report.rows[0].rank_off == off, f"{report.rows[0]}")
    ranks.check(report.warnings[0].startswith(f"Rank {off}'s data is off") and "'0'" in report.warnings[0])
    ranks.check(len(report.warnings) == 1 and f"WARNING: Rank {off}" in report.table(), report.table())


@pytest.mark.ranks(2)
def test_running_statistics_of_plain_layers_differ_and_of_ours_do_not(ranks, rng):
    model = nn.Sequential(nn.BatchNorm1d(C, momentum=1.0), syncbn.SyncBatchNorm(C, momentum=1.0))
    batch = [torch.randn(50, C, generator=rng) + 2 * r for r in range(ranks.size)]
    with syncbn.drift(model) as report:
        for _ in range(2):
            model(batch[ranks.rank])
    mean = torch.stack([x.double().mean(0) for x in batch])
    var = torch.stack([x.double().var(0) for x in batch])
    d2 = (mean - mean.mean(0)).square() / var.mean(0) + ((var / var.mean(0)).log() / 2).square()
    ranks.check(math.isclose(report.rows[0].running, math.sqrt(d2.mean()), rel_tol=1e-5), f"{report.rows[0]}")
    ranks.check(report.rows[1].running == 0, f"{report.rows[1]}")


@pytest.mark.ranks(2)
def test_collectives_are_timed_where_there_are_some(ranks, rng):
    model = nn.Sequential(nn.BatchNorm1d(C), syncbn.SyncBatchNorm(C))
    x = torch.randn(4, C, generator=rng, requires_grad=True)
    with syncbn.drift(model) as report:
        for _ in range(3):
            model(x).sum().backward()
    ranks.check(report.rows[0].seconds is None, f"{report.rows[0]}")
    ranks.check(0 < report.rows[1].seconds < 1, f"{report.rows[1]}")


@pytest.mark.ranks(2)
def test_reports_may_be_open_inside_each_other(ranks, rng):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    x = torch.randn(6, 3, generator=rng)
    with syncbn.drift(model) as outer:
        model(x)
        with syncbn.drift(model) as inner:
            model(x)
            model(x)
        model(x)
    for report in (outer, inner):
        ranks.check(0 < report.rows[0].seconds < 1, f"{report.rows[0]}")
    ranks.check(model(x).isfinite().all().item(), "the layer has its own group again")


def test_a_sub_group_has_a_report_of_its_own(ranks, rng):
    group = ranks.world.subgroup(1)
    batch = torch.randn(5, C, generator=rng) + ranks.rank
    layer = nn.BatchNorm1d(C)
    with syncbn.drift(layer, group) as report:
        for _ in range(1 + ranks.rank):  # ranks of other groups are not waited for
            layer(batch)
    ranks.check(report.rows[0].mean_drift == 0 and report.rows[0].calls == 1 + ranks.rank, f"{report.rows}")


def test_a_copy_made_inside_is_not_measured_and_the_report_can_be_pickled(ranks, rng):
    model, x = nn.Sequential(nn.BatchNorm1d(C), syncbn.SyncBatchNorm(C)), torch.randn(4, C, generator=rng)
    with syncbn.drift(model) as report:
        model(x)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for each in copies:
            each(x)
    ranks.check(report.rows[0].calls == 1, f"{report.rows}")
    ranks.check(pickle.loads(pickle.dumps(report)).rows == report.rows, "the report")
    ranks.check(bool(str(report)) == (ranks.rank == 0), "printed by rank 0")
