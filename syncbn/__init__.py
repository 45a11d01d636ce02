# SPDX-License-Identifier: BSD-3-Clause
"""Exact synchronized batch normalization for PyTorch, on any number of processes.

Data takes five steps, and the same names stand wherever a step is done:

    forward    x  -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

A tour, in reading order:

    reference.py      the whole layer over the global batch, in one process: what the rest must equal
    functional.py     the skeleton: the picture above, step by step, for every way through the layer
    calls.py          one forward and its backward in eager mode: kernels, group and identity
    moments.py        what travels: the call, and sums of x and x * x, in float64
    sites.py          what a layer is called, and the numbers by which a message says which call it is
    kernels/          the steps on one process's data: torch_ops.py to be read, host/ compiled C++, cuda/ for GPUs
    transports/       the step across processes
    agreement.py      errors that all ranks raise alike; checks.py says what is checked
    compiled/         calls for compilers and second derivatives; operators.py is the all-reduce, order.py its order
    layer.py          the module; convert.py makes one of a torch batch norm, and back, unless obstacles.py objects
    groups.py         what a module stores instead of a communicator
    renorm.py         batch renormalization: another weight and bias
    recomputation.py  activation checkpointing: a transport that returns the sums of the first forward
    modes.py          freeze, unfreeze, no_sync; statistics.py has recalibrate, with recorder.py
    deployment.py     torch.jit.script
    world.py          init(): launchers.py finds who started us, rendezvous.py connects torch.distributed
    joining.py        join(): ranks with fewer steps (announcing.py, empty_share.py, outputs.py, join_errors.py);
                      optimizer_state.py copies optimizers, by nested_values.py; stale_optimizers.py refuses others
    cli.py            `syncbn doctor` (doctor.py, checkup.py, mpi_probe.py) and `syncbn bench` (bench.py,
                      bench_report.py; composite.py is what others do; bench_parts.py and bench_memory.py say
                      where a step's time and memory go; bench_gpu.py is for a GPU, with its plan, contenders, timing,
                      verdict and report)
"""

from syncbn import functional
from syncbn.convert import convert_sync_batchnorm, name_layers, revert_sync_batchnorm
from syncbn.groups import GroupSpec
from syncbn.joining import join
from syncbn.layer import LazySyncBatchNorm, SyncBatchNorm
from syncbn.modes import freeze, no_sync, unfreeze
from syncbn.statistics import recalibrate
from syncbn.world import World, init

__version__ = "0.1.0"

__all__ = [
    "GroupSpec",
    "LazySyncBatchNorm",
    "SyncBatchNorm",
    "World",
    "convert_sync_batchnorm",
    "freeze",
    "functional",
    "init",
    "join",
    "name_layers",
    "no_sync",
    "recalibrate",
    "revert_sync_batchnorm",
    "unfreeze",
]
