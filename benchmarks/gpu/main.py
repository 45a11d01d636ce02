# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu`: a training step of the layer on one GPU, beside torch's, in one process and run.

N batch, C channels, S product of the spatial dims, W ranks.

First everything is timed, the most important shapes first: all steps of one shape, dtype and layout take turns, eager
and then as CUDA graphs. Then everything is profiled. After a time limit or Ctrl-C there is still a report.
"""

from __future__ import annotations

import gc
import importlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, takewhile
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import syncbn
from benchmarks.gpu import timing
from benchmarks.gpu.methods import Group, Step, methods, process_groups
from benchmarks.gpu.plan import Case, Options, eager_turn, plan, seconds_of_turns
from benchmarks.gpu.report import Report
from benchmarks.gpu.targets import Measured, Row, derive
from benchmarks.gpu.timing import Capturer
from syncbn import kernels

TIMING = 0.75
"""The part of the time limit for timing. The rest is for the profiler."""

SAVE_EVERY = 2.0
"""The least number of seconds between two writes of the output."""


def run(options: Options, *, form: str) -> int:
    """Runs the command.

    Args:
        options: what to measure.
        form: "table" or "json".

    Returns:
        0, even if targets are missed; 1 without a GPU or if it failed; 2 if the output cannot be written; 128 plus the
        number of the signal that ended it.
    """
    if not torch.cuda.is_available():
        problem = f"torch finds none (torch {torch.__version__}, CUDA {torch.version.cuda})"
        return _fail(f"it needs an NVIDIA GPU; {problem}. `syncbn bench` measures on the CPU.", 1)
    cases = plan(options)
    turns_s = seconds_of_turns(cases, options.repeats)
    report = Report(describe_machine(options), len(cases), turns_s)
    try:
        _save(report, options)
    except OSError as error:
        return _fail(f"--output needs a file that can be written; received {error}. Name another.", 2)
    if form == "table":
        print(tabulate(report.machine.items(), tablefmt="plain", disable_numparse=True), end="\n\n")
        print(f"{len(cases)} shapes, dtypes and layouts; their turns alone take {turns_s:.0f} s.\n", flush=True)
    status = 0
    with process_groups() as (groups, problem), _signals() as received:  # the report comes before NCCL's end
        report.left_out += [f"NCCL: {problem}"] if problem else []
        gc.freeze()  # timing collects garbage twice a case, which takes 0.1 s where it looks at every imported module
        try:
            measure(cases, groups, options, report)
        except KeyboardInterrupt:
            status, report.ended = 128 + received[0], f"ended by {signal.Signals(received[0]).name}"
        except Exception as error:  # the GPU may be lost to this process: what was measured before is not
            traceback.print_exc()
            status, report.ended = 1, f"ended by an error: {_first_line(error)}"
        finally:
            gc.unfreeze()
        _save(report, options)
        print(report.as_json() if form == "json" else report.as_tables(), flush=True)
    return status


def measure(cases: list[Case], groups: list[Group], options: Options, report: Report) -> None:
    """Times and then profiles all steps of every case until the time limit, and adds to the report."""
    start = saved = time.monotonic()
    found, derived = dict[Case, list[Measured]](), dict[Case, list[Row]]()
    cache, capturer = _properties().L2_cache_size, Capturer()

    def keep(case: Case, rows: list[Measured]) -> None:
        nonlocal saved
        found[case], derived[case] = rows, derive(rows, cache)
        report.rows = list(chain.from_iterable(derived.values()))
        if time.monotonic() - saved > SAVE_EVERY:
            _save(report, options)
            saved = time.monotonic()

    def in_time(share: float) -> bool:
        if time.monotonic() - start > share * options.time_limit:
            report.ended = "ended by the time limit"
            return False
        return True

    # disable=None: only on a terminal
    with tqdm(total=2 * len(cases), unit="step", disable=None, leave=False, file=sys.stderr) as progress:
        for case in takewhile(lambda _: in_time(TIMING), cases):
            keep(case, _timed(case, groups, capturer, options.repeats, report.left_out))
            report.timed += 1
            progress.update()
        report.left_out += [f"CUDA graph of {name}: {reason}" for name, reason in capturer.refused.items()]
        for case in takewhile(lambda _: in_time(1.0), list(found)):
            rows = _profiled(case, groups, found[case])
            if rows == found[case] != []:
                report.left_out.append("GPU time, launches and host waits: torch's profiler sees no GPU")
                break
            keep(case, rows)
            report.profiled += 1
            progress.update()


def _timed(case: Case, groups: list[Group], capturer: Capturer, repeats: int, left_out: list[str]) -> list[Measured]:
    """Times all steps of one case. Frees the graphs and their memory."""
    try:
        x, grad_y = case.tensors()
        steps = methods(x, grad_y, groups)
        steps = {name: step for name, step in steps.items() if _runs(step, f"{name} at {case}", left_out)}
        eager = timing.in_turns(steps, repeats, eager_turn(case))
        graph = capturer.replays(steps, repeats)
    except torch.OutOfMemoryError as error:
        left_out.append(f"{case}: {_first_line(error)}")
        return []
    finally:
        steps = {}
        torch.cuda.empty_cache()  # also frees the pool of the graphs
    return [
        Measured(case.shape, case.dtype, case.layout, name, x.element_size(), eager[name], graph.get(name, ()))
        for name in eager
    ]


def _profiled(case: Case, groups: list[Group], rows: list[Measured]) -> list[Measured]:
    """Adds the profiler's counts for the steps that were timed."""
    if not rows:
        return []
    steps = methods(*case.tensors(), groups)
    counts = timing.profiled({row.method: steps[row.method] for row in rows})
    return [replace(row, **vars(counts[row.method])) if row.method in counts else row for row in rows]


def _runs(step: Step, what: str, left_out: list[str]) -> bool:
    """Runs a step once, which compiles its kernels. A step that this torch cannot run is left out, with the reason.

    Raises:
        RuntimeError: if the GPU accepts no more work from this process.
    """
    try:
        step()
        torch.cuda.synchronize()
    except Exception as error:
        left_out.append(f"{what}: {_first_line(error)}")
        torch.cuda.synchronize()
        return False
    return True


def describe_machine(options: Options) -> dict[str, str]:
    """Collects what a reader needs to judge the numbers."""
    cudnn, kernel = torch.backends.cudnn, kernels.explain_device().name
    cupy: Any = importlib.import_module("cupy") if kernel == "cupy" else None
    return {
        "gpu": torch.cuda.get_device_name(),
        "L2 cache": f"{_properties().L2_cache_size / 2**20:.0f} MiB",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": f"{cudnn.version()}, benchmark {'on' if cudnn.benchmark else 'off'}",  # type: ignore[no-untyped-call]
        "cupy": getattr(cupy, "__version__", "none"),
        "syncbn": syncbn.__version__,
        "kernels": kernel,
        "repeats": str(options.repeats),
    }


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Turns the first SIGINT or SIGTERM into KeyboardInterrupt; the second ends the process. Yields the signals."""
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(report: Report, options: Options) -> None:
    if options.output is not None:
        report.write(options.output)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _fail(message: str, status: int) -> int:
    print(f"benchmarks.gpu: {message}", file=sys.stderr, flush=True)
    return status
