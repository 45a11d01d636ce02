# SPDX-License-Identifier: BSD-3-Clause
"""Which transport is chosen, why, and what is said where one is missing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import syncbn
from syncbn import transports
from syncbn.transports.single import SingleTransport
from tests import processes, warm
from tests.transports.test_launchers import MPICH, OPENMPI, SLURM, TORCHRUN


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})


def pretend(monkeypatch, environ, *, torch_world=None, mpi4py=True):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("syncbn.transports.choices.world_of_torch", lambda: torch_world)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if mpi4py else None)


class World:
    def __init__(self, size):
        self.size = lambda: size


@pytest.mark.parametrize(
    ("environ", "torch_world", "mpi4py", "expected"),
    [
        ({}, None, True, "single"),
        ({}, World(4), True, "torch"),
        (OPENMPI, None, True, "mpi"),
        (OPENMPI, World(4), True, "mpi"),
        (OPENMPI, World(2), True, "torch"),  # a torch world of another size was made on purpose
        (OPENMPI, World(4), False, "torch"),
        (MPICH, None, True, "mpi"),
        (SLURM, World(8), True, "torch"),
        (SLURM | {"PMIX_RANK": "3"}, None, True, "mpi"),
        (TORCHRUN, World(2), True, "torch"),
    ],
)
def test_the_choice(monkeypatch, environ, torch_world, mpi4py, expected):
    pretend(monkeypatch, environ, torch_world=torch_world, mpi4py=mpi4py)
    choice = transports.explain()
    assert choice.name == expected
    assert choice.reason
    assert not choice.unsynchronized


def test_a_gpu_tensor_goes_with_torch_where_it_is_initialised(monkeypatch):
    pretend(monkeypatch, OPENMPI, torch_world=World(4))
    assert transports.explain("cuda").name == "torch"


@pytest.mark.parametrize(
    ("environ", "mpi4py", "remedy"),
    [
        (OPENMPI, False, 'pip install "syncbn[mpi]"'),
        (TORCHRUN, True, "syncbn.init()"),
        (SLURM, True, "syncbn.init()"),
        (SLURM, True, "srun --mpi=pmix"),
    ],
)
def test_an_unconnected_job_is_named(monkeypatch, environ, mpi4py, remedy):
    pretend(monkeypatch, environ, mpi4py=mpi4py)
    choice = transports.explain()
    assert choice.name == "single"
    assert "NOT synchronised" in choice.unsynchronized
    assert remedy in choice.unsynchronized
    with pytest.warns(RuntimeWarning, match="NOT synchronised"):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))


@pytest.mark.parametrize("name", ["single", "mpi", "torch"], ids="to {}".format)
def test_the_override_wins(monkeypatch, name):
    pretend(monkeypatch, OPENMPI | {"SYNCBN_TRANSPORT": name})
    assert transports.explain().name == name


def test_an_unknown_override_lists_the_choices(monkeypatch):
    monkeypatch.setenv("SYNCBN_TRANSPORT", "carrier pigeon")
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    with pytest.raises(ValueError, match="one of auto, single, shm, mpi, nccl, torch; received 'carrier pigeon'"):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))


def test_asking_for_torch_before_it_is_there_says_how(monkeypatch):
    monkeypatch.setenv("SYNCBN_TRANSPORT", "torch")
    monkeypatch.setattr("syncbn.transports.dispatch.made", {})
    with pytest.raises(RuntimeError, match=r"initialised torch.distributed.*syncbn.init\(\)"):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))


WITHOUT_MPI4PY = "import sys; sys.modules['mpi4py'] = None; sys.modules['mpi4py.MPI'] = None\n"
TRAIN = "import torch, syncbn; layer = syncbn.SyncBatchNorm(3); layer(torch.randn(4, 3)).sum().backward()\n"


def test_everything_else_works_without_mpi4py():
    done = processes.python("-W", "error", "-c", WITHOUT_MPI4PY + TRAIN + "print(syncbn.init().transport.name)")
    assert done.stdout.split() == ["single"], done.stderr


@pytest.mark.parametrize("environ", [{"SYNCBN_TRANSPORT": "mpi"}, OPENMPI])
def test_asking_for_mpi_without_mpi4py_prints_the_install_line(environ):
    done = warm.python("-c", WITHOUT_MPI4PY + "import syncbn; syncbn.init()", **environ)
    assert done.returncode == 1
    assert "RuntimeError: The MPI transport needs mpi4py and an MPI library" in done.stderr
    assert 'pip install "syncbn[mpi]"' in done.stderr


def test_an_mpi_without_its_library_says_so(tmp_path):
    """mpi4py is installed, libmpi is not: mpi4py raises RuntimeError."""
    package = tmp_path / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    done = warm.python("-c", "import syncbn; syncbn.init()", SYNCBN_TRANSPORT="mpi", PYTHONPATH=tmp_path)
    assert done.returncode == 1
    assert "cannot load MPI library" in done.stderr
    assert "module load" in done.stderr


def test_an_mpi_that_joined_too_few_processes_is_refused():
    """mpirun of one MPI, the library of another: every process believes to be alone."""
    done = warm.python("-c", TRAIN, **OPENMPI)
    assert done.returncode == 1
    assert "openmpi started 4 processes (OMPI_COMM_WORLD_SIZE=4), but the MPI library joined 1" in done.stderr
    assert "syncbn doctor" in done.stderr


def test_threads_that_use_a_group_first_make_it_once(monkeypatch):
    made = []

    def slowly(device_type):
        time.sleep(0.05)
        made.append(SingleTransport())
        return made[-1]

    monkeypatch.setattr("syncbn.transports.dispatch.connect_everyone", slowly)
    with ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(lambda _: transports.choose(None), range(8)))
    assert len(made) == 1
    assert all(transport is made[0] for transport in chosen)


def test_a_thread_that_makes_a_group_keeps_no_other_group_waiting(monkeypatch):
    """Creation is collective: the threads of another rank may come in another order."""
    both = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(
        "syncbn.transports.dispatch.connect_subset", lambda spec, device_type: (both.wait(), SingleTransport())[1]
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(transports.choose, [syncbn.GroupSpec("mpi", (0, 1), label) for label in "ab"]))


def test_a_group_of_one_process_needs_no_launcher():
    layer = syncbn.SyncBatchNorm(3)
    for kind in ("mpi", "torch"):
        layer.process_group = syncbn.GroupSpec(kind, (0, 1, 2))
        layer(torch.randn(4, 3))
