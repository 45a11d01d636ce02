# SPDX-License-Identifier: BSD-3-Clause
"""The GPU kernels under several ranks: the same bits as one rank, and a verdict that comes late on all.

CPU tensors are given them; CUDA tensors have them.
"""

import pytest
import torch

import syncbn
from syncbn import kernels
from syncbn.kernels.cupy_ops import CupyKernels
from syncbn.transports.single import SingleTransport
from tests.conftest import DEVICE
from tests.cuda_on_cpu import EmulatedLauncher
from tests.multiprocess import batches
from tests.multiprocess.test_bad_input import FAULTS

pytestmark = pytest.mark.ranks(1)


@pytest.fixture
def on_gpu(ranks, monkeypatch):
    """Gives CPU tensors the kernels of CUDA tensors, for a group of every rank."""
    if DEVICE.type == "cuda":
        if ranks.transport.on_host:
            pytest.skip("MPI through host memory: the verdict is that of the CPU, at once")
        return
    implementation = CupyKernels(EmulatedLauncher(seed=ranks.rank), ranks.size)
    monkeypatch.setattr(kernels, "choose", lambda x: implementation)


@pytest.mark.parametrize("shares", batches.SHARES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_split_has_the_bits_of_one_rank(ranks, on_gpu, rng, monkeypatch, shares, layout):
    sizes = batches.SHARES[shares](ranks.size)
    batch = batches.make((sum(sizes), 7, 9, 6), rng)
    mine = ranks.shares(sizes)[ranks.rank]
    x, grad_y = (batches.LAYOUTS[layout](t) for t in (batch.x, batch.grad_y))
    ours = batches.run(batches.ours(batch), x[mine], grad_y[mine])
    monkeypatch.setattr(kernels, "choose", lambda x: CupyKernels(EmulatedLauncher()))
    monkeypatch.setattr("syncbn.transports.choose", lambda *_: SingleTransport())
    alone = batches.run(batches.ours(batch), x, grad_y)
    for name, actual, expected in [
        ("y", ours.y, alone.y[mine]),
        ("grad_x", ours.grad_x, alone.grad_x[mine]),
        ("mean", ours.mean, alone.mean),
        ("var", ours.var, alone.var),
    ]:
        ranks.check_equal(actual, expected, name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_input_on_one_rank_raises_there_at_once_and_on_the_others_later(ranks, on_gpu, fault):
    make, kind, parts = FAULTS[fault]
    layer, last = syncbn.SyncBatchNorm(5), ranks.size - 1
    layer(torch.randn(3, 5))
    before = layer.running_mean.clone()
    try:
        y, error = layer(make() if ranks.rank == last else torch.randn(3, 5)), ""
    except kind as refused:
        y, error = torch.full((1,), torch.nan), str(refused)
    parts = [*parts, f"On rank {last}: "] if ranks.rank == last else []
    ranks.check(all(part in error for part in parts) and bool(error) == bool(parts), error)
    ranks.check(y.isnan().all().item(), "NaN, not a number that looks right")
    ranks.check_equal(layer.running_mean, before)
    try:
        layer(torch.randn(3, 5))
        late = ""
    except ValueError as found:
        late = str(found)
    expected = "" if ranks.rank == last else f"1 of {ranks.size} ranks had a wrong one"
    ranks.check(late == expected or (expected and expected in late), late)
    ranks.check_equal(layer(torch.ones(3, 5)), torch.zeros(3, 5))  # and all are still in step


def test_a_step_without_any_gradient_still_joins_backward_on_every_rank(ranks, on_gpu):
    layer = syncbn.SyncBatchNorm(4).requires_grad_(ranks.rank > 0)
    y = layer(torch.randn(3, 4))
    ranks.check(y.requires_grad, "nobody asks another rank whether it records")
    y.sum().backward()
    ranks.check((layer.weight.grad is not None) == (ranks.rank > 0), "the gradients are as asked for")
