# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.parts`: where the time and the memory of one process go.

N batch, C channels, S product of the spatial dims.

Three tables: each step of the kernels beside a copy of the same bytes; the overhead of a step, at (2,8,2,2), which has
almost nothing to compute; and the peak memory of a training step beside torch's BatchNorm2d.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import syncbn
from benchmarks import memory
from syncbn import kernels, moments
from syncbn.calls.eager import Call
from syncbn.calls.sites import Site
from syncbn.cli.arguments import at_least, shape
from syncbn.cli.bench import cpu, report
from syncbn.cli.bench.report import Machine, Options, Shape
from syncbn.kernels import AbstractKernels
from syncbn.kernels.base import Parameters
from syncbn.layer import SyncBatchNorm
from syncbn.moments import FORWARD, LIMIT, Message, Status, record
from syncbn.transports import launchers
from syncbn.transports.single import SingleTransport

ELEMENTS_MOVED = {"local_moments": 1, "normalize": 2, "backward_sums": 2, "backward_input": 3}
"""Elements that a step reads and writes for each element of x; a copy moves 2."""
TINY: Shape = (2, 8, 2, 2)
MESSAGE = Message((1, 1, 2, 3), 1, "a layer that is timed", 0, 1)


@dataclass(frozen=True)
class StepRow:
    """Microseconds of one step, and of a copy of as many bytes."""

    shape: Shape
    step: str
    us: float
    copy_us: float

    @property
    def ratio(self) -> float:
        """The time of the step over that of the copy."""
        return self.us / self.copy_us


def step_rows(shape: Shape, dtype: torch.dtype, layout: torch.memory_format, repeats: int) -> list[StepRow]:
    """Times the four steps and a copy in turn, for one shape, on this process alone."""
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    copy = torch.empty_like(x)
    calls = {"copy": partial(copy.copy_, x)} | _steps(kernels.choose(x), x, grad_y)
    times = dict(zip(calls, _in_turn(list(calls.values()), repeats), strict=True))
    return [StepRow(shape, step, times[step], times["copy"] * moved / 2) for step, moved in ELEMENTS_MOVED.items()]


def _steps(steps: AbstractKernels, x: Tensor, grad_y: Tensor) -> dict[str, Callable[[], object]]:
    C = x.size(1)
    status = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[x.dtype])
    parameters = Parameters(torch.ones(C), torch.zeros(C))
    numbers = MESSAGE.numbers
    wire = steps.local_moments(x, None, numbers, status)
    stats = steps.normalize(x, wire, parameters, MESSAGE)[1]
    affine = torch.float32, torch.float32
    sums = steps.backward_sums(grad_y, x, stats, numbers)[0]
    return {
        "local_moments": partial(steps.local_moments, x, None, numbers, status),
        "normalize": partial(steps.normalize, x, wire, parameters, MESSAGE),
        "backward_sums": partial(steps.backward_sums, grad_y, x, stats, numbers, *affine),
        "backward_input": partial(steps.backward_input, grad_y, x, None, sums, parameters.weight, stats, MESSAGE),
    }


class _Nothing(torch.autograd.Function):
    """Saves and returns the tensors of a step without computing: the overhead of any autograd function in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        del bias
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        del grad_y
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def overhead_rows(repeats: int) -> dict[str, float]:
    """Times a whole step at (2,8,2,2) and its parts, in microseconds.

    The layer has a group of one process. The rest is the module call, the choice of transport and kernels, and the
    checks.
    """
    layer, torchs = SyncBatchNorm(TINY[1]), nn.BatchNorm2d(TINY[1])
    x, grad_y = torch.randn(TINY).requires_grad_(), torch.randn(TINY)
    steps, transport = kernels.choose(x), SingleTransport()
    weight, bias = layer.weight, layer.bias
    wire = steps.local_moments(x.detach(), None, MESSAGE.numbers, Status())
    sums = torch.zeros(moments.sums_length(TINY[1]), dtype=torch.float64)
    calls: dict[str, Callable[[], object]] = {
        "whole step": lambda: layer(x).backward(grad_y),
        "torch.nn.BatchNorm2d": lambda: torchs(x).backward(grad_y),
        "autograd function that does nothing": lambda: _Nothing.apply(x, weight, bias).backward(grad_y),  # type: ignore[no-untyped-call]
        **_steps(steps, x.detach(), grad_y),
        "read_counters": partial(steps.read_counters, wire, MESSAGE),
        "check_sums": partial(steps.check_sums, sums, MESSAGE),
        "two all-reduces of one process": lambda: (transport.all_reduce(wire), transport.all_reduce(sums)),
        "record of two calls": lambda: (transport.reduce(wire, MESSAGE), transport.reduce(sums, MESSAGE)),
        "messages": messages(layer, transport),
    }
    times = dict(zip(calls, _in_turn(list(calls.values()), 100 * repeats), strict=True))
    times["record of two calls"] -= times["two all-reduces of one process"]  # what the watchdog reads, see waits/
    parts = [us for name, us in times.items() if name not in ("whole step", "torch.nn.BatchNorm2d")]
    return times | {"rest": times["whole step"] - sum(parts)}


def messages(layer: SyncBatchNorm, transport: SingleTransport) -> Callable[[], object]:
    """Returns what makes the messages of a step: numbers and message of the forward, message of the backward."""
    site, settings = Site("SyncBatchNorm"), layer.settings()
    call = object.__new__(Call)

    def of_a_step() -> Message:
        serial = transport.serial
        a, b = site.hash(settings, transport.group_id)
        call.message = record(Message, ((1, serial % LIMIT, a, b), transport.size, site.label, FORWARD, serial))
        return call.sums_message()

    return of_a_step


def _in_turn(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Returns the median microseconds of each call."""
    for call in calls:
        call()
    rounds = [[_timed(call) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def run(options: Options, describe: Callable[[], Machine], *, form: str) -> int:
    """Measures and prints the three tables.

    Args:
        options: shapes, dtype, layout and repeats.
        describe: describes the machine, and makes it keep freed memory, so it is called after the memory was measured.
        form: "table" or "json".

    Returns:
        0.
    """
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    dtype: torch.dtype = getattr(torch, options.dtype)
    rows_of_memory = memory.memory_rows(memory.LARGE, dtype, layout)
    machine = describe()
    shapes = tqdm(options.shapes, unit="shape", disable=None, leave=False, file=sys.stderr)  # None: on a terminal
    steps = [row for shape in shapes for row in step_rows(shape, dtype, layout, options.repeats)]
    overhead = overhead_rows(options.repeats)
    if form == "json":
        rows = [asdict(row) | {"ratio": row.ratio} for row in steps]
        document = {"machine": asdict(machine), "options": asdict(options), "steps": rows, "overhead_us": overhead}
        print(json.dumps(document | {"memory": [asdict(row) for row in rows_of_memory]}, indent=2))
        return 0
    print(tabulate(asdict(machine).items(), tablefmt="plain", disable_numparse=True), end="\n\n")
    print(_table(("N,C,H,W", "step", "us", "copy us", "step / copy"), [_cells(row) for row in steps]))
    print(_table((",".join(map(str, TINY)), "us"), [(name, f"{us:.2f}") for name, us in overhead.items()]))
    rows = [(_name(row.shape), row.layer, f"{row.mib:.1f}", f"{row.tensor_mib:.1f}") for row in rows_of_memory]
    print(_table(("N,C,H,W", "layer", "peak MiB", "one tensor MiB"), rows))
    return 0


def _cells(row: StepRow) -> tuple[str, ...]:
    return _name(row.shape), row.step, f"{row.us:.0f}", f"{row.copy_us:.0f}", f"{row.ratio:.2f}"


def _name(shape: Shape) -> str:
    return ",".join(map(str, shape))


def _table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    text = [header in ("N,C,H,W", "step", "layer") or "," in header for header in headers]
    align = ["left" if words else "right" for words in text]
    return tabulate(rows, headers, disable_numparse=True, colalign=align) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None takes those of this process.

    Returns:
        0; 2 for more than one process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=(__doc__ or "").split("\n\n")[-1])
    defaults = Options()
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="N,C,H,W", default=report.SHAPES)
    parser.add_argument("--dtype", choices=report.DTYPES, default=defaults.dtype, help="(default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="input in channels_last memory format")
    parser.add_argument("--repeats", type=at_least(1), default=defaults.repeats, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    args = parser.parse_args(argv)
    processes = launchers.detect().size
    if processes > 1:
        error = ValueError(f"it needs one process; received {processes}. Start it without a launcher.")
        return cpu.fail(error, launchers.detect().rank, 2)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    world = syncbn.init(device="cpu")
    options = Options(tuple(args.shapes), args.dtype, args.channels_last, args.repeats)
    return run(options, partial(cpu.describe_machine, world), form="json" if args.json else "table")


if __name__ == "__main__":
    sys.exit(main())
