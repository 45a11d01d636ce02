# SPDX-License-Identifier: BSD-3-Clause
"""One collective forward, one backward, none in eval, whatever may differ between ranks."""

import pytest
import torch

import syncbn
from syncbn.transports.base import AbstractTransport
from tests.conftest import DEVICE
from tests.multiprocess import batches

pytestmark = pytest.mark.ranks(1)


class CountingTransport(AbstractTransport):
    """Passes everything on, and keeps the length and dtype of every wire."""

    def __init__(self, inner):
        self.inner, self.sent = inner, []
        self.name, self.rank, self.size, self.ranks = inner.name, inner.rank, inner.size, inner.ranks
        self.group_id, self.spec, self.host_synchronous = inner.group_id, inner.spec, inner.host_synchronous

    def all_reduce(self, wire):
        self.sent.append((wire.numel(), wire.dtype))
        return self.inner.all_reduce(wire)

    def exchange_notes(self, note):
        return self.inner.exchange_notes(note)

    def broadcast(self, tensor, root=0):
        self.sent.append((tensor.numel(), tensor.dtype))
        return self.inner.broadcast(tensor, root)

    def split(self, color):
        return self.inner.split(color)

    def barrier(self):
        self.inner.barrier()


@pytest.fixture
def counting(ranks, monkeypatch):
    transport, choose = CountingTransport(ranks.transport), syncbn.transports.choose
    monkeypatch.setattr(
        "syncbn.transports.choose", lambda spec, device=DEVICE.type: transport if spec is None else choose(spec, device)
    )
    return transport


C = 5
FORWARD, BACKWARD = (2 * C + 15, torch.float64), (2 * C + 7, torch.float64)


def settled(counting, **options):
    """A layer whose settings were compared already, as they are once, at its first training step."""
    layer = syncbn.SyncBatchNorm(C, **options)
    with torch.no_grad():
        layer(torch.randn(3, C))
    counting.sent.clear()
    return layer


def test_the_first_step_compares_settings_once(ranks, counting):
    layer = syncbn.SyncBatchNorm(C)
    x = torch.randn(3, C, requires_grad=True)
    layer(x).sum().backward()
    layer(x).sum().backward()
    agreement = [] if ranks.size == 1 else [(7 * ranks.size + 7, torch.float64)]
    ranks.check(counting.sent == [*agreement, FORWARD, BACKWARD, FORWARD, BACKWARD], f"{counting.sent}")


@pytest.mark.parametrize("shares", batches.SHARES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_training_makes_one_collective_forward_and_one_backward(ranks, counting, shares, dtype):
    layer = settled(counting)
    n = batches.SHARES[shares](ranks.size)[ranks.rank]
    x = torch.randn(n, C, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    ranks.check(counting.sent == [FORWARD], f"forward: {counting.sent}")
    y.float().sum().backward()
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"backward: {counting.sent}")


@pytest.mark.parametrize("tracked", [True, False])
def test_eval_makes_no_collective(ranks, counting, tracked):
    layer = settled(counting, track_running_stats=tracked).eval()
    x = torch.randn(4, C, 3, requires_grad=True)
    layer(x).sum().backward()
    ranks.check(counting.sent == [], f"{counting.sent}")


def test_a_rank_without_requires_grad_joins_backward(ranks, counting):
    """An empty local batch, say, is often made on the spot and requires no gradient."""
    layer = settled(counting, affine=False)
    x = torch.randn(3, C, requires_grad=ranks.rank == ranks.size - 1)
    y = layer(x)
    ranks.check(y.requires_grad, "every rank records backward where one needs it")
    y.sum().backward()
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")
    ranks.check((x.grad is not None) == x.requires_grad, "only who asked gets a gradient")


@pytest.mark.immediate_errors
def test_nobody_records_backward_where_no_rank_needs_it(ranks, counting):
    layer = settled(counting, affine=False)
    y = layer(torch.randn(3, C))
    ranks.check(not y.requires_grad, "an input layer of a frozen stem costs no backward")
    with torch.no_grad():
        y = layer(torch.randn(3, C, requires_grad=True))
    ranks.check(not y.requires_grad, "under no_grad")
    ranks.check(counting.sent == [FORWARD, FORWARD], f"{counting.sent}")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_parameter_frozen_on_one_rank_changes_no_collective(ranks, counting, frozen):
    layer = settled(counting)
    getattr(layer, frozen).requires_grad_(ranks.rank == 0)
    layer(torch.randn(3, C)).sum().backward()
    ranks.check(counting.sent == [FORWARD, BACKWARD], f"{counting.sent}")
    ranks.check((getattr(layer, frozen).grad is None) == (ranks.rank != 0), "frozen means no gradient")
