# SPDX-License-Identifier: BSD-3-Clause
"""init() and what a World does."""

import copy
import os

import psutil
import pytest
import torch
from torch import nn

import syncbn
from syncbn import transports
from syncbn.transports import launchers, shared_memory
from tests.conftest import DEVICE

pytestmark = pytest.mark.ranks(1)


def test_init_agrees_with_the_launcher(ranks):
    launch = launchers.detect()
    world = syncbn.init(device=DEVICE)
    ranks.check((world.rank, world.size) == (launch.rank, launch.size), f"{world}")
    ranks.check(world.launcher == launch.name, world.launcher)
    through = "shm" if DEVICE.type == "cpu" and not shared_memory.problem() else ranks.library
    through = os.environ.get("SYNCBN_TRANSPORT", through)
    ranks.check(world.transport.name == through, world.transport.name)
    ranks.check(ranks.library == ("mpi" if launch.speaks_mpi else "torch"), ranks.library)
    ranks.check(world.local_rank == launch.local_rank and world.device.type in ("cpu", "cuda"), f"{world}")


def test_init_sets_up_torch_under_any_launcher(ranks, torch_world):
    total = torch.tensor([1.0 + ranks.rank])
    torch.distributed.all_reduce(total)
    ranks.check(total.item() == ranks.size * (ranks.size + 1) / 2, f"{total}")
    ranks.check(torch.distributed.get_rank() == ranks.rank, "the same ranks everywhere")


def test_broadcast_copies_every_dtype(ranks):
    torch.manual_seed(ranks.rank)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2)])
    model.append(nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last))
    model[3].num_batches_tracked.fill_(ranks.rank + 7)
    ranks.world.broadcast(model, root=ranks.size - 1)
    torch.manual_seed(ranks.size - 1)
    expected = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2)])
    expected.append(nn.Conv2d(2, 3, 2))
    expected[3].num_batches_tracked.fill_(ranks.size - 1 + 7)
    for (name, got), value in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        ranks.check_equal(got, value, name)


def test_nothing_leans_on_the_default_device(ranks, rng):
    """Where only some ranks have one, for example: what is sent, and by which way, is the same."""
    model, x = torch.nn.Sequential(syncbn.SyncBatchNorm(4)), torch.randn(3, 4, generator=rng)
    with torch.device("meta" if ranks.rank == 0 else DEVICE):
        half = ranks.world.subgroup(1)
        ranks.world.broadcast(model)
        model(x).sum().backward()
        ranks.world.average_gradients(model)
        scale = ranks.world.loss_scale(1)
        error = ValueError("told by a text") if ranks.rank == 0 else None
        ranks.raises(ValueError, lambda: ranks.world.raise_together(error), "told by a text")
    ranks.check(half is not None and scale == 1.0)


def test_ranks_on_one_host_rendezvous_on_loopback(ranks):
    if not launchers.detect().speaks_mpi:
        pytest.skip("torchrun opens its own store")
    before = listeners()
    syncbn.init(torch_distributed=True, device=DEVICE)
    opened = listeners() - before
    ranks.world.barrier()
    torch.distributed.destroy_process_group()
    ranks.check(opened and all(ip in ("127.0.0.1", "::1") for ip, _ in opened), f"listening on {opened}")


def listeners():
    """Where this process listens: (address, port)."""
    connections = psutil.Process(os.getpid()).net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == "LISTEN"}


@pytest.mark.parametrize("as_tensor", [False, True])
def test_average_is_weighted_and_the_same_on_every_rank(ranks, as_tensor):
    value, weight = 1.0 + ranks.rank**2, 2.0 * ranks.rank
    got = ranks.world.average(torch.tensor([value], requires_grad=True) if as_tensor else value, weight)
    total = sum((1.0 + r**2) * 2.0 * r for r in range(ranks.size))
    ranks.check(got == pytest.approx(total / sum(2.0 * r for r in range(ranks.size)), rel=1e-15), f"{got}")
    plain = ranks.world.average(ranks.rank)
    ranks.check(plain == pytest.approx((ranks.size - 1) / 2, rel=1e-15), f"{plain}")
    alone = ranks.world.average(float("nan") if ranks.rank else 5.0, weight=float(ranks.rank == 0))
    ranks.check(alone == 5.0, f"a value of weight 0 counted: {alone}")


@pytest.mark.parametrize(
    ("value", "weight", "kind", "part"),
    [
        ("three", 1, TypeError, "one real number; received str"),
        (torch.ones(2), 1, TypeError, "a tensor of shape (2,)"),
        (1.0, -1, ValueError, "weight >= 0; received -1"),
        (1.0, float("nan"), ValueError, "weight >= 0; received nan"),
        (10**400, 1, TypeError, "of which float() raised OverflowError"),
        (1.0, 10**400, ValueError, "of which float() raised OverflowError"),
        (torch.empty((), device="meta"), 1, TypeError, "of which float() raised"),
        (1 + 2j, 1, TypeError, "one real number; received complex"),
    ],
)
def test_average_refuses_alike(ranks, value, weight, kind, part):
    bad = ranks.rank == ranks.size - 1
    args = (value, weight) if bad else (1.0, 1.0)
    ranks.raises(kind, lambda: ranks.world.average(*args), part)
    ranks.raises(ValueError, lambda: ranks.world.average(1.0, 0), "a weight above 0 on some rank")


def test_a_world_of_a_group_trains_on_its_own(ranks, rng):
    """Two models in one job: the ranks of each average gradients and numbers among themselves."""
    first = ranks.rank < (ranks.size + 1) // 2
    made = ranks.transport.split(0 if first else 1)
    group = transports.adopt(made, ranks.world.device.type)
    world = ranks.world.within(group) if group else ranks.world
    size = (ranks.size + 1) // 2 if first else ranks.size // 2
    ranks.check((world.size, world.rank) == (size, ranks.rank if first else ranks.rank - (ranks.size + 1) // 2))
    members = [r for r in range(ranks.size) if (r < (ranks.size + 1) // 2) == first]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4, process_group=group), nn.Linear(4, 1)).double()
    one = copy.deepcopy(model)
    one[1] = nn.BatchNorm1d(4).double()
    batches = {r: torch.randn(2 + r, 3, generator=rng, dtype=torch.float64) + r for r in range(ranks.size)}
    x = batches[ranks.rank]
    (model(x).square().mean() * world.loss_scale(len(x))).backward()
    world.average_gradients(model)
    one(torch.cat([batches[r] for r in members])).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
        ranks.check_close(p.grad, q.grad, 1e-12, name)
    ranks.check(world.average(ranks.rank) == sum(members) / len(members))


def test_freed_groups_leave_no_open_file(ranks):
    layer = syncbn.SyncBatchNorm(3)

    def use(group):
        layer.process_group = group
        layer(torch.ones(2, 3) * ranks.rank)

    def cycle():
        group = ranks.world.subgroup(ranks.size)
        use(group)
        ranks.world.free(group)
        return group

    cycle()
    before = len(os.listdir("/proc/self/fd"))
    groups = [cycle() for _ in range(5)]
    after = len(os.listdir("/proc/self/fd"))
    ranks.check(after <= before, f"{before} open files became {after}")
    ranks.raises(ValueError, lambda: ranks.world.free(groups[0]), "still open; received")
    ranks.raises(ValueError, lambda: ranks.world.free(None), "received None")
    use(groups[0])  # makes another one
    ranks.check_close(layer.running_mean, torch.full((3,), layer.running_mean[0].item()), 1e-6)
