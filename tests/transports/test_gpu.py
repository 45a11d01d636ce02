# SPDX-License-Identifier: BSD-3-Clause
"""The transports of GPU tensors, with a GPU, an NCCL and an MPI that only take notes."""

import dataclasses
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from syncbn import kernels, transports
from syncbn.moments import CALL
from syncbn.transports import gather, mpi_staged, nccl
from syncbn.transports.groups import GroupSpec
from syncbn.transports.launchers import Launch
from syncbn.transports.torch_dist import TorchTransport
from syncbn.world import init, rendezvous
from tests import warm


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cpu = False

    def get_device(self):
        return 3


class Host:
    """MPI over some ranks that all are in this one's call, and send what this one sends, or rows that are given."""

    rank, group_id, spec, serial = 0, 9, GroupSpec("mpi", (0, 1)), 0

    def __init__(self, size=2, rows=None):
        self.size, self.ranks, self.notes, self.rows = size, tuple(range(size)), [], rows

    def all_reduce(self, wire):
        self.notes.append(("all_reduce", wire.numel()))
        if self.rows:
            wire[:CALL] *= self.size
            wire[CALL:] = torch.tensor(self.rows, dtype=wire.dtype).view(-1)
        return wire

    def reduce(self, wire, message):
        return self.all_reduce(wire)

    def exchange_notes(self, note):
        self.notes.append(("exchange_notes", note))
        return [note] * self.size

    def broadcast(self, tensor, root=0):
        self.notes.append(("broadcast", tensor.numel(), root))
        return tensor


@pytest.fixture
def library(monkeypatch):
    """CuPy's NCCL."""
    notes = []
    module = ModuleType("nccl")
    module.available, module.NCCL_SUM, module.NCCL_INT8, module.NCCL_FLOAT64, module.NCCL_FLOAT32 = True, 0, 1, 8, 7
    module.get_unique_id = lambda: bytes(range(128, 256))
    module.notes = notes

    class NcclCommunicator:
        def __init__(self, size, number, rank):
            if type(number) is not type(module.get_unique_id()):
                raise TypeError("Argument 'commId' has incorrect type")
            notes.append(("init", size, number, rank))

        def allReduce(self, *arguments):  # noqa: N802 - CuPy's name
            notes.append(("allReduce", *arguments))

        def bcast(self, *arguments):
            notes.append(("bcast", *arguments))

    module.NcclCommunicator = NcclCommunicator
    monkeypatch.setattr(nccl, "library", lambda: module)
    monkeypatch.setattr(nccl, "problem", lambda: "")
    monkeypatch.setattr(nccl, "gpu_identity", lambda: [1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    return module


def test_nccl_sums_in_place_on_the_current_stream(library):
    transport = nccl.NcclTransport(Host())
    for dtype, code in ((torch.float64, 8), (torch.float32, 7)):
        wire = torch.ones(6, dtype=dtype).as_subclass(OnGpu)
        assert transport.all_reduce(wire) is wire
        assert library.notes[-1] == ("allReduce", wire.data_ptr(), wire.data_ptr(), 6, code, 0, 103)
    tensor = torch.ones(3, dtype=torch.bfloat16).as_subclass(OnGpu)
    transport.broadcast(tensor, 1)
    assert library.notes[-1] == ("bcast", tensor.data_ptr(), 6, 1, 1, 103)


def test_mpi_carries_the_id_of_nccl_and_the_cpu_tensors(library):
    number = library.get_unique_id()
    host = Host()
    transport = nccl.NcclTransport(host)
    assert library.notes == [("init", 2, number, 0)]
    assert host.notes == [("broadcast", 128, 0)]
    transport.all_reduce(torch.ones(4))
    assert host.notes[-1] == ("all_reduce", 4)
    assert (transport.group_id, transport.spec) == (9, host.spec)


ALONE = [[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 5.0]]
SHARED = [ALONE[0], ALONE[0]]
WITHOUT = [ALONE[0], [1.0, 1.0, 2.0, 3.0, 5.0]]


@pytest.mark.parametrize(
    ("rows", "override", "name"),
    [
        (ALONE, "auto", "nccl"),
        (ALONE, "nccl", "nccl"),
        (ALONE, "mpi", "mpi"),
        (SHARED, "auto", "mpi"),
        (WITHOUT, "auto", "mpi"),
    ],
)
def test_nccl_where_each_rank_has_it_and_a_gpu_of_its_own(library, rows, override, name):
    assert nccl.on_gpus(Host(rows=rows), override).name == name


@pytest.mark.parametrize(
    ("rows", "reason"), [(SHARED, "NCCL refuses two ranks on one GPU"), (WITHOUT, "rank 1 cannot")]
)
def test_a_demand_for_nccl_that_cannot_be_met_is_refused_on_every_rank(library, rows, reason):
    with pytest.raises(RuntimeError, match=reason):
        nccl.on_gpus(Host(rows=rows), "nccl")


def test_a_gpus_identity_is_exact(monkeypatch):
    uuid = "ffffffff-ffff-ffff-ffff-fffffffffffe"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    pieces = nccl.gpu_identity()
    assert sum(int(piece) << (40 * power) for power, piece in enumerate(pieces)) == 2**128 - 2


class Event:
    """A CUDA event that takes notes."""

    def __init__(self, notes):
        self.notes = notes

    def __getattr__(self, name):
        return lambda: self.notes.append(name)


def test_notes_go_by_the_way_of_the_host(library):
    """Not by NCCL, which is what may have failed."""
    host = Host()
    for transport in (nccl.NcclTransport(host), mpi_staged.StagedTransport(host, Event([]), "cpu")):
        assert transport.exchange_notes("lost") == ["lost"] * 2
        assert host.notes[-1] == ("exchange_notes", "lost")


def test_pinned_memory_waits_for_the_producing_stream_and_is_not_overwritten_too_soon(monkeypatch):
    notes = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(notes))
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, dtype, device, pin_memory: empty(size, dtype=dtype) if pin_memory and device == "cpu" else None,
    )
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other, non_blocking: notes.append("copy") or copy(self, other)
    )
    stage, tensor = mpi_staged.PinnedStage(), torch.arange(6.0).view(2, 3)
    host = stage.to_host(tensor)
    assert notes == ["wait", "copy", "record", "synchronize"]
    host += 1
    stage.to_device(host, tensor)
    assert notes[4:] == ["copy", "record"]
    assert torch.equal(tensor, torch.arange(1.0, 7.0).view(2, 3))
    assert stage.to_host(tensor) is host, "kept"


def test_pinned_memory_takes_the_stream_of_the_tensors_device(monkeypatch):
    devices, events = [], []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: devices.append(tensor.get_device()) or nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(Event([])) or events[-1])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device, pin_memory: empty(size, dtype=dtype))
    stage, tensor = mpi_staged.PinnedStage(), torch.ones(3).as_subclass(OnGpu)
    stage.to_device(stage.to_host(tensor), tensor)
    assert devices == [3, 3]


def test_a_capture_over_host_memory_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    transport = mpi_staged.StagedTransport(Host(), Event([]), "cpu")
    with pytest.raises(RuntimeError, match="A CUDA graph cannot hold an all-reduce that the host takes part in"):
        transport.all_reduce(torch.ones(3))


def test_cuda_tensors_under_mpi_ask_for_nccl_where_there_is_cupy(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "2" if "SIZE" in name else "0")
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    sys.modules["cupy"].__spec__ = SimpleNamespace()
    assert transports.explain("cuda").name == "nccl"
    assert transports.explain("cpu").name == "mpi"
    sys.modules["cupy"].__spec__ = None
    monkeypatch.setattr(
        transports.choices.importlib.util, "find_spec", lambda name: None if name == "cupy" else object()
    )
    assert transports.explain("cuda").name == "mpi"


def launch(local_rank, local_size=0):
    size = max(local_size, local_rank + 1)
    return Launch("openmpi", local_rank, size, local_rank, speaks_mpi=True, evidence="", local_size=size)


@pytest.mark.parametrize(
    ("local_rank", "gpus", "visible", "expected"), [(1, 2, "", 1), (0, 1, "", 0), (3, 1, "7", 0), (1, 2, "4,5", 1)]
)
def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch, local_rank, gpus, visible, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert init.device_of(launch(local_rank)) == torch.device("cuda", expected)


def test_torchs_default_device_is_not_that_of_the_librarys_own_numbers():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with torch.device("meta"):  # what landed there would have no values
            transport = TorchTransport(dist.group.WORLD)
            gather.require_equal({"C": 3.0}, transport, "It", "")
            with pytest.raises(ValueError, match="On rank 0: bad"):
                gather.raise_together(ValueError("bad"), transport)
            assert init.init().loss_scale(4) == 1.0
    finally:
        dist.destroy_process_group()


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert init.init(device="cuda").device == torch.device("cuda", 2)
    assert chosen == [torch.device("cuda", 2)]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not rendezvous.shares_gpus(launch(1, 2))
    for local_rank in range(3):  # also on those that would have one
        with pytest.raises(RuntimeError, match=r"3 processes and 2 GPUs.*NCCL refuses two ranks on one GPU"):
            init.device_of(launch(local_rank, 3))


def test_world_check_waits_for_the_gpu_and_then_looks(monkeypatch):
    place = init.init()
    place.check()  # on a CPU nothing is outstanding
    notes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: notes.append(("synchronize", device)))
    monkeypatch.setattr(kernels.dispatch, "look", lambda device: notes.append(("look", device)))
    gpu = torch.device("cuda", 1)
    dataclasses.replace(place, device=gpu).check()
    assert notes == [("synchronize", gpu), ("look", gpu)]


@pytest.mark.parametrize("launch_script", ["mpirun.sh", "torchrun.sh"])
@pytest.mark.program
def test_the_program_that_make_gpu_runs_on_several_ranks_holds_on_a_cpu(launch_script):
    result = warm.run(f"launch/{launch_script}", "-m", "tests.gpu.ranks", NPROC=2, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert "2 ranks over" in result.stdout
