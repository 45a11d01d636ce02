# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn test`: connects the job, trains each way, compares, prints on rank 0."""

from __future__ import annotations

import math
import sys
import time
import warnings
from datetime import timedelta
from typing import TextIO

import torch
from tqdm import tqdm

import syncbn
from syncbn import kernels
from syncbn.cli.deadline import time_limit
from syncbn.cli.selftest import training
from syncbn.cli.selftest.comparison import Row, compare, largest
from syncbn.cli.selftest.report import Report
from syncbn.transports import launchers
from syncbn.transports.launchers import Launch
from syncbn.waits import limits
from syncbn.world import rendezvous
from syncbn.world.world import World

SOONER = 0.75
"""The part of the limit after which the library says who is missing: before all is over."""
AVERAGE, DDP = "World.average_gradients", "DistributedDataParallel"


def run(*, as_json: bool, device: str | None = None) -> int:
    """Runs the command.

    Args:
        as_json: one JSON document instead of tables.
        device: as of ``syncbn.init``; None takes the GPU of the local rank, else the CPU.

    Returns:
        0 if this job trains as one process does, else 1; the same on every rank. It ends within ``SYNCBN_TIMEOUT``
        seconds, also if a rank is missing.
    """
    report, began, (seconds, wait) = Report(), time.monotonic(), _limits()
    launch, out = Launch("none", 0, 1, 0, speaks_mpi=False, evidence=""), sys.stdout

    def give_up() -> None:
        report.problem = (
            f"could not {report.step} within the {seconds:g} s of {limits.TIMEOUT}: some processes never came, or are "
            "slow. Run `syncbn doctor`, started in the same way."
        )
        _speak(report, launch, as_json=as_json, out=out)

    try:
        launch = launchers.detect()
        report.launcher, report.processes = launch.name, launch.size
        with time_limit(seconds, launch.rank, give_up):
            world = _connect(launch, device, wait)
            _test(report, world)
    except Exception as error:  # of any kind: it is the result of the test
        report.problem = f"could not {report.step}: {error}"
        _speak_of_own(error, launch)
    report.seconds = round(time.monotonic() - began, 2)
    _speak(report, launch, as_json=as_json, out=out)
    return int(not report.ok)


def _limits() -> tuple[float, float | None]:
    """Returns the seconds of the whole, and those of one wait; None if the variable is wrong: syncbn.init says so."""
    try:
        seconds = limits.of_environment()
    except ValueError:
        return limits.DEFAULT, None
    return seconds, SOONER * seconds


def _connect(launch: Launch, device: str | None, wait: float | None) -> World:
    """Connects all ranks."""
    if launch.size > 1 and not launch.speaks_mpi:  # here, since syncbn.init lets them meet for 5 minutes
        limit = rendezvous.TIMEOUT if wait is None or math.isinf(wait) else timedelta(seconds=wait)
        rendezvous.meet(launch, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an unconnected job is an error here, below
        world = syncbn.init(device=device, timeout=wait)
    if world.size != launch.size:
        raise RuntimeError(
            f"all processes must be connected; {launch.name} started {launch.size} ({launch.evidence}), and the "
            f"{world.transport.name} transport connects {world.size}. Run `syncbn doctor` for the reason."
        )
    return world


def _test(report: Report, world: World) -> None:
    """Trains in one process and in this job, and compares."""
    W, counts = world.size, training.local_batches(world.size)
    ways = [AVERAGE, *([DDP] if _has_ddp(world) else [])]
    on_cpu = world.device.type == "cpu"
    report.transport, report.device, report.torch = world.transport.name, str(world.device), torch.__version__
    report.kernels = (kernels.explain() if on_cpu else kernels.explain_device()).name
    report.local_batches = counts
    if DDP not in ways and W > 1:
        report.not_tried = (
            f"under {report.launcher}, syncbn.init(torch_distributed=True) would connect torch.distributed"
        )
    hidden = None if world.rank == 0 else True  # None: shown on a terminal only
    bar = tqdm(total=training.STEPS * len(ways), unit="step", disable=hidden, leave=False, file=sys.stderr)
    with bar, torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        report.step = "train in one process"
        data = training.batches(sum(counts), world.device)
        one = training.in_one_process(data, world.device)
        if W > 1:
            local = training.unsynchronised(data, world.device, counts)
            report.unsynchronised = largest(local.parameters, one.parameters)
        mine = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
        rows: list[Row] = []
        for way in ways:
            report.step = f"train with {way}"
            trained = training.in_this_job(world, data, ddp=way == DDP, tick=bar.update)
            rows += compare(way, trained, one, mine, world.transport)
        world.check()  # errors of a GPU come late
    report.rows = rows


def _has_ddp(world: World) -> bool:
    """Whether torch.distributed connects the same ranks."""
    dist = torch.distributed
    return world.size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == world.size


def _speak(report: Report, launch: Launch, *, as_json: bool, out: TextIO) -> None:
    if launch.rank == 0:
        print(report.to_json() if as_json else report.to_text(), file=out, flush=True)


def _speak_of_own(error: Exception, launch: Launch) -> None:
    """Prints an error of another rank than 0, unless all ranks have the same: rank 0 prints that one."""
    shared = isinstance(error, syncbn.RankEndedError) or str(error).startswith(("On rank", "All ", "all "))
    if launch.rank and not shared:
        print(f"syncbn test, rank {launch.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
