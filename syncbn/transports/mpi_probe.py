# SPDX-License-Identifier: BSD-3-Clause
"""Finds out about the MPI library: its name, whether it starts. Never raises.

Only the standard library at the top: ``beside`` runs this file as a script.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

_LIBRARY = re.compile(r"(/\S*/lib(?:mpi|mpich|mpi_abi|mpi_cray)\.so[.\d]*)$", re.MULTILINE)


@dataclass(frozen=True)
class MPIFacts:
    """An MPI library as mpi4py sees it; ``error`` says why there is none."""

    name: str = ""
    version: str = ""
    library: str = ""
    """The file that was loaded."""
    size: int = 0
    """Processes that it joined; 0 before MPI_Init."""
    error: str = ""


def identify() -> MPIFacts:
    """Loads the library without MPI_Init, which may abort under the launcher of another MPI."""
    try:
        MPI = _load()
    except Exception as error:
        return MPIFacts(error=f"{error}" or type(error).__name__)
    name, version = MPI.get_vendor()
    return MPIFacts(name, ".".join(map(str, version)), next(iter(loaded_libraries()), ""))


def join() -> MPIFacts:
    """Joins the MPI job by MPI_Init with MPI_THREAD_MULTIPLE.

    Communication:
        Collective over the processes of the job.
    """
    facts = identify()
    if facts.error:
        return facts
    try:
        MPI = _load()
        if not MPI.Is_initialized():
            MPI.Init_thread()
        size = MPI.COMM_WORLD.Get_size()
    except Exception as error:
        return MPIFacts(facts.name, facts.version, facts.library, error=f"MPI_Init: {error}")
    return MPIFacts(facts.name, facts.version, facts.library, size)


def beside(limit: float = 30.0) -> MPIFacts:
    """Does the same in another process, so that an MPI that aborts or hangs does no harm in this one.

    Args:
        limit: seconds until the process is ended.
    """
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return MPIFacts(error=f"MPI_Init did not return within {limit:g} s")
    except OSError as error:
        return MPIFacts(error=str(error))
    try:
        return MPIFacts(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return MPIFacts(error=f"MPI_Init ended the process with status {done.returncode}: {last}")


def loaded_libraries() -> list[str]:
    """Returns the files of the MPI libraries in this process, from its memory map. Empty without /proc."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return list(dict.fromkeys(_LIBRARY.findall(maps.read())))
    except OSError:
        return []


def _load() -> Any:
    """Imports mpi4py.MPI without MPI_Init. ``join`` initialises it, and it is finalised at exit."""
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mpi4py warns of another MPI's launcher; the caller reports that
        from mpi4py import MPI
    return MPI


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(join())) + "\n")
