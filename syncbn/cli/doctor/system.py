# SPDX-License-Identifier: BSD-3-Clause
"""The machine under this process: cores, threads, memory, the limits of a container, and variables that matter."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from syncbn.cli.doctor import container
from syncbn.cli.doctor.container import read
from syncbn.transports.identity import JOB

PREFIXES = ("SYNCBN_", "OMP_", "MKL_", "GLOO_", "MASTER_", "MALLOC_", "OMPI_MCA_", "PRTE_MCA_", "MPI4PY_", "NCCL_")
NAMES = ("CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
_OF_MPIRUN = tuple(f"OMPI_MCA_{name}" for name in ("PREFIXES", "num_procs", "cpu_type", "initial_wdir", "orte_", "ess"))
"""What mpirun sets for itself: nobody has chosen it."""
_GIB = float(2**30)


@dataclass(frozen=True)
class System:
    """A machine, as one process sees it."""

    os: str = ""
    cpu: str = ""
    cores: int = 0
    """Cores that this process may use."""
    cores_of_host: int = 0
    core_limit: float | None = None
    """Cores' worth of time that a container may use; None for no limit."""
    threads: int = 0
    """Threads of one operator of torch in this process."""
    memory_gib: float = 0.0
    memory_free_gib: float = 0.0
    memory_limit_gib: float | None = None
    """Of a container; None for no limit."""
    shm_free_gib: float | None = None
    """Free in /dev/shm, which workers of a DataLoader and Open MPI use; None if there is none."""
    load: float = 0.0
    """Programs that ran or waited for a core, on average over the last minute."""


def look() -> System:
    """Looks at this process's machine."""
    memory = _memory()
    return System(
        os=_os(),
        cpu=_cpu(),
        cores=len(own_cores()),
        cores_of_host=os.cpu_count() or 1,
        core_limit=container.core_limit(),
        threads=torch.get_num_threads(),
        memory_gib=round(memory.get("MemTotal", 0.0), 1),
        memory_free_gib=round(memory.get("MemAvailable", 0.0), 1),
        memory_limit_gib=container.memory_limit(),
        shm_free_gib=_free("/dev/shm"),
        load=round(os.getloadavg()[0], 1),
    )


def own_cores() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables that change what a job does, sorted. The secret of a job is not shown."""
    found = {
        name: value
        for name, value in sorted(environ.items())
        if (name in NAMES or name.startswith(PREFIXES)) and not name.startswith(_OF_MPIRUN)
    }
    return {name: "(set)" if name == JOB else value for name, value in found.items()}


def waited_ns() -> int | None:
    """Returns for how long this process has waited for a core, in total; None where the system does not count it."""
    words = read(Path("/proc/self/schedstat")).split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else None


def _os() -> str:
    names = dict(line.partition("=")[::2] for line in read(Path("/etc/os-release")).splitlines())
    name = names.get("PRETTY_NAME", "").strip('"')
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{name}, {kernel}" if name else kernel


def _cpu() -> str:
    lines = read(Path("/proc/cpuinfo")).splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _memory() -> dict[str, float]:
    """Returns the sizes of /proc/meminfo in GiB."""
    lines = [line.split() for line in read(Path("/proc/meminfo")).splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 / _GIB for words in lines if len(words) == 3}


def _free(path: str) -> float | None:
    try:
        return round(shutil.disk_usage(path).free / _GIB, 2)
    except OSError:
        return None
