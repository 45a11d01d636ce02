# SPDX-License-Identifier: BSD-3-Clause
"""Sub-groups from World.subgroup, a torch ProcessGroup or an mpi4py communicator; modules that copy and travel."""

import copy
import io
import pickle
import sys
import warnings

import pytest
import torch

import syncbn
from syncbn import transports
from syncbn.transports import groups, launchers
from syncbn.transports.specify import specify
from tests import processes
from tests.conftest import DEVICE
from tests.multiprocess import batches

pytestmark = pytest.mark.ranks(1)


def even_group(ranks):
    """A torch group and an MPI communicator of this rank's parity."""
    if launchers.detect().speaks_mpi:
        from mpi4py import MPI

        return MPI.COMM_WORLD.Split(ranks.rank % 2, ranks.rank)
    made = [torch.distributed.new_group(range(odd, ranks.size, 2)) for odd in (0, 1)]
    return made[ranks.rank % 2]


def forget_this_job(monkeypatch):
    """Makes this process know no group, as in a job that loads a layer."""
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    for table in ("handles", "pickled_as", "unpickled_as"):
        monkeypatch.setattr(f"syncbn.transports.groups.{table}", {})


def check_group(ranks, group, members, rng):
    """The layer's statistics are those of the members' shares, and of no other."""
    batch = batches.make((2 * ranks.size, 5, 3), rng)
    shares = ranks.shares([2] * ranks.size)
    rows = torch.cat([torch.arange(2 * ranks.size)[shares[r]] for r in members])
    exact = batches.exact(type(batch)(x=batch.x[rows], grad_y=batch.grad_y[rows], weight=batch.weight, bias=batch.bias))
    mine = shares[ranks.rank]
    got = batches.run(batches.ours(batch, process_group=group), batch.x[mine], batch.grad_y[mine])
    place = members.index(ranks.rank)
    ranks.check_close(got.y, exact.y[2 * place : 2 * place + 2], 1e-5, "y")
    ranks.check_close(got.grad_x, exact.grad_x[2 * place : 2 * place + 2], 1e-5, "grad_x")


@pytest.mark.parametrize("divide", [1, 2])
def test_world_subgroup_synchronises_inside(ranks, rng, divide):
    if ranks.size % divide:
        pytest.skip("does not divide")
    size = ranks.size // divide
    first = ranks.rank // size * size
    check_group(ranks, ranks.world.subgroup(size), list(range(first, first + size)), rng)


def test_a_library_group_synchronises_inside(ranks, rng):
    members = [r for r in range(ranks.size) if r % 2 == ranks.rank % 2]
    check_group(ranks, even_group(ranks), members, rng)


def test_a_torch_group_works_under_mpirun_too(ranks, torch_world, rng):
    check_group(ranks, torch.distributed.group.WORLD, list(range(ranks.size)), rng)


def test_the_module_stores_no_handle(ranks):
    layer = syncbn.SyncBatchNorm(3, process_group=even_group(ranks))
    layer(torch.randn(4, 3))
    ranks.check(isinstance(layer.process_group, syncbn.GroupSpec), f"{layer.process_group!r}")
    pickle.dumps(layer)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_copy_of_a_used_layer_works_in_step_with_it(ranks, rng, copier, grouped):
    group = even_group(ranks) if grouped else None
    layer = syncbn.SyncBatchNorm(4, process_group=group)
    layer(torch.randn(3, 4, generator=rng))
    twin = copier(layer)
    x = torch.randn(2 * ranks.size, 4, generator=rng)[ranks.shares([2] * ranks.size)[ranks.rank]]
    ranks.check_equal(twin(x), layer(x))
    ranks.check_equal(twin.running_var, layer.running_var)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_specification_is_the_same_group(ranks, copier, used):
    for group in (even_group(ranks), ranks.world.subgroup(ranks.size)):
        spec = specify(group)
        if used:
            transports.choose(spec)
        ranks.check(copier(spec) == spec and transports.choose(copier(spec)) is transports.choose(spec), f"{spec!r}")


def test_each_group_of_the_same_ranks_has_a_transport_of_its_own(ranks):
    specs = [specify(even_group(ranks)) for _ in range(2)]
    subgroups = [ranks.world.subgroup(ranks.size) for _ in range(2)]
    tokens = {transports.choose(spec).group_id for spec in [*specs, *subgroups, None]}
    ranks.check(len(tokens) == (5 if ranks.size > 1 else len(tokens)), f"{specs} {subgroups} {tokens}")


def test_a_communicator_given_twice_is_one_group(ranks):
    """Also through another Python object; a duplicate is another group."""
    if not launchers.detect().speaks_mpi:
        pytest.skip("no MPI job")
    from mpi4py import MPI

    comm = even_group(ranks)
    spec = specify(comm)
    ranks.check(specify(comm) == specify(MPI.Intracomm(comm)) == spec, f"{spec!r}")
    ranks.check(specify(comm.Dup()) != spec, "a duplicate has the label of its parent")


def test_a_communicator_that_is_made_where_one_was_freed_is_another_group(ranks):
    """MPI gives the handle out again, and a wrapper that did not free it still holds it."""
    if not launchers.detect().speaks_mpi:
        pytest.skip("no MPI job")
    from mpi4py import MPI

    comm = even_group(ranks)
    spec = specify(comm)
    MPI.Intracomm(comm).Free()
    ranks.check(groups.handle(spec) is None, "the handle of a freed communicator is kept")
    ranks.check(specify(even_group(ranks)) != spec, "the label of a freed communicator is given again")
    transports.choose(spec)  # makes an equal group


def test_a_used_group_has_no_name_of_another_job(ranks, monkeypatch):
    """Counts start anew in each job; the group of a loaded layer is none of those that this job makes."""
    spec = specify(even_group(ranks))
    if transports.choose(spec).name == "single":
        pytest.skip("no group")
    stored = pickle.dumps(spec)
    forget_this_job(monkeypatch)
    loaded = pickle.loads(stored)
    ranks.check(loaded.ranks == spec.ranks and len(loaded.label) > 8 and loaded != spec, f"{loaded!r} {spec!r}")
    ranks.check(pickle.loads(pickle.dumps(loaded)) == loaded, "a loaded specification keeps its label")


def test_a_communicator_that_was_freed_is_made_again(ranks, rng, monkeypatch):
    if not launchers.detect().speaks_mpi:
        pytest.skip("no MPI job")
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    comm = even_group(ranks)
    layer = syncbn.SyncBatchNorm(5, process_group=comm)
    comm.Free()
    members = [r for r in range(ranks.size) if r % 2 == ranks.rank % 2]
    check_group(ranks, layer.process_group, members, rng)


def test_a_group_is_made_again_from_its_ranks(ranks, rng, monkeypatch):
    """As in a job that loads the layer and never saw the handle."""
    layer = syncbn.SyncBatchNorm(5, process_group=even_group(ranks))
    forget_this_job(monkeypatch)
    members = [r for r in range(ranks.size) if r % 2 == ranks.rank % 2]
    check_group(ranks, layer.process_group, members, rng)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_used_layer_loads_and_trains_without_a_launcher(ranks, tmp_path, grouped):
    layer = syncbn.SyncBatchNorm(4, process_group=even_group(ranks) if grouped else None)
    layer(torch.randn(3, 4))
    file = tmp_path / f"layer{ranks.rank}.pt"
    torch.save(layer.cpu(), file)  # the program below has the machine's own devices
    program = (
        "import collections, sys, torch, syncbn\n"
        "classes = [syncbn.SyncBatchNorm, syncbn.GroupSpec, set, collections.OrderedDict]\n"
        "with torch.serialization.safe_globals(classes):\n"
        "    layer = torch.load(sys.argv[1], weights_only=True)\n"
        "y = layer(torch.tensor([[1.0] * 4, [3.0] * 4])); y.sum().backward()\n"
        "layer.eval()(torch.randn(2, 4))\n"
        "print(y[:, 0].tolist())"
    )
    done = processes.run(sys.executable, "-W", "error", "-c", program, file)
    ranks.check(done.returncode == 0, done.stderr[-700:])
    ranks.check(done.stdout.startswith("[-0.99"), done.stdout)


def test_a_state_dict_loads_with_weights_only(ranks):
    layer = syncbn.SyncBatchNorm(4, process_group=even_group(ranks))
    layer(torch.randn(3, 4))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = torch.nn.BatchNorm1d(4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    ranks.check_equal(other.running_mean, layer.running_mean)


@pytest.mark.ranks(2)
def test_a_group_without_this_process_is_refused(ranks):
    """Only the outsider is told; the members go on without it."""
    outsider = ranks.rank == ranks.size - 1
    if launchers.detect().speaks_mpi:
        from mpi4py import MPI

        group = MPI.COMM_WORLD.Split(MPI.UNDEFINED if outsider else 0, ranks.rank)
    else:
        group = torch.distributed.new_group(list(range(ranks.size - 1)))
    text = ""
    try:
        syncbn.SyncBatchNorm(4, process_group=group)
    except ValueError as error:
        text = str(error)
    if not launchers.detect().speaks_mpi and not outsider:
        torch.distributed.destroy_process_group(group)  # or the ranks would name later groups differently
    expected = "not part of" in text and "process_group must contain the calling process" in text
    ranks.check(expected if outsider else text == "", text)


@pytest.mark.ranks(2)
def test_an_intercommunicator_is_refused(ranks):
    if not launchers.detect().speaks_mpi:
        pytest.skip("no MPI job")
    from mpi4py import MPI

    side = int(ranks.rank > 0)
    local = MPI.COMM_WORLD.Split(side, ranks.rank)
    inter = local.Create_intercomm(0, MPI.COMM_WORLD, 0 if side else 1)
    ranks.raises(TypeError, lambda: syncbn.SyncBatchNorm(4, process_group=inter), "mpi4py intracommunicator")


def test_a_torch_world_made_anew_is_used_anew(ranks, rng, monkeypatch):
    """destroy_process_group() and a second init() leave no stale group behind."""
    if not launchers.detect().speaks_mpi:
        pytest.skip("would end the world of this run")
    monkeypatch.setenv("SYNCBN_TRANSPORT", "torch")
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    for _ in range(2):
        syncbn.init(torch_distributed=True, device=DEVICE)
        check_group(ranks, None, list(range(ranks.size)), rng)
        ranks.world.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.ranks(2)
def test_an_unconnected_job_warns_once(ranks, monkeypatch):
    """Silently unsynchronised is the worst outcome: the layer says so, once."""
    monkeypatch.delenv("SYNCBN_TRANSPORT", raising=False)
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    monkeypatch.setattr("syncbn.transports.choices.world_of_torch", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layer = syncbn.SyncBatchNorm(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(3, 4))
        layer(torch.randn(3, 4))
    texts = [str(w.message) for w in caught]
    ranks.check(len(texts) == 1 and "NOT synchronised" in texts[0] and str(ranks.size) in texts[0], f"{texts}")
    remedy = 'pip install "syncbn[mpi]"' if launchers.detect().speaks_mpi else "syncbn.init()"
    ranks.check(remedy in texts[0], texts[0])
