# SPDX-License-Identifier: BSD-3-Clause
"""init() and what a World does for training without DDP."""

import copy
import os

import psutil
import pytest
import torch
from torch import nn

import syncbn
from syncbn import transports
from syncbn.transports import gather, launchers, shared_memory
from tests.conftest import DEVICE
from tests.multiprocess.test_collectives import CountingTransport
from tests.multiprocess.test_ddp import loss, network

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


def test_average_gradients_is_the_mean(ranks):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16()])
    model.append(nn.ParameterList([torch.zeros(3, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex128)]))
    for p in model.parameters():
        p.grad = torch.full_like(p, (1.0 + ranks.rank) * (1 + 2j if p.is_complex() else 1))
    ranks.world.average_gradients(model)
    for p in model.parameters():
        mean = (ranks.size + 1) / 2 * (1 + 2j if p.is_complex() else 1)
        ranks.check((p.grad == torch.full_like(p, mean)).all().item(), f"{p.dtype}: {p.grad}")


def test_average_gradients_takes_a_missing_gradient_for_zero(ranks):
    model = nn.Linear(2, 2)
    if ranks.rank == 0:
        model.weight.grad = torch.ones(2, 2)
    ranks.world.average_gradients(model)
    ranks.check_equal(model.weight.grad, torch.full((2, 2), 1.0 / ranks.size))
    ranks.check(model.bias.grad is None, "no rank had a gradient of the bias")


def test_average_gradients_leaves_frozen_parameters_alone(ranks):
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    model.bias.grad = torch.ones(2)
    ranks.world.average_gradients(model)
    ranks.check(model.weight.grad is None, "frozen")
    if ranks.size > 1:
        model.weight.requires_grad_(ranks.rank == 0)
        ranks.raises(ValueError, lambda: ranks.world.average_gradients(model), "same number of tensors")


NO_SPARSE = pytest.mark.cpu("the device of host memory has no sparse tensors")
HEAD = 31 + 1  # which call it is, and whether this rank's model is the one that the group has agreed on


def counted(ranks):
    counting = CountingTransport(ranks.transport)
    return counting, syncbn.World(ranks.rank, ranks.size, 0, DEVICE, "test", counting)


def with_gradients(*parts):
    model = nn.ModuleList(parts)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_average_gradients_compares_a_model_once_and_packs_one_wire_a_dtype(ranks):
    counting, world = counted(ranks)
    model = with_gradients(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    wires = [(HEAD + 18 + 6, torch.float32), (6 + 2, torch.float64)]  # values, and a flag a tensor
    first = (3 * ranks.size + 7, torch.float64)  # are the parameters the same
    comparison = (4 * ranks.size + 7, torch.float64)  # is it the same model everywhere, with dense gradients
    for expected in ([first, comparison, *wires], wires, wires):
        counting.sent.clear()
        world.average_gradients(model)
        ranks.check(counting.sent == expected, f"{counting.sent}")


def test_models_that_take_turns_are_compared_in_the_first_turns_only(ranks):
    counting, world = counted(ranks)
    turns = [with_gradients(nn.Linear(2, 2)), with_gradients(nn.Linear(3, 3)), with_gradients(nn.Linear(4, 4))]
    for turn in range(4):
        for model in turns:
            counting.sent.clear()
            world.average_gradients(model)
            if turn > 1:
                n = sum(p.numel() for p in model.parameters())
                ranks.check(counting.sent == [(HEAD + 2 + n, torch.float32)], f"{turn}: {counting.sent}")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("wrong", ["model", pytest.param("sparse", marks=NO_SPARSE), "no model"])
def test_average_gradients_refuses_alike_also_after_calls_that_went_well(ranks, wrong):
    bad = ranks.rank == ranks.size - 1
    good = with_gradients(nn.Linear(2, 2), nn.Linear(2, 2).double())
    for _ in range(2):
        ranks.world.average_gradients(good)
    if wrong == "sparse":
        other = nn.Embedding(6, 3, sparse=True)
        other(torch.tensor([1, 2])).sum().backward()
    else:
        other = with_gradients(nn.Linear(2, 7)) if wrong == "model" else None
    kind, part = {
        "model": (ValueError, "same number of tensors"),
        "sparse": (ValueError, "received sparse ones of weight"),
        "no model": (TypeError, "received NoneType"),
    }[wrong]
    given = other if bad else good
    for _ in range(2):
        ranks.raises(kind, lambda: ranks.world.average_gradients(given), part)
        ranks.check_equal(good[0].weight.grad, torch.ones(2, 2), "nothing was averaged")
    ranks.world.average_gradients(good)
    ranks.check_equal(good[1].weight.grad, torch.ones(2, 2, dtype=torch.float64), "the next step works")


@pytest.mark.ranks(2)
def test_a_rank_in_average_gradients_and_another_in_another_call_is_one_error(ranks):
    """Without shared memory, which compares the calls itself: the wires have one length and one dtype."""
    model = with_gradients(nn.Linear(2, 2, dtype=torch.float64))
    counting, world = counted(ranks)
    world.average_gradients(model)
    length = counting.sent[-1][0]

    def call():
        if ranks.rank:
            return world.average_gradients(model)
        return gather.exchange(torch.zeros(length - 7, dtype=torch.float64), counting, "another call")

    ranks.raises(ValueError, call, "All ranks must be in one call", "World.average_gradients", "another call")


def test_pure_mpi_training_with_uneven_shares_equals_one_process(ranks, rng):
    """Without torch.distributed: broadcast once, scale the loss by the share, average the gradients."""
    whole, model = network(rng), network(rng)
    model.load_state_dict(whole.state_dict())
    if ranks.rank > 0:
        with torch.no_grad():
            model[0].weight.zero_()
    sizes = [r + 1 for r in range(ranks.size)]
    mine = ranks.shares(sizes)[ranks.rank]
    syncbn.convert_sync_batchnorm(model)
    ranks.world.broadcast(model)
    for module, rows in ((whole, slice(None)), (model, mine)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        generator = torch.Generator(DEVICE).manual_seed(3)
        for _ in range(4):
            x = torch.randn(sum(sizes), 2, 7, 6, generator=generator, dtype=torch.float64)[rows]
            optimizer.zero_grad()
            scale = ranks.world.loss_scale(len(x)) if module is model else 1.0
            (loss(module, x) * scale).backward()
            if module is model:
                ranks.world.average_gradients(model)
            optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, name)


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


def test_a_grad_scaler_leaves_out_the_same_step_on_every_rank(ranks):
    """As the documentation says: gradients are averaged before the scaler looks at them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), syncbn.SyncBatchNorm(4), nn.Linear(4, 1))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model[2].weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3) + ranks.rank).square().mean()).backward()
        if step == 0 and ranks.rank == ranks.size - 1:
            model[2].weight.grad[0, 0] = float("inf")
        ranks.world.average_gradients(model)
        scaler.step(optimizer)
        scaler.update()
        ranks.check(scaler.get_scale() == 2.0, f"step {step}: the scale is {scaler.get_scale()}")
        moved = not torch.equal(model[2].weight, before)
        ranks.check(moved == (step == 1), f"step {step}: moved {moved}")
