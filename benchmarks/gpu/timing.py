# SPDX-License-Identifier: BSD-3-Clause
"""How `python -m benchmarks.gpu` measures: eager wall time, replays of a CUDA graph, and the profiler's counts.

Everything is first timed and only then profiled: a profiler that has run once slows what is launched after it.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch

from benchmarks.gpu.methods import Step

TURN = 0.005
"""Seconds of a turn, if nothing else is said. The host waits only for its last step."""
PROFILED = 3
GAP_US = 1000.0
"""A pause between the steps under the profiler, whose clocks of host and GPU differ by some microseconds."""
MARK = "syncbn bench: "
WAITS = (
    *("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    *("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize"),
)


@dataclass(frozen=True)
class Counts:
    """What the profiler counted, per step."""

    gpu_us: float
    launches: float
    host_waits: float


def in_turns(steps: dict[str, Step], repeats: int, seconds: float = TURN) -> dict[str, tuple[float, ...]]:
    """Returns the microseconds of a step in each turn.

    Steps run back to back within a turn. Turns are A B C A B C, so turns of one index ran one right after the other,
    and a slow moment of the machine affects them all.
    """
    counts = {name: steps_in_a_turn(step, seconds) for name, step in steps.items()}
    turns: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        for _ in range(repeats):
            for name, step in steps.items():
                turns[name].append(wall(step, counts[name]))
    return {name: tuple(each) for name, each in turns.items()}


def wall(step: Step, count: int) -> float:
    """Returns microseconds per step, from the first launch to the end of the last step on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e3 / count


def steps_in_a_turn(step: Step, seconds: float) -> int:
    wall(step, 3)  # warms the allocator up
    return max(3, min(500, int(seconds * 1e6 / max(wall(step, 3), 1.0))))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@final
class Capturer:
    """Captures steps in CUDA graphs, on a side stream.

    Each step runs there once before its capture, which creates its kernels, tickets and NCCL's communicator.

    If CUDA refuses a capture, a second error follows before torch has restored the caller's stream, and memory and
    random numbers stay in the state of a capture. So the stream is restored here, the next capture gets another stream
    and pool, inputs come from a generator that no graph uses, and a refused step is not tried again.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None
        self.refused: dict[str, str] = {}

    def replays(self, steps: dict[str, Step], repeats: int) -> dict[str, tuple[float, ...]]:
        """Returns the microseconds of a replay in each turn, of each step that can be captured. Frees the graphs."""
        graphs = {name: self._capture(name, step) for name, step in steps.items()}
        graphs = {name: graph for name, graph in graphs.items() if graph is not None}
        try:
            return in_turns({name: graph.replay for name, graph in graphs.items()}, repeats)
        finally:
            torch.cuda.synchronize()
            self._pool = None
            for graph in graphs.values():
                graph.reset()

    def _capture(self, name: str, step: Step) -> Any:
        """Returns the graph, or None if the step cannot be captured."""
        if name in self.refused:
            return None
        here = torch.cuda.current_stream()
        try:
            graph = self.captured_step(step)
        except RuntimeError as error:
            self._stream = self._pool = None
            if not isinstance(error, torch.OutOfMemoryError):
                self.refused[name] = str(error.__context__ or error).partition("\n")[0]
            return None
        finally:
            torch.cuda.set_stream(here)
        return graph

    def captured_step(self, step: Step) -> Any:
        """Captures a step into a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # One pool for all, since one graph runs at a time and no result is kept.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        # thread_local, since NCCL's watchdog thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph


def profiled(steps: dict[str, Step]) -> dict[str, Counts]:
    """Runs each step a few times under torch's profiler.

    Returns:
        GPU time, launches and host waits of each step; empty if the profiler sees no GPU.
    """
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # the next profile could fail during a teardown
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    if activities[1] not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
        return {}
    for step in steps.values():
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # else it warns
        for name, step in steps.items():
            with torch.profiler.record_function(MARK + name):
                for _ in range(PROFILED):
                    step()
            torch.cuda.synchronize()  # outside the mark, since this wait is ours
            time.sleep(GAP_US / 1e6)
    return counted(profiler.events() or (), PROFILED)


def counted(events: Iterable[Any], count: int) -> dict[str, Counts]:
    """Sums the profiler's events between marks.

    Args:
        events: from torch.profiler, with a mark around the runs of each step.
        count: the number of runs of each.
    """
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = sorted(events, key=lambda event: event.time_range.start)
    marks = [e for e in events if e.device_type == cpu and e.name.startswith(MARK)]
    on_gpu = [e for e in events if e.device_type == cuda and not e.is_user_annotation]  # a mark has one there too
    waits = [e for e in events if e.device_type == cpu and e.name in WAITS]
    if not on_gpu:
        return {}
    begins = [mark.time_range.start - GAP_US / 2 for mark in marks] + [float("inf")]
    found = {}
    for i, mark in enumerate(marks):
        mine = _within(on_gpu, begins[i], begins[i + 1])
        gpu_us = sum(event.time_range.elapsed_us() for event in mine)
        stops = len(_within(waits, begins[i], mark.time_range.end))
        found[mark.name.removeprefix(MARK)] = Counts(gpu_us / count, len(mine) / count, stops / count)
    return found


def _within(events: Sequence[Any], begin: float, end: float) -> list[Any]:
    return [event for event in events if begin <= event.time_range.start < end]
