# SPDX-License-Identifier: BSD-3-Clause
"""The GPU kernels under several ranks: the same bits as one rank, and deferred errors on all.

CPU tensors are given them; CUDA tensors have them.
"""

import pytest
import torch

import syncbn
from syncbn import kernels
from syncbn.kernels.cuda.ops import CupyKernels
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
        if ranks.transport.host_synchronous:
            pytest.skip("MPI through host memory: errors are those of the CPU, at once")
        return
    implementation = CupyKernels(EmulatedLauncher(seed=ranks.rank))
    monkeypatch.setattr(kernels, "choose", lambda x: implementation)
    transport = ranks.transport.host if ranks.transport.name == "shm" else ranks.transport
    if transport.name == "torch":  # ours and shared memory compare calls before any number is read; NCCL does not
        monkeypatch.setattr(transport, "is_direct", False)
    monkeypatch.setattr("syncbn.transports.choose", lambda *_: transport)


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
    late = deferred(layer)
    expected = "" if ranks.rank == last else f"received a wrong one on 1 of {ranks.size} rank"
    ranks.check(late == expected or (expected and expected in late), late)
    ranks.check_equal(layer(torch.ones(3, 5)), torch.zeros(3, 5))  # and all are still in step


def deferred(layer):
    """What the next call raises, or nothing."""
    try:
        layer(torch.randn(3, layer.num_features))
    except ValueError as found:
        return str(found)
    return ""


@pytest.mark.ranks(2)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ranks_in_different_calls_get_nan_and_each_is_told_its_own(ranks, on_gpu, direction):
    layers = [syncbn.SyncBatchNorm(5) for _ in range(2)]
    xs = [torch.randn(3, 5, requires_grad=True) for _ in layers]
    ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    mine = int(ranks.rank == ranks.size - 1)
    before = layers[mine].running_mean.clone()
    if direction == "forward":
        found = layers[mine](xs[mine])
    else:
        ys[mine].backward(torch.randn(3, 5))
        found = xs[mine].grad
    ranks.check(found.isnan().all().item(), "NaN, not a number that looks right")
    ranks.check_equal(layers[mine].running_mean, before)
    ranks.check(layers[mine].num_batches_tracked == 1, "nothing was counted")
    late = deferred(layers[0])
    told = f"received {direction} of SyncBatchNorm(5) (call " in late and "here and another one on some of" in late
    ranks.check(told and "with input float32 (3, 5)" in late, late)
    ranks.check_equal(layers[0](torch.ones(3, 5)), torch.zeros(3, 5))  # and all are still in step


def test_a_step_without_any_gradient_still_joins_backward_on_every_rank(ranks, on_gpu):
    layer = syncbn.SyncBatchNorm(4).requires_grad_(ranks.rank > 0)
    y = layer(torch.randn(3, 4))
    ranks.check(y.requires_grad, "nobody asks another rank whether it records")
    y.sum().backward()
    ranks.check((layer.weight.grad is not None) == (ranks.rank > 0), "the gradients are as asked for")
