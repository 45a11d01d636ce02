# SPDX-License-Identifier: BSD-3-Clause
"""recalibrate makes the running statistics those of all given data over all ranks, exactly, or changes nothing."""

import copy

import pytest
import torch
from torch import nn

import syncbn
from syncbn.transports import gather
from tests.multiprocess.test_collectives import counting  # noqa: F401

pytestmark = pytest.mark.ranks(1)

C = 5


def data(ranks, rng, mean=1.0, dtype=torch.float64):
    """Batches of every rank: rank r has r + 1 of them, of r + 2 samples, each with a mean of its own."""
    make = lambda r, j: torch.randn(r + 2, C, 3, generator=rng, dtype=torch.float64) * (1 + j) + mean * (1 + r)  # noqa: E731
    return [[make(r, j).to(dtype) for j in range(r + 1)] for r in range(ranks.size)]


def everything(batches):
    return torch.cat([batch for share in batches for batch in share]).transpose(0, 1).reshape(C, -1).double()


def wrecked(**options):
    """A layer whose running statistics are far from anything."""
    layer = syncbn.SyncBatchNorm(C, dtype=torch.float64, **options)
    layer.running_mean.fill_(77.0)
    layer.running_var.fill_(1e-3)
    return layer


@pytest.mark.parametrize("mean", [1.0, 1e4])
def test_statistics_become_those_of_all_samples_of_all_ranks(ranks, rng, mean):
    batches = data(ranks, rng, mean)
    layer = wrecked()
    syncbn.recalibrate(layer, batches[ranks.rank])
    samples = everything(batches)
    relative = 1e-15 * max(1.0, mean) ** 2
    ranks.check_close(layer.running_mean / samples.mean(1), torch.ones(C), 1e-14, "mean")
    ranks.check_close(layer.running_var / samples.var(1), torch.ones(C), relative, "var")
    ranks.check(layer.num_batches_tracked == ranks.size, f"{layer.num_batches_tracked}")
    unequal = torch.stack([batch.mean((0, 2)) for share in batches for batch in share]).mean(0)
    ranks.check(ranks.size == 1 or (unequal - layer.running_mean).abs().max() > 1e-3, "batches count by their samples")


def network():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(C, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)
    )
    return model.double()


def test_later_layers_see_what_they_see_in_training(ranks, rng):
    """The oracle is one process that trains on the batches of all ranks, joined round by round."""
    batches = data(ranks, rng)
    oracle, seen = network().eval(), []
    norms = [oracle[1], oracle[5]]
    oracle[5].register_forward_hook(lambda _, args, __: seen.append(args[0].transpose(0, 1).reshape(6, -1)))
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for j in range(ranks.size):
            oracle(torch.cat([share[j] for share in batches if j < len(share)]))
    inputs = torch.cat(seen, 1)

    model = syncbn.convert_sync_batchnorm(network()).eval()
    syncbn.recalibrate(model, batches[ranks.rank])
    ranks.check_close(model[5].running_mean, inputs.mean(1), 1e-13, "mean")
    ranks.check_close(model[5].running_var, inputs.var(1), 1e-13, "var")
    ranks.check_equal(model[1].running_var, model[1].running_var.clone())
    ranks.check(model[5].num_batches_tracked == ranks.size)


def test_every_rank_ends_with_the_same_bits(ranks, rng):
    model = syncbn.convert_sync_batchnorm(network())
    syncbn.recalibrate(model, data(ranks, rng)[ranks.rank])
    values = torch.cat([model[1].running_var, model[5].running_mean])
    rows = gather.gather(values, ranks.transport)
    ranks.check(all(torch.equal(row, rows[0]) for row in rows))


def test_nothing_else_changes(ranks, rng):
    model = syncbn.convert_sync_batchnorm(network())
    model[5].renorm_limits = (3, 5)
    model.train()
    model[1].eval()
    parameters = copy.deepcopy(dict(model.named_parameters()))
    before = [(m.training, dict(m.__dict__)) for m in model]
    syncbn.recalibrate(model, data(ranks, rng)[ranks.rank])
    for name, parameter in model.named_parameters():
        ranks.check_equal(parameter, parameters[name], name)
    for module, (training, attributes) in zip(model, before, strict=True):
        ranks.check(module.training == training, f"{module} changed its mode")
        changed = {k for k, v in module.__dict__.items() if attributes[k] is not v}
        ranks.check(not changed, f"{changed}")
    layer = syncbn.SyncBatchNorm(C)
    layer(torch.randn(4, C))
    ranks.check(layer.num_batches_tracked == 1, "ordinary training goes on")


def test_renormalization_is_off_while_statistics_are_made(ranks, rng):
    batches = data(ranks, rng)
    plain, renormed = (syncbn.convert_sync_batchnorm(network()) for _ in range(2))
    renormed[1].renorm_limits = (3, 5)
    for model in (plain, renormed):
        syncbn.recalibrate(model.eval(), batches[ranks.rank])
    ranks.check_equal(renormed[5].running_var, plain[5].running_var)


def test_a_model_in_ddp_is_recalibrated_too(ranks, rng, torch_world):
    """DDP broadcasts buffers at every call: a rank that has no batch left must call it as often."""
    batches = data(ranks, rng)
    model, plain = (syncbn.convert_sync_batchnorm(network()).eval() for _ in range(2))
    syncbn.recalibrate(torch.nn.parallel.DistributedDataParallel(model), batches[ranks.rank])
    syncbn.recalibrate(plain, batches[ranks.rank])
    for name, value in plain.state_dict().items():
        ranks.check_equal(model.state_dict()[name], value, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, where dynamo is imported
def test_a_compiled_model_is_recalibrated_too(ranks, rng):
    batches = data(ranks, rng)
    model, plain = (syncbn.convert_sync_batchnorm(network()).eval() for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    x = batches[ranks.rank][0]
    stale = compiled(x)
    syncbn.recalibrate(compiled, batches[ranks.rank])
    syncbn.recalibrate(plain, batches[ranks.rank])
    ranks.check_equal(model[5].running_var, plain[5].running_var)
    ranks.check_close(compiled(x), plain(x), 1e-12, "what was compiled before uses the new statistics")
    ranks.check((compiled(x) - stale).abs().max() > 1e-3, "and they are others")


def test_frozen_and_untracked_layers_are_left_alone(ranks, rng):
    model = nn.Sequential(wrecked(), wrecked(), syncbn.SyncBatchNorm(C, track_running_stats=False).double())
    syncbn.freeze(model[0])
    syncbn.recalibrate(model, data(ranks, rng)[ranks.rank])
    ranks.check(bool((model[0].running_mean == 77).all()), "frozen")
    ranks.check(bool((model[1].running_mean != 77).all()), "not frozen")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = wrecked()

    def forward(self, x, *, shift=0.0):
        return self.norm(x + shift)


def test_a_layer_that_no_batch_reaches_keeps_its_statistics(ranks, rng):
    model = Named()
    model.unused = wrecked()
    syncbn.recalibrate(model, data(ranks, rng)[ranks.rank])
    ranks.check(bool((model.unused.running_mean == 77).all()))


def test_a_shared_layer_counts_both_of_its_inputs(ranks, rng):
    layer = wrecked()
    model = nn.Sequential(layer, nn.Identity(), layer)
    batches = data(ranks, rng)
    syncbn.recalibrate(model, batches[ranks.rank])
    ranks.check(layer.num_batches_tracked == 2 * ranks.size, f"{layer.num_batches_tracked}")
    first = everything(batches)
    ranks.check_close(layer.running_mean, first.mean(1) / 2, 1e-9, "half of the inputs have mean 0")


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, "target"), lambda x: [x], lambda x: {"x": x, "shift": 0.0}]
)
def test_a_batch_may_be_a_tensor_a_tuple_a_list_or_a_dict(ranks, rng, wrap):
    batches = data(ranks, rng)
    model = Named()
    syncbn.recalibrate(model, [wrap(x) for x in batches[ranks.rank]])
    ranks.check_close(model.norm.running_var, everything(batches).var(1), 1e-12)


def test_num_batches_limits_every_rank(ranks, rng):
    batches = data(ranks, rng)
    layer = wrecked()
    endless = (x for _ in iter(int, 1) for x in batches[ranks.rank])
    syncbn.recalibrate(layer, endless, num_batches=1)
    ranks.check_close(layer.running_var, everything([share[:1] for share in batches]).var(1), 1e-12)


def test_an_empty_batch_stands_for_no_data(ranks, rng):
    batches = data(ranks, rng)
    batches[0] = [batches[0][0][:0]] if ranks.size > 1 else batches[0]
    layer = wrecked()
    syncbn.recalibrate(layer, batches[ranks.rank])
    ranks.check_close(layer.running_var, everything(batches).var(1), 1e-12)


def test_group_statistics_are_merged_over_all_ranks(ranks, rng):
    """Each layer synchronises with itself alone, and still the data of all ranks count."""
    batches = data(ranks, rng)
    layer = wrecked(group_size=1)
    syncbn.recalibrate(layer, batches[ranks.rank])
    ranks.check_close(layer.running_var, everything(batches).var(1), 1e-12)


def test_it_communicates_as_it_says(ranks, rng, counting):  # noqa: F811
    syncbn.recalibrate(wrecked(), data(ranks, rng)[ranks.rank])
    W = ranks.size
    settings = [7 * W + 7] if W > 1 else []
    rounds = [9, 2 * C + 15] * W + [9]
    lengths = [n for n, _ in counting.sent]
    ranks.check(lengths == [4 * W + 7, *settings, *rounds, C + 1, C], f"{lengths}")


def test_the_bar_is_drawn_by_rank_zero_alone(ranks, rng, capsys):
    syncbn.recalibrate(wrecked(), data(ranks, rng)[ranks.rank], progress=True)
    drawn = capsys.readouterr().err
    ranks.check(("recalibrate" in drawn) == (ranks.rank == 0), repr(drawn))
    syncbn.recalibrate(wrecked(), data(ranks, rng)[ranks.rank])
    ranks.check(capsys.readouterr().err == "")
