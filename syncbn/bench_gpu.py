# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn bench --device cuda`: a training step of the layer on one GPU, beside torch's, in one process and run.

N batch, C channels, S product of the spatial dims, W ranks.

torch's synchronised layer needs a process group: a fake one of 8 ranks, whose collectives cost nothing, and NCCL with
one rank. Ours stands beside it over the same two. `copy` moves the bytes that a step cannot do without: x and y, then
x, grad_y and grad_x.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn

import syncbn
from syncbn import bench_report, functional, kernels
from syncbn.moments import Running
from syncbn.transports.base import AbstractTransport
from syncbn.transports.single import SingleTransport

Step = Callable[[], object]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAKE_RANKS = 8
SHAPES: tuple[tuple[int, ...], ...] = (
    *bench_report.SHAPES[1:],
    *[(N, C, 512, 512) for N in (1, 2) for C in (64, 128, 256)],
    (32, 256, 56, 56),
    (32, 64, 112, 112),
    (64, 2048),
)


@dataclass(frozen=True)
class Measured:
    """One contender at one shape, in microseconds a step; None where it cannot be."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    contender: str
    eager_us: float
    gpu_us: float
    graph_us: float | None
    launches: float
    host_waits: float


@final
class FakeTransport(AbstractTransport):
    """One rank that calls torch.distributed's fake group, as torch's layer beside it does."""

    name, rank, size, ranks, token, spec = "torch", 0, 1, (0,), 1, None

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See :meth:`AbstractTransport.all_reduce`. The fake group leaves the wire as it is."""
        dist.all_reduce(wire)
        return wire

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See :meth:`AbstractTransport.broadcast`."""
        del root
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See :meth:`AbstractTransport.split`."""
        del color
        return self

    def barrier(self) -> None:
        """See :meth:`AbstractTransport.barrier`."""


def run(*, repeats: int, output: str | None, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> int:
    """Runs the command.

    Args:
        repeats: turns of each contender; the median counts.
        output: where to write the rows as JSON, or None.
        shapes: (N, C, *spatial).

    Returns:
        0; 1 where there is no GPU.
    """
    if not torch.cuda.is_available():
        print(
            "syncbn bench --device cuda needs an NVIDIA GPU; torch finds none "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}). Leave --device out to measure on the CPU.",
            file=sys.stderr,
        )
        return 1
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "syncbn": syncbn.__version__,
        "kernels": kernels.explain_device().name,
    }
    print(tabulate(machine.items(), tablefmt="plain", disable_numparse=True), end="\n\n", flush=True)
    rows: list[Measured] = []
    for backend in ("fake", "nccl"):
        with _group(backend):
            for shape in shapes:
                for dtype in DTYPES:
                    for row in _measure(shape, dtype, backend, repeats):
                        print(*asdict(row).values(), sep="  ", flush=True)
                        rows.append(row)
                    _write(output, machine, rows)
    table = [list(asdict(row).values()) for row in rows]
    print(tabulate(table, list(asdict(rows[0])), floatfmt=".1f"), flush=True)
    return 0


def _write(output: str | None, machine: dict[str, Any], rows: list[Measured]) -> None:
    """Keeps what there is so far: a run that meets a time limit has not been in vain."""
    if output is not None:
        Path(output).write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1))


@contextmanager
def _group(backend: str) -> Iterator[None]:
    """Sets torch.distributed up in this process alone."""
    size: int = FAKE_RANKS if backend == "fake" else 1
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store = FakeStore()
    dist.init_process_group(backend, rank=0, world_size=size, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measure(shape: tuple[int, ...], dtype: torch.dtype, backend: str, repeats: int) -> Iterator[Measured]:
    """Measures all contenders at one shape; they take turns."""
    for layout in ("contiguous", "channels_last")[: 2 if len(shape) == 4 else 1]:
        x = torch.randn(shape, device="cuda").to(dtype)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        grad_y = torch.randn_like(x)
        steps = _contenders(x.requires_grad_(), grad_y, backend)
        steps = {name: step for name, step in steps.items() if _runs(step, name, shape)}
        turns: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats + 1):
            for name, step in steps.items():
                turns[name].append(_wall(step))
        for name, step in steps.items():
            gpu, launches, waits = _profile(step)
            graph = _graph(step)
            eager = statistics.median(turns[name][1:])
            text = str(dtype).removeprefix("torch.")
            yield Measured(shape, text, layout, name, eager, gpu, graph, launches, waits)


def _contenders(x: Tensor, grad_y: Tensor, backend: str) -> dict[str, Step]:
    """Returns a training step of each: forward, backward, gradients of input, weight and bias."""
    C = x.size(1)
    weight, bias = (torch.ones(C, device="cuda", requires_grad=True) for _ in range(2))
    mean, var, tracked = (
        torch.zeros(C, device="cuda"),
        torch.ones(C, device="cuda"),
        torch.zeros((), device="cuda").long(),
    )
    leaves = (x, weight, bias)

    def step(forward: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(forward(), leaves, grad_y)

    def ours(transport: AbstractTransport) -> Step:
        running = Running(mean, var, tracked, 0.1)
        return step(lambda: functional.apply(x, weight, bias, C, running, 1e-5, transport, weight))

    def torchs() -> Tensor:
        group, size = dist.group.WORLD, dist.get_world_size()
        y: Tensor = torch.nn.modules._functions.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, mean, var, 1e-5, 0.1, group, size
        )
        return y

    if backend == "nccl":
        from syncbn.transports.torch_dist import TorchTransport

        transport = TorchTransport(dist.group.WORLD, "cuda")
        return {"syncbn, NCCL of 1": ours(transport), "torch SyncBatchNorm, NCCL of 1": step(torchs)}
    source = torch.empty(5 * x.numel() * x.element_size() // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    layer = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(C, device="cuda")
    return {
        "copy": lambda: target.copy_(source),
        "torch BatchNorm": lambda: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad_y),
        "syncbn, alone": ours(SingleTransport()),
        "syncbn, fake of 8": ours(FakeTransport()),
        "torch SyncBatchNorm, fake of 8": step(torchs),
    }


def _runs(step: Step, name: str, shape: tuple[int, ...]) -> bool:
    """Leaves out a contender that this torch cannot run, and says why: the others are worth having."""
    try:
        step()
    except RuntimeError as error:
        print(f"{name} at {shape} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def _wall(step: Step) -> float:
    """Returns microseconds a step, of as many as take about 10 ms."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = max(3, min(200, int(0.01 / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e6


def _profile(step: Step, count: int = 3) -> tuple[float, float, float]:
    """Returns microseconds on the GPU, launches, and waits of the host, a step, as the profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            step()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    on_gpu = [event for event in on_gpu if not event.is_user_annotation]  # "nccl:all_reduce" is a name around kernels
    calls = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]  # type: ignore[attr-defined]
    waits = sum(name in ("cudaStreamSynchronize", "cudaEventSynchronize") for name in calls)
    return sum(event.device_time for event in on_gpu) / count, len(on_gpu) / count, waits / count


def _graph(step: Step) -> float | None:
    """Returns microseconds of a replay; None where the step cannot be captured, as one that waits cannot."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return _wall(graph.replay)
