# SPDX-License-Identifier: BSD-3-Clause
"""What is there on this host, and what would bring the rest: launchers, transports, kernels, extras."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.distributed as dist

from syncbn import kernels
from syncbn.cli.doctor import programs
from syncbn.transports import shared_memory
from syncbn.transports.mpi_probe import MPIFacts

COMPILER = "a C++17 compiler (`apt-get install g++`), then reinstall syncbn"
CUDA = "a torch with CUDA: https://pytorch.org/get-started"
EXTRAS = {
    "mpi": "MPI for Python and Open MPI",
    "cuda12": "kernels for a GPU, with a torch for CUDA 12",
    "cuda13": "kernels for a GPU, with a torch for CUDA 13",
    "examples": "what examples/ need",
    "wrappers": "Lightning and Accelerate",
    "zoo": "model libraries, for their tests",
}
"""Those for users; the others are for who works on syncbn."""


@dataclass(frozen=True)
class Item:
    """A thing that can be there."""

    group: str
    name: str
    there: bool
    note: str
    """What was found, or why it is not there."""
    install: str = ""
    """What would bring it; empty if it is there, or nothing would."""


def checklist(mpi: MPIFacts) -> list[Item]:
    """Lists everything. Starts ``mpirun --version`` and ``srun --version``.

    Args:
        mpi: what mpi4py loads.
    """
    launchers = [Item("launchers", *found) for found in (programs.mpirun(mpi), programs.torchrun(), programs.srun())]
    return [*launchers, *_transports(mpi), *_kernels(), *_extras()]


def version_of(package: str) -> str:
    """Returns the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _transports(mpi: MPIFacts) -> list[Item]:
    why = shared_memory.problem()
    library = f"{mpi.name} {mpi.version} by mpi4py {version_of('mpi4py')}, {mpi.library}"
    gloo = dist.is_available() and dist.is_gloo_available()
    group = "transports"
    return [
        Item(group, "shared memory", not why, why or "the ranks of one host", COMPILER if why else ""),
        Item(group, "MPI", not mpi.error, mpi.error or library, programs.install_mpi() if mpi.error else ""),
        Item(group, "torch gloo", gloo, f"torch {torch.__version__}" if gloo else "this torch has no gloo"),
        _nccl(),
        _nccl_under_mpirun(),
    ]


def _nccl() -> Item:
    name = "torch nccl"
    if torch.version.cuda is None or not dist.is_available() or not dist.is_nccl_available():
        return Item("transports", name, False, "this torch has no CUDA", CUDA)
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if not torch.cuda.is_available():
        return Item("transports", name, False, f"NCCL {version} is there, and torch sees no NVIDIA GPU")
    return Item("transports", name, True, f"NCCL {version}, {torch.cuda.device_count()} GPUs")


def _nccl_under_mpirun() -> Item:
    name = "nccl, mpirun"
    if torch.version.cuda is None:
        return Item("transports", name, False, "this torch has no CUDA", CUDA)
    if importlib.util.find_spec("cupy") is None:
        return Item("transports", name, False, "CuPy is not installed", _cupy())
    return Item("transports", name, True, "by CuPy")


def _cupy() -> str:
    return f'`pip install "syncbn[cuda{str(torch.version.cuda).partition(".")[0]}]"`'


def _kernels() -> list[Item]:
    try:
        host = kernels.explain()
    except (ValueError, RuntimeError) as error:  # of SYNCBN_KERNELS: the report has it as a problem
        host = kernels.Choice("torch", str(error))
    there, device = host.name == "host", kernels.explain_device()
    install = COMPILER if "not built" in host.reason else ""
    reason = host.reason.partition("; with a C++17")[0]
    group, gpu = "kernels", device.name == "cupy"
    reason_on_gpu = device.reason.partition("; `pip")[0] if torch.version.cuda else "this torch has no CUDA"
    return [
        Item(group, "CPU", there, reason if there or install else f"torch operators: {reason}", install),
        Item(group, "GPU", gpu, reason_on_gpu, "" if gpu else _for_gpu()),
        Item(group, "torch operators", True, "where there are no others, and for masks"),
    ]


def _for_gpu() -> str:
    if torch.version.cuda is None:
        return CUDA
    return "" if importlib.util.find_spec("cupy") else _cupy()


def _extras() -> list[Item]:
    """Lists the extras, by what the installed package says of itself."""
    try:
        required = metadata.requires("syncbn") or []
    except metadata.PackageNotFoundError:
        return [Item("extras", "", False, "syncbn runs from a folder and is not installed", "`pip install -e .` there")]
    packages: dict[str, list[str]] = {name: [] for name in EXTRAS}
    for text in required:
        extra = re.search(r"""extra == ["']([\w-]+)["']""", text)
        if extra and extra[1] in packages:
            packages[extra[1]].append(re.split(r"[\s;<>=!~\[(]", text, maxsplit=1)[0])
    return [_extra(name, wanted) for name, wanted in packages.items() if wanted]


def _extra(name: str, wanted: list[str]) -> Item:
    missing = [package for package in wanted if version_of(package) == "not installed"]
    if not missing:
        return Item("extras", name, True, ", ".join(f"{package} {version_of(package)}" for package in wanted))
    cuda = torch.version.cuda
    if name.startswith("cuda") and (cuda is None or cuda.partition(".")[0] != name[4:]):
        return Item("extras", name, False, f"{EXTRAS[name]}; this one is for {f'CUDA {cuda}' if cuda else 'CPUs'}")
    note = EXTRAS[name] if len(missing) == len(wanted) else f"{EXTRAS[name]}: no {', '.join(missing)}"
    return Item("extras", name, False, note, f'`pip install "syncbn[{name}]"`')
