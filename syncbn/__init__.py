# SPDX-License-Identifier: BSD-3-Clause
"""Exact synchronized batch normalization for PyTorch, on any number of processes.

Data takes these steps. Each step has the same name everywhere:

    forward    x  -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

A tour, in reading order:

    reference.py      the whole layer over the global batch, in one process: the rest must equal it
    functional.py     the skeleton: the steps above, in order, for every kind of call
    moments.py        the wire: which call it is, and sums of x and x * x, in float64
    kernels/          the steps on one process's data: torch_ops.py is readable, host/ compiled C++, cuda/ for GPUs
    transports/       the step across processes, on one host through shared_memory.py and segment.hpp; groups.py is
                      what a module stores of a group, gather.py the errors that all ranks raise alike
    checks/           the errors of a call
    calls/            how one forward and its backward are done: eager, compiled, repeated, renormalized
    layer.py          the module, SyncBatchNorm; evaluation.py is eval of mixed dtypes
    convert/          conversion of torch's and timm's batch norms and back, refused if something would be lost;
                      summary() says what stays local
    training/         freeze, no_sync, recalibrate, join, drift
    world/            init(): which launcher started this process, and connecting it
    cli/              `syncbn doctor` and `syncbn bench`
"""

from syncbn import functional
from syncbn.calls.renorm import RenormLimits
from syncbn.convert import convert_sync_batchnorm, name_layers, revert_sync_batchnorm
from syncbn.convert.classes import (
    LazySyncBatchNorm1d,
    LazySyncBatchNorm2d,
    LazySyncBatchNorm3d,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)
from syncbn.convert.known import optional_class
from syncbn.convert.lazy import LazySyncBatchNorm
from syncbn.convert.summary import summary
from syncbn.layer import SyncBatchNorm
from syncbn.training.drift.measuring import drift
from syncbn.training.join.joining import join
from syncbn.training.modes import freeze, no_sync, unfreeze
from syncbn.training.recalibration import recalibrate
from syncbn.transports.groups import GroupSpec
from syncbn.transports.shared_memory import RankEndedError
from syncbn.world.init import init
from syncbn.world.world import World


def __getattr__(name: str) -> type:
    """Finds a class that needs timm, also for a pickle that holds one."""
    return optional_class(name)


__version__ = "0.1.0"

__all__ = [
    "GroupSpec",
    "LazySyncBatchNorm",
    "LazySyncBatchNorm1d",
    "LazySyncBatchNorm2d",
    "LazySyncBatchNorm3d",
    "RankEndedError",
    "RenormLimits",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "World",
    "convert_sync_batchnorm",
    "drift",
    "freeze",
    "functional",
    "init",
    "join",
    "name_layers",
    "no_sync",
    "recalibrate",
    "revert_sync_batchnorm",
    "summary",
    "unfreeze",
]
