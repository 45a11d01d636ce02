# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn bench`: times forward + backward of the layer, of torch's layer and of the usual baseline on CPU.

N batch, C channels, S product of the spatial dims, W ranks.

The layers take turns, A B C A B C, so that a slow moment of the machine affects all of them. All ranks start each turn
together. The time of a turn is that of its slowest rank.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import syncbn
from syncbn import kernels
from syncbn.cli.bench import report
from syncbn.cli.bench.baseline import BaselineBatchNorm
from syncbn.cli.bench.report import Machine, Options, Row, Shape
from syncbn.transports import gather, launchers, parts
from syncbn.world.world import World


def measure(
    shape: Shape, options: Options, world: World, tick: Callable[[], object] = lambda: None, *, node: bool = False
) -> Row:
    """Times one shape.

    Args:
        shape: (N, C, H, W) of each local batch.
        options: how to measure; ``shapes`` is not read.
        world: the processes.
        tick: called after every round, for a progress bar.
        node: whether to time groups of one node, too. The same on every rank.

    Communication:
        That of the layers, one all-reduce of one value before every turn, and one of all times at the end.

    Raises:
        RuntimeError: on every rank, if a local batch does not fit into memory on any rank.
    """
    error: Exception | None = None
    try:
        layers, x, grad_y = _prepare(shape, options, world, node=node)
    except (RuntimeError, MemoryError) as failure:
        error = RuntimeError(f"syncbn bench needs memory for shape {shape}: {str(failure).splitlines()[0]}")
    world.raise_together(error)
    times: list[float] = []
    for round_ in range(options.warmup + options.repeats):
        turns = [one_turn(layer, x, grad_y, world) for layer in layers.values()]
        times += turns if round_ >= options.warmup else []
        tick()
    slowest = gather.gather(torch.tensor(times, dtype=torch.float64), world.transport).amax(0)
    columns = slowest.view(options.repeats, len(layers)).T.tolist()
    medians = {name: statistics.median(column) for name, column in zip(layers, columns, strict=True)}
    return Row(shape, **medians)


def _prepare(
    shape: Shape, options: Options, world: World, *, node: bool
) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Makes the layers by the names of their times in a row, an input and a gradient."""
    C = shape[1]
    dtype: torch.dtype = getattr(torch, options.dtype)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    grad_y = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    layers: dict[str, nn.Module] = {"torch_us": nn.BatchNorm2d(C), "syncbn_us": syncbn.SyncBatchNorm(C)}
    if node:
        layers["node_us"] = syncbn.SyncBatchNorm(C, group_size="node")
    if _has_baseline(options, world.size):
        layers["baseline_us"] = BaselineBatchNorm(C)
    if dtype == torch.float64:
        layers = {name: layer.double() for name, layer in layers.items()}
    return layers, x.requires_grad_(), grad_y


def _has_baseline(options: Options, processes: int) -> bool:
    return options.baseline and processes > 1


def one_turn(layer: nn.Module, x: Tensor, grad_y: Tensor, world: World) -> float:
    """Returns the microseconds of one forward and backward, started on all ranks together."""
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    world.transport.all_reduce(torch.zeros(1, dtype=torch.float64))  # starts all ranks within 1 us; barrier() sleeps
    start = time.perf_counter_ns()
    layer(x).backward(grad_y)
    return (time.perf_counter_ns() - start) / 1e3


def describe_machine(world: World) -> Machine:
    """Collects what a reader needs to judge the numbers."""
    threads, kernel = torch.get_num_threads(), kernels.choose(torch.empty(0)).name
    cores = len(os.sched_getaffinity(0))
    return Machine(
        _cpu_model(),
        cores,
        world.size,
        threads,
        torch.__version__,
        syncbn.__version__,
        world.transport.name,
        kernel,
        "keeps freed memory" if _keep_freed_memory() else "the system's default",
    )


def _keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory, as it does anyway in a long training run. Returns whether it worked.

    By default, depending on earlier allocations, glibc may return the results of a step to the system and fault them in
    again, a page at a time. That can double the time of any of the layers, by chance.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    return bool(mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def run(options: Options, *, form: str, output: str | None = None) -> int:
    """Runs the command.

    Args:
        options: what to measure.
        form: "table", "json" or "csv".
        output: a file that gets the JSON document, after every shape; or None.

    Returns:
        0; 1 if the processes are not connected; 2 if a shape does not fit into memory, or ``output`` cannot be written.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as the launch scripts do: processes share the cores
    rank = 0
    try:
        launch = launchers.detect()
        rank = launch.rank
        world = _connect(options, launch)
    except (RuntimeError, ValueError) as error:
        return fail(error, rank, 1)
    machine = describe_machine(world)

    def keep(rows: list[Row]) -> None:
        if output is not None:  # the same on every rank, as the arguments are
            world.raise_together(_write(rows, options, machine, output) if world.rank == 0 else None)

    try:
        keep([])
    except RuntimeError as error:
        return fail(error, world.rank, 2)
    if form == "table" and world.rank == 0:
        layout = "channels_last" if options.channels_last else "contiguous"
        facts = {**asdict(machine), "input": f"{options.dtype}, {layout}", "repeats": options.repeats}
        print(tabulate(facts.items(), tablefmt="plain", disable_numparse=True), end="\n\n", flush=True)
    try:
        rows = _measure_all(options, world, keep)
    except RuntimeError as error:
        return fail(error, world.rank, 2)
    if world.rank == 0:
        print(report.render(rows, options, machine, form=form), flush=True)
    return 0


def _connect(options: Options, launch: launchers.Launch) -> World:
    """Connects all ranks, and sets up gloo if the baseline needs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an unconnected job is an error here, below
        world = syncbn.init(torch_distributed=True if _has_baseline(options, launch.size) else None, device="cpu")
    if world.size != launch.size:
        raise RuntimeError(
            f"syncbn bench needs all processes connected; {launch.name} started {launch.size} ({launch.evidence}), "
            f"the {world.transport.name} transport connects {world.size}. Run `syncbn doctor` for the reason."
        )
    return world


def _write(rows: list[Row], options: Options, machine: Machine, output: str) -> Exception | None:
    """Writes the JSON document. Returns what went wrong."""
    try:
        Path(output).write_text(f"{report.as_json(rows, options, machine)}\n", encoding="utf-8")
    except OSError as error:
        return RuntimeError(f"--output needs a file that can be written; received {error}. Name another.")
    return None


def _measure_all(options: Options, world: World, keep: Callable[[list[Row]], None]) -> list[Row]:
    rounds = len(options.shapes) * (options.warmup + options.repeats)
    hosts = parts.ranks_of_hosts(world.transport)
    node = len(hosts) > 1 and len(set(hosts)) == 1
    hidden = None if world.rank == 0 else True  # None: shown on a terminal only
    with tqdm(total=rounds, unit="round", disable=hidden, leave=False, file=sys.stderr) as bar:
        rows = []
        for shape in options.shapes:
            rows.append(measure(shape, options, world, bar.update, node=node))
            keep(rows)
        return rows


def fail(error: Exception, rank: int, status: int) -> int:
    """Prints the error on rank 0. Returns the exit status."""
    if rank == 0:
        print(f"syncbn bench: {error}", file=sys.stderr, flush=True)
    return status
