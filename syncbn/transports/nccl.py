# SPDX-License-Identifier: BSD-3-Clause
"""NCCL through CuPy, for GPU tensors under mpirun without torch.distributed. MPI broadcasts its id."""

from __future__ import annotations

import importlib.util
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor

from syncbn.transports import gather
from syncbn.transports.base import RECENT, AbstractTransport
from syncbn.transports.mpi_staged import StagedTransport

if TYPE_CHECKING:
    from syncbn.transports.mpi import MPITransport

ID_BYTES = 128
PIECE = 2**40
"""A GPU's identity is sent in pieces below this: float64 is exact below 2^53."""


@final
class NcclTransport(AbstractTransport):
    """An NCCL communicator, used on torch's current stream. CPU tensors go through MPI.

    Args:
        host: MPI over the same ranks. Each must have a GPU of its own, and it must be the current device.

    Communication:
        At creation, one broadcast of 128 numbers over MPI, and the messages of NCCL.
    """

    name = "nccl"

    def __init__(self, host: MPITransport) -> None:
        nccl = library()
        self.host, self._nccl, self.recent = host, nccl, deque(maxlen=RECENT)
        self.rank, self.size, self.ranks = host.rank, host.size, host.ranks
        self.group_id, self.spec = host.group_id, host.spec
        number = torch.zeros(ID_BYTES, dtype=torch.uint8, device="cpu")
        if self.rank == 0:
            number = torch.tensor(list(nccl.get_unique_id()), dtype=torch.uint8, device="cpu")
        host.broadcast(number)
        self.communicator = nccl.NcclCommunicator(self.size, bytes(number.tolist()), self.rank)
        self._dtypes = {torch.float64: nccl.NCCL_FLOAT64, torch.float32: nccl.NCCL_FLOAT32}

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``. The host does not wait, and a CUDA graph can hold it."""
        if wire.is_cpu:
            return self.host.all_reduce(wire)
        pointer, kind = wire.data_ptr(), self._dtypes[wire.dtype]
        stream = torch._C._cuda_getCurrentRawStream(wire.get_device())
        self.communicator.allReduce(pointer, pointer, wire.numel(), kind, self._nccl.NCCL_SUM, stream)
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self.host.exchange_notes(note)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``. Sends bytes, so that NCCL need not know the dtype."""
        if tensor.is_cpu:
            return self.host.broadcast(tensor, root)
        size = tensor.numel() * tensor.element_size()
        stream = torch._C._cuda_getCurrentRawStream(tensor.get_device())
        self.communicator.bcast(tensor.data_ptr(), size, self._nccl.NCCL_INT8, root, stream)
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        return NcclTransport(cast("MPITransport", self.host.split(color)))

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        self.host.barrier()

    def close(self) -> None:
        """See ``AbstractTransport.close``. CuPy ends NCCL's communicator when nothing refers to this object."""
        self.host.close()


def on_gpus(host: MPITransport, override: str) -> AbstractTransport:
    """Chooses for GPU tensors of an MPI group: NCCL if every rank can load it and has its own GPU, else host memory.

    Args:
        host: MPI over the ranks.
        override: "nccl" or "mpi" selects one of them.

    Communication:
        One all-reduce of 5 W + 6 float64 values, so that all ranks choose alike.

    Raises:
        RuntimeError: on every rank, if NCCL is selected but cannot be used.
    """
    reason = problem()
    row = torch.tensor([float(bool(reason)), *gpu_identity()], dtype=torch.float64, device="cpu")
    table = gather.gather(row, host, "the choice of a transport for GPUs")
    if not reason and table[:, 0].any():
        reason = f"rank {host.ranks[int(table[:, 0].argmax())]} cannot load it"
    if not reason and len({tuple(row) for row in table.tolist()}) < host.size:
        reason = "NCCL refuses two ranks on one GPU, and some of these ranks share one"
    if override == "nccl" and reason:
        raise RuntimeError(
            f"SYNCBN_TRANSPORT=nccl needs NCCL and a GPU of its own for each rank; {reason}. Start one process for "
            "each GPU, or unset SYNCBN_TRANSPORT: MPI through host memory serves several ranks on one GPU."
        )
    return StagedTransport(host) if reason or override == "mpi" else NcclTransport(host)


def problem() -> str:
    """Says why CuPy's NCCL cannot be used. Empty if it can."""
    if importlib.util.find_spec("cupy") is None:
        return 'CuPy is not installed (pip install "syncbn[cuda13]", or [cuda12])'
    try:
        return "" if library().available else "CuPy finds no NCCL library (pip install nvidia-nccl-cu13, or -cu12)"
    except (ImportError, OSError) as error:  # OSError: CuPy cannot make its cache folder
        return f"CuPy does not load: {error}"


def library() -> Any:
    """Returns CuPy's NCCL, without its warning: ``problem`` says what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl

        return nccl


def gpu_identity() -> list[float]:
    """Returns the unique id of the current GPU, as four exact numbers."""
    number = int(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).replace("-", ""), 16)
    return [float(number // PIECE**power % PIECE) for power in range(4)]
