# SPDX-License-Identifier: BSD-3-Clause
"""The same bits at any number of ranks: each run compares its number with one process, so 1 = 2 = 3 = 4."""

import pytest
import torch

from syncbn import moments
from syncbn.transports import single
from tests import fake_cuda
from tests.conftest import WANTED
from tests.multiprocess import batches

pytestmark = pytest.mark.ranks(1)
BATCHES = 6 if WANTED == fake_cuda.NAME else 20  # that device runs its kernels a thread at a time


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 3, 7, 5), (12, 64, 8, 8), (8, 16, 28, 28), (9, 130, 1, 3)], ids=str)
def test_float32_bits_do_not_depend_on_the_number_of_ranks(ranks, rng, monkeypatch, shape, layout):
    different = []
    for step in range(BATCHES):
        batch = batches.make(shape, rng, mean=step / 4.0)
        batch.x = batches.LAYOUTS[layout](batch.x)
        uneven = [shape[0] - ranks.size + 1] + [1] * (ranks.size - 1)
        mine = ranks.shares(uneven if step % 2 else None, shape[0])[ranks.rank]
        got = batches.run(batches.ours(batch), batch.x[mine], batch.grad_y[mine])
        with monkeypatch.context() as patch:
            patch.setattr("syncbn.transports.choose", lambda *_: single.SingleTransport())
            whole = batches.run(batches.ours(batch), batch.x, batch.grad_y)
        for name, part in (("y", mine), ("grad_x", mine), ("mean", slice(None)), ("var", slice(None))):
            if not torch.equal(getattr(got, name), getattr(whole, name)[part]):
                different.append(f"{name} of batch {step}")
    ranks.check(not different, ", ".join(different))


def test_bits_differ_where_the_wire_is_float32(ranks, rng, monkeypatch):
    """The negative control: it is the float64 wire that makes the bits equal."""
    original = type(ranks.transport).all_reduce

    def rounded(self, wire):
        wire[moments.CALL :] = wire[moments.CALL :].float().double()  # all but the identity of the call
        return original(self, wire)

    monkeypatch.setattr(type(ranks.transport), "all_reduce", rounded)
    batch = batches.make((12, 64, 8, 8), rng, mean=3.0)
    layer = batches.ours(batch)
    mine = ranks.shares(None, 12)[ranks.rank]
    got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr("syncbn.transports.choose", lambda *_: single.SingleTransport())
        whole = batches.run(batches.ours(batch), batch.x, batch.grad_y)
    ranks.check(ranks.size == 1 or not torch.equal(got.var, whole.var), "rounding the wire goes unnoticed")
