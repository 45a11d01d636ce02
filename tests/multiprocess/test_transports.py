# SPDX-License-Identifier: BSD-3-Clause
"""The transport contract: one test body for every implementation."""

import pytest
import torch

from syncbn import transports
from syncbn.transports import gather, launchers, shared_memory
from syncbn.transports.single import SingleTransport
from syncbn.waits import processes
from tests.conftest import DEVICE

pytestmark = pytest.mark.ranks(1)


@pytest.fixture(params=["single", "mpi", "staged mpi", "torch", "shm over mpi", "shm over torch", "nodes"])
def transport(request, ranks):
    """Each implementation, over every rank of the run where it connects them."""
    if request.param == "single":
        yield SingleTransport()
    elif "mpi" in request.param:
        if not launchers.detect().speaks_mpi:
            pytest.skip("no MPI job")
        from syncbn.transports import mpi

        over = {"mpi": lambda made: made, "staged mpi": staged, "shm over mpi": shared}
        yield over[request.param](mpi.MPITransport(mpi.world()))
    else:
        request.getfixturevalue("torch_world")
        from syncbn.transports.torch_dist import TorchTransport

        made = TorchTransport(torch.distributed.group.WORLD)
        if request.param == "nodes":
            yield nodes_of(made, ranks, request.getfixturevalue("monkeypatch"))
        else:
            yield shared(made) if "shm" in request.param else made


def nodes_of(host, ranks, monkeypatch):
    """Two hosts, of which the second has the last rank alone."""
    if ranks.size < 3 or DEVICE.type != "cpu":
        pytest.skip("needs two ranks on one of two hosts")
    from syncbn.transports.nodes import NodesTransport, by_nodes

    own = processes.own()._replace(host=7 + (ranks.rank == ranks.size - 1))
    with monkeypatch.context() as patch:
        patch.setattr("syncbn.waits.processes.own", lambda: own)
        made = by_nodes(host, "auto")
    ranks.check(isinstance(made, NodesTransport), f"{made}")
    return made


def shared(host):
    """Shared memory, made known by another transport."""
    if DEVICE.type != "cpu" or shared_memory.problem():
        pytest.skip(shared_memory.problem() or "for CPU tensors")
    return shared_memory.on_one_host(host, "shm")


def staged(host):
    """The transport of GPU tensors, for CPU tensors: through a copy in another place."""
    from syncbn.transports.mpi_staged import AbstractStage, StagedTransport

    class Copies(AbstractStage):
        def to_host(self, tensor):
            return tensor.clone().view(-1)

        def to_device(self, host, tensor):
            tensor.view(-1).copy_(host)

    return StagedTransport(host, Copies(), "cpu")


def test_it_knows_its_members(ranks, transport):
    alone = transport.name == "single"
    ranks.check(transport.size == (1 if alone else ranks.size), "size")
    ranks.check(transport.rank == (0 if alone else ranks.rank), "rank")
    ranks.check(transport.ranks == tuple(range(transport.size)), f"ranks {transport.ranks}")
    library = transport.host.name if transport.name == "shm" else transport.name
    ranks.check(alone or transport.spec.kind == library, "specification")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 129, 4097, 300_000])
def test_all_reduce_sums_in_place(ranks, transport, dtype, length):
    wire = torch.arange(length, dtype=dtype) * 0.5 + transport.rank
    expected = torch.arange(length, dtype=dtype) * 0.5 * transport.size + sum(range(transport.size))
    got = transport.all_reduce(wire)
    ranks.check(got is wire, "in place")
    ranks.check_equal(got, expected)


def test_all_reduce_gives_every_rank_the_same_bits(ranks, transport):
    """Otherwise replicas drift apart: 0.1, 0.2, ... summed in another order end in other bits."""
    wire = transport.all_reduce(torch.full((257,), 0.1 * (transport.rank + 1), dtype=torch.float64))
    rows = gather.gather(wire, transport)
    ranks.check((rows == rows[0]).all().item(), "bits differ between ranks")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_broadcast_copies_any_dtype_from_any_root(ranks, transport, dtype):
    root = transport.size - 1
    values = (torch.arange(7) % 2).to(dtype)
    tensor = values.clone() if transport.rank == root else torch.zeros(7, dtype=dtype)
    ranks.check(transport.broadcast(tensor, root) is tensor, "in place")
    ranks.check_equal(tensor, values)


def test_broadcast_takes_a_scalar(ranks, transport):
    tensor = torch.tensor(5 if transport.rank == 0 else 0)
    ranks.check_equal(transport.broadcast(tensor), torch.tensor(5))


def test_split_makes_separate_groups(ranks, transport):
    color = transport.rank % 2
    part = transport.split(color)
    members = [r for r in range(transport.size) if r % 2 == color] if transport.name != "single" else [0]
    ranks.check(part.ranks == tuple(members), f"{part.ranks} is not {members}")
    total = part.all_reduce(torch.tensor([float(transport.rank)], dtype=torch.float64))
    ranks.check(total.item() == sum(members), "the sum stays inside the group")


def test_tokens_are_equal_inside_and_different_outside(ranks, transport):
    tokens = gather.gather(torch.tensor([transport.group_id % 2**53], dtype=torch.float64), transport)
    ranks.check((tokens == tokens[0]).all().item(), f"{tokens}")
    ranks.check(transport.size == 1 or transport.split(0).group_id != transport.group_id, "a new group, a new group_id")


def test_barrier_waits_for_the_last(ranks, transport, tmp_path_factory):
    import time

    start = time.perf_counter()
    if transport.rank == transport.size - 1:
        time.sleep(0.3)
    transport.barrier()
    waited = time.perf_counter() - start
    ranks.check(transport.name == "single" or waited >= 0.25, f"waited {waited:.2f} s")


def test_messages_of_the_user_match_none_of_ours(ranks):
    if ranks.library != "mpi" or ranks.size < 2:
        pytest.skip("needs an MPI job of two")
    from mpi4py import MPI

    from syncbn.transports import mpi

    comm = MPI.COMM_WORLD
    mine, theirs = torch.tensor([1.0 + ranks.rank], device="cpu"), torch.zeros(1, device="cpu")
    request = comm.Irecv(theirs.numpy(), source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    mpi.MPITransport(mpi.world()).all_reduce(torch.ones(2000, dtype=torch.float64))
    comm.Send(mine.numpy(), dest=(ranks.rank + 1) % ranks.size)
    request.Wait()
    ranks.check(theirs.item() == 1.0 + (ranks.rank - 1) % ranks.size, "the user's message arrived untouched")


def test_a_seed_of_the_user_is_not_moved(ranks, transport):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    transport.split(0)
    ranks.check_equal(torch.rand(3), expected)


def test_everyone_is_resolved_once(ranks):
    ranks.check(transports.choose(None) is transports.choose(None), "a look-up, not a new communicator")


@pytest.mark.parametrize("name", ["single", "auto"])
def test_the_override_is_obeyed_at_the_first_use_of_a_group(ranks, monkeypatch, name):
    monkeypatch.setenv("SYNCBN_TRANSPORT", name)
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    shared = not shared_memory.problem() and ranks.size > 1  # for CPU tensors, which choose() asks for
    expected = "single" if name == "single" else "shm" if shared else ranks.transport.name
    ranks.check(transports.choose(None).name == expected, transports.choose(None).name)
