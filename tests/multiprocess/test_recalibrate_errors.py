# SPDX-License-Identifier: BSD-3-Clause
"""What goes wrong in recalibrate() is one error on all ranks, and the model is as it was."""

import copy

import pytest
import torch
from torch import nn

import syncbn
from tests.multiprocess.test_recalibrate import C, data, network, wrecked

pytestmark = pytest.mark.ranks(1)


def broken(batches, after):
    for j, batch in enumerate(batches):
        if j == after:
            raise OSError("the disk is gone")
        yield batch


def test_a_loader_that_fails_on_one_rank_is_an_error_on_all_and_nothing_changed(ranks, rng):
    model = syncbn.convert_sync_batchnorm(network())
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(3, C, 2, dtype=torch.float64) for _ in range(3)]
    batches = broken(batches, 1) if ranks.rank == ranks.size - 1 else batches
    ranks.raises(RuntimeError, lambda: syncbn.recalibrate(model, batches), f"rank {ranks.size - 1}", "the disk is gone")
    for key, value in before.items():
        ranks.check_equal(model.state_dict()[key], value, key)
    ranks.check(model.training, "the mode is as it was")
    ranks.check(not any(spec is not None and spec.kind == "recorder" for spec, _ in syncbn.transports.dispatch.made))


def test_ctrl_c_leaves_the_model_as_it_was(ranks, rng):
    model = syncbn.convert_sync_batchnorm(network())
    before = copy.deepcopy(model.state_dict())

    def interrupted():
        yield torch.randn(3, C, 2, dtype=torch.float64)
        raise KeyboardInterrupt

    caught = False
    try:
        syncbn.recalibrate(model, interrupted())
    except KeyboardInterrupt:
        caught = True
    ranks.check(caught, "Ctrl-C is passed on")
    for key, value in before.items():
        ranks.check_equal(model.state_dict()[key], value, key)
    ranks.check(all(layer.process_group is None for layer in (model[1], model[5])), "and so are the groups")


def test_ctrl_c_while_statistics_are_written_undoes_them(ranks, rng, monkeypatch):
    model = syncbn.convert_sync_batchnorm(network())
    before = copy.deepcopy(model.state_dict())
    write, written = syncbn.training.recalibration.write, []

    def interrupted(layer, recorder):
        if written:
            raise KeyboardInterrupt
        written.append(write(layer, recorder))

    monkeypatch.setattr("syncbn.training.recalibration.write", interrupted)
    try:
        syncbn.recalibrate(model, data(ranks, rng)[ranks.rank])
    except KeyboardInterrupt:
        written.append("interrupted")
    ranks.check(len(written) == 2, f"{written}")
    for key, value in before.items():
        ranks.check_equal(model.state_dict()[key], value, key)


BAD = {
    "no batch": (lambda: [], ValueError, ["at least one batch on every rank", "no batch on rank", "x[:0]"]),
    "a number": (lambda: [3.0], TypeError, ["a tensor, a tuple or list", "received float"]),
    "an empty tuple": (lambda: [()], TypeError, ["received tuple"]),
    "no iterable": (lambda: 3, TypeError, ["int"]),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("where", ["last", "all"])
def test_bad_batches_are_one_error_on_all_ranks(ranks, fault, where):
    make, kind, parts = BAD[fault]
    bad = where == "all" or ranks.rank == ranks.size - 1
    batches = make() if bad else [torch.randn(3, C, dtype=torch.float64)]
    ranks.raises(kind, lambda: syncbn.recalibrate(wrecked(), batches), *parts)


def test_a_useless_limit_is_one_error(ranks):
    limit = 0 if ranks.rank == 0 else 1
    x = torch.randn(3, C, dtype=torch.float64)
    ranks.raises(ValueError, lambda: syncbn.recalibrate(wrecked(), [x], limit), "num_batches >= 1", "received 0")


def test_a_model_without_layers_is_refused(ranks):
    ranks.raises(ValueError, lambda: syncbn.recalibrate(nn.Linear(2, 2), [torch.randn(1, 2)]), "convert_sync_batchnorm")
    lazy = syncbn.LazySyncBatchNorm()
    ranks.raises(ValueError, lambda: syncbn.recalibrate(lazy, [torch.randn(4, 2)]), "1 of them lazy", "run one batch")


@pytest.mark.ranks(2)
def test_different_models_are_refused(ranks):
    model = nn.Linear(2, 2) if ranks.rank == 1 else syncbn.SyncBatchNorm(2)
    ranks.raises(ValueError, lambda: syncbn.recalibrate(model, [torch.randn(4, 2)]), "same number of layers", "rank 1")
