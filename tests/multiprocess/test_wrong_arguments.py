# SPDX-License-Identifier: BSD-3-Clause
"""A wrong argument on one rank: all raise one error that names the rank, and the next call is in step."""

import pytest
import torch
from torch import nn

import syncbn
from tests.conftest import DEVICE

pytestmark = pytest.mark.ranks(1)
X = torch.arange(12.0).reshape(2, 3, 2)


class NoLength(list):
    def __len__(self):
        raise TypeError("its length is not known")


def model():
    return syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))


def recalibrate(good=(model, [X], None), *, bad):
    return lambda odd: syncbn.recalibrate(*[a() if callable(a) else a for a in (bad if odd else good)])


def join(**bad):
    def call(odd):
        arguments = {"model": model(), **(bad if odd else {})}
        with syncbn.join(**arguments):
            pass

    return call


def init(**bad):
    return lambda odd: syncbn.init(**{"device": DEVICE, **(bad if odd else {})})


CASES = {
    "batches": (
        recalibrate(bad=(model, 5)),
        TypeError,
        "needs an iterable of batches; received int 5. Pass a DataLoader",
    ),
    "one dict": (recalibrate(bad=(model, {"x": X})), TypeError, "needs an iterable of batches; received dict"),
    "num_batches": (recalibrate(bad=(model, [X], "3")), TypeError, "an integer as num_batches, or None; received '3'"),
    "half a batch": (recalibrate(bad=(model, [X], 2.5)), TypeError, "an integer as num_batches, or None; received 2.5"),
    "no model": (recalibrate(bad=(5, [X])), TypeError, "syncbn.recalibrate needs a torch.nn.Module; received int"),
    "keywords": (recalibrate(bad=(model, [{1: X}])), TypeError, "needs batches that are a tensor"),
    "join 5": (join(model=5), TypeError, "syncbn.join needs a torch.nn.Module; received int"),
    "join throw": (join(throw_on_early_termination="x"), TypeError, "=True or False; received 'x'"),
    "join empty": (join(empty=5), TypeError, "syncbn.join needs a function as empty, or None; received 5"),
    "device": (init(device="foo"), ValueError, "syncbn.init needs a CPU or CUDA device, or None; received 'foo'"),
    "meta": (init(device="meta"), ValueError, "received 'meta'. None takes the GPU of the local rank"),
    "torch": (init(torch_distributed="no"), TypeError, "needs torch_distributed=True, False or None; received 'no'"),
    "no error": (
        lambda odd: syncbn.init(device=DEVICE).raise_together(False if odd else None),
        TypeError,
        "World.raise_together needs an exception, or None where all is well; received bool False",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_one_rank_with_a_wrong_argument_is_named_by_all(ranks, what):
    call, kind, text = CASES[what]
    last = ranks.size - 1
    ranks.raises(kind, lambda: call(ranks.rank == last), f"On rank {last}: ", text)


def test_a_loader_without_a_length_is_taken(ranks):
    layer = model()
    syncbn.recalibrate(layer, NoLength([X]))
    ranks.check_close(layer[0].running_mean, X.mean((0, 2)), 1e-6)
