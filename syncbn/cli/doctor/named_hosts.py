# SPDX-License-Identifier: BSD-3-Clause
"""How many hosts the user has named to the launcher, as far as this process can see."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

FILES = ("PRTE_MCA_prte_default_hostfile", "OMPI_MCA_orte_default_hostfile")
_LISTS = ("--host", "-host", "-H", "-hosts", "--hosts")
_FILE_OPTIONS = ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f")


def count(environ: Mapping[str, str] = os.environ, command: Sequence[str] | None = None) -> int:
    """Returns the number of hosts named, or 0 if that cannot be seen.

    Args:
        environ: variables of this process.
        command: the command line of the launcher; None looks it up: it is the parent of a process on its own host.
    """
    if environ.get("SLURM_JOB_NUM_NODES", "").isdigit():
        return int(environ["SLURM_JOB_NUM_NODES"])
    words = _of_parent() if command is None else command
    names = set()
    for option, value in itertools.pairwise(words):
        if option in _LISTS:
            names |= {name.partition(":")[0] for name in value.split(",")}
        if option in _FILE_OPTIONS:
            names |= _of_file(value)
    for name in FILES:
        names |= _of_file(environ.get(name, ""))
    return len(names)


def _of_parent() -> Sequence[str]:
    """Returns the command line of the launcher, if it is the parent of this process."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ()
    return words if Path(words[0]).name.startswith(("mpirun", "mpiexec", "prterun", "prun", "orterun")) else ()


def _of_file(path: str) -> set[str]:
    """Returns the first word of each line. A relative path is of the launcher, which starts processes where it is."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines() if path else []
    except OSError:
        return set()
    words = [line.partition("#")[0].split() for line in lines]
    return {each[0].partition(":")[0] for each in words if each}
