# SPDX-License-Identifier: BSD-3-Clause
"""Under DistributedDataParallel over gloo, training equals one process."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.conftest import DEVICE

pytestmark = [
    pytest.mark.ranks(1),
    # torch's own: DDP's reducer sets .grad on a view
    pytest.mark.filterwarnings("ignore:.*does not match bucket view strides.*"),
    # torch 2.13 renames the argument; 2.11 knows only this name
    pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated:FutureWarning"),
]


def network(rng):
    """Two batch norms in double precision, the same on every rank."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=rng, dtype=torch.float64) + 0.1)
    return model


def loss(model, x):
    """The input as a target: the mean of squares of a normalised output alone would have next to no gradient."""
    return (model(x) - x.flatten(1)[:, :24]).square().mean()


def steps(model, batches, rank_slice):
    """A few SGD steps on this process's rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        loss(model, x[rank_slice]).backward()
        optimizer.step()


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_training_under_ddp_equals_one_process(ranks, torch_world, rng, broadcast_buffers):
    whole = network(rng)
    model = network(rng)
    model.load_state_dict(whole.state_dict())
    batches = torch.randn(5, 3 * ranks.size, 2, 7, 6, generator=rng, dtype=torch.float64)
    steps(whole, batches, slice(None))
    ddp = DistributedDataParallel(syncbn.convert_sync_batchnorm(model), broadcast_buffers=broadcast_buffers)
    steps(ddp, batches, ranks.shares([3] * ranks.size)[ranks.rank])
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


@pytest.mark.ranks(2)
def test_unsynchronised_training_under_ddp_differs(ranks, torch_world, rng):
    """The negative control."""
    whole = network(rng)
    model = network(rng)
    model.load_state_dict(whole.state_dict())
    batches = torch.randn(5, 3 * ranks.size, 2, 7, 6, generator=rng, dtype=torch.float64)
    steps(whole, batches, slice(None))
    steps(DistributedDataParallel(model), batches, ranks.shares([3] * ranks.size)[ranks.rank])
    gap = (model[0].weight - whole[0].weight).abs().max().item()
    ranks.check(gap > 1e-6, f"{gap}")


def test_two_forwards_before_one_backward_with_buffer_broadcast(ranks, torch_world, rng):
    """DDP's broadcast writes the buffers between the forwards: none may be saved for backward."""
    whole = network(rng)
    model = network(rng)
    model.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3 * ranks.size, 2, 7, 6, generator=rng, dtype=torch.float64)
    mine = ranks.shares([3] * ranks.size)[ranks.rank]
    (loss(whole, x[0]) + loss(whole, x[1])).backward()
    ddp = DistributedDataParallel(syncbn.convert_sync_batchnorm(model), broadcast_buffers=True)
    (loss(ddp, x[0][mine]) + loss(ddp, x[1][mine])).backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        ranks.check_close(ours.grad, theirs.grad, 1e-12)


def test_gradient_accumulation_without_sync_equals_one_process(ranks, torch_world, rng):
    whole = network(rng)
    model = network(rng)
    model.load_state_dict(whole.state_dict())
    x = torch.randn(2, 2 * ranks.size, 2, 7, 6, generator=rng, dtype=torch.float64)
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    ddp = DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
    for part in x:
        loss(whole, part).backward()
    with ddp.no_sync():
        loss(ddp, x[0][mine]).backward()
    loss(ddp, x[1][mine]).backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        ranks.check_close(ours.grad, theirs.grad, 1e-12)


class Branches(nn.Module):
    """A stem that differs between ranks, so that DDP sends its buckets at different moments of backward."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd
        self.norm, self.head = syncbn.SyncBatchNorm(4), nn.Linear(4, 3)
        self.stems = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])

    def forward(self, x):
        return self.head(self.norm(self.stems[self.odd](x)))


@pytest.mark.ranks(2)
def test_no_bucket_of_ddp_meets_a_wire_of_ours(ranks, torch_world):
    """gloo matches by order alone: in a group in common a bucket would be added to a wire, in silence."""
    torch.manual_seed(0)
    plain = Branches(ranks.rank % 2)
    model = copy.deepcopy(plain)
    ddp = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)
    for step in range(3):
        x = torch.randn(4, 4, generator=torch.Generator(DEVICE).manual_seed(10 * step + ranks.rank))
        for each in (plain, ddp):
            each.zero_grad()
            each(x).tanh().mean().backward()
        ranks.world.average_gradients(plain)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            ranks.check_close(ours.grad, theirs.grad, 1e-6, f"{name}, step {step}")


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_blocks_keep_their_running_statistics_if_ddp_leaves_buffers_alone(ranks, torch_world, broadcast_buffers):
    """DDP's default copies the buffers of rank 0 to all ranks, and so to other blocks, as the pages say."""
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, group_size=1)
    wrapped = DistributedDataParallel(layer, broadcast_buffers=broadcast_buffers)
    x = torch.randn(4, 3) + 10 * ranks.rank
    wrapped(x)
    own = x.mean(0)
    ranks.check_close(layer.running_mean, own, 1e-5, "after the first forward")
    with torch.no_grad():
        wrapped.eval(), wrapped.train()
    layer.momentum = 0.0
    wrapped(x)
    kept = bool((layer.running_mean - own).abs().max() < 1e-5)
    ranks.check(kept == (not broadcast_buffers or ranks.rank == 0), f"kept: {kept}")
