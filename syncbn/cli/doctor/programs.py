# SPDX-License-Identifier: BSD-3-Clause
"""The launchers of this host, and whether they can start a job of syncbn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from syncbn.cli.doctor import mpi_job
from syncbn.transports.mpi_probe import MPIFacts

_SECONDS = 5.0
_OF_A_JOB = ("OMPI_COMM", "PMIX_", "PMI_", "PRTE_", "HYDI_", "HYDRA_", "MPI_LOCAL", "SLURM_STEP", "SLURM_PROCID")
"""Variables that would tell a launcher that it is in a job already."""


class Found(NamedTuple):
    """What a checklist says of a launcher."""

    name: str
    there: bool
    note: str
    install: str = ""


def mpirun(mpi: MPIFacts) -> Found:
    """Finds mpirun, and whether it goes with what mpi4py loads."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return Found("mpirun", False, "not on the PATH", install_mpi())
    launcher, version = read_version(_said([path, "--version"]))
    family = mpi_job.FAMILIES.get(launcher)
    name = f"{family.name if family else 'an unknown MPI'} {version}".strip()
    if mpi.error:
        return Found("mpirun", False, f"{path} of {name}, and mpi4py cannot load MPI", install_mpi(launcher))
    if mpi_job.is_foreign(launcher, mpi) and family is not None:
        note = f"{path} of {name}, and mpi4py loads {mpi.name} {mpi.version}"
        library = next(iter(mpi_job.beside(Path(path).resolve(), family, {})), "")
        site = f", or `export {mpi_job.LIBRARY}={library}`" if library else ""
        return Found("mpirun", False, note, f"`pip install {family.package}`{site}")
    return Found("mpirun", True, f"{name}, {path}")


def install_mpi(launcher: str = "") -> str:
    """Returns what brings MPI for an mpirun of a kind; for none, with its own mpirun."""
    return f"`{mpi_job.install(launcher)}`"


def torchrun() -> Found:
    """Finds torchrun, which comes with torch."""
    if not dist.is_available():
        return Found("torchrun", False, f"torch {torch.__version__} is built without torch.distributed")
    path, instead = shutil.which("torchrun"), "python -m torch.distributed.run does the same"
    where = path or f"not on the PATH: {instead}"
    if path and Path(path).parent != Path(sys.executable).parent:
        where = f"{path} is of another Python: {instead}"
    return Found("torchrun", True, f"torch {torch.__version__}, {where}")


def srun() -> Found:
    """Finds srun, and whether it knows a cluster."""
    path = shutil.which("srun")
    if path is None:
        return Found("srun", False, "not on the PATH: it comes with Slurm, on the machines of a cluster")
    said = _said([path, "--version"])
    version = re.search(r"^slurm\S* ([\d.]+)", said, re.MULTILINE)
    if version is None:
        last = (said.strip().splitlines() or ["it said nothing"])[-1].removeprefix("srun: ").removeprefix("fatal: ")
        return Found("srun", False, f"{path} knows no cluster: {last[:120]}")
    return Found("srun", True, f"Slurm {version[1]}, {path}")


def read_version(said: str) -> tuple[str, str]:
    """Reads the answer of ``mpirun --version``: the launcher as in ``launchers.detect``, and a version."""
    version = re.search(r"(?:Version:?|Open MPI\)|Open MPI) +v?(\d[\w.]*)", said)
    known = {"Open MPI": "openmpi", "OpenRTE": "openmpi", "HYDRA": "mpich", "Intel(R) MPI": "mpich"}
    return next((name for words, name in known.items() if words in said), ""), version[1] if version else ""


def _said(command: list[str]) -> str:
    """Returns what a program prints, without the variables of this job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_JOB)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=kept)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stdout + done.stderr
