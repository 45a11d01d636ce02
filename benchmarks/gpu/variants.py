# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu.variants`: the four kernels as they are, beside variants of them, on one GPU.

A variant changes the text of the kernels, or constants of the launch geometry. The four kernels of a step are captured
into one CUDA graph; the replays of all variants at one shape, dtype and layout take turns. Then torch's profiler says
how long each of the four takes. This decides the constants, which have to be the best for no shape alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu import timing
from benchmarks.gpu.methods import COPY, Step
from benchmarks.gpu.plan import DTYPES, LAYOUTS, Case
from benchmarks.gpu.targets import Shape, median_ratio
from syncbn import kernels
from syncbn.cli.arguments import at_least, seconds, shape
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda import geometry, launch
from syncbn.kernels.cuda.launch import CupyLauncher
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.kernels.cuda.prepared import kernel_name
from syncbn.moments import DTYPE_VOTES, Message, Running, Status

STEPS = ("local_moments", "normalize", "backward_sums", "backward_input")
SHAPES: tuple[Shape, ...] = ((2, 256, 14, 14), (2, 64, 112, 112), (32, 256, 56, 56), (2, 256, 512, 512))
MESSAGE = Message((1, 3, 5, 7), 1, "'layer'", 0, 3)
COMPILERS = 8
"""Threads that compile side by side."""


@dataclass(frozen=True)
class Variant:
    """What is changed: words in the kernels' source, constants of ``geometry``, the folder of the source."""

    name: str
    words: tuple[tuple[str, str], ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    threads: int = geometry.THREADS
    folder: Path | None = None

    @property
    def source(self) -> tuple[object, ...]:
        """What variants with the same compiled kernels share."""
        return self.words, self.folder

    def changed(self, text: str) -> str:
        """Returns the text with the words replaced."""
        for old, new in self.words:
            text = text.replace(old, new)
        return text

    def text(self, step: str) -> str:
        """Returns the changed source of a kernel."""
        folder = self.folder or resources.files("syncbn.kernels.cuda")
        with mock.patch.object(resources, "files", return_value=folder):
            return self.changed(launch.source(step))


def _packs(now: int, packs: int, end: str) -> tuple[tuple[str, str], ...]:
    return ((f"in_batches<{now}, From::{end}>", f"in_batches<{packs}, From::{end}>"),)


_STREAMING = tuple((f"st.global.{width}", f"st.global.cs.{width}") for width in ("v4.b32", "v2.b32"))
AS_IS = "as it is"
_RESIDENT = (("ELEMENTWISE_RESIDENT = 3", "ELEMENTWISE_RESIDENT = 4"),)
VARIANTS = (
    Variant(AS_IS),
    Variant("streaming stores", _STREAMING),
    Variant("elementwise, 2 packs", _packs(4, 2, "END")),
    Variant("elementwise, 2 packs, 4 blocks resident", _packs(4, 2, "END") + _RESIDENT),
    Variant("moments, 2 packs", _packs(4, 2, "START")),
    Variant("2 steps", constants={"STEPS": 2}),
    Variant("8 steps", constants={"STEPS": 8}),
    Variant("alone up to 4 steps", constants={"STEPS_ALONE": 4}),
    Variant("alone up to 16 steps", constants={"STEPS_ALONE": 16}),
    Variant("depth 4", constants={"DEPTH": 4}),
    Variant("depth 16", constants={"DEPTH": 16}),
    Variant("depth by half the packs", constants={"DEPTH_OF_STEPS": 2}),
    Variant("half the blocks of sums", constants={"BLOCKS_OF_SUMS_OF_PLANES": 264, "BLOCKS_OF_SUMS_OF_ROWS": 264}),
    Variant("double blocks of sums", constants={"BLOCKS_OF_SUMS_OF_PLANES": 1056, "BLOCKS_OF_SUMS_OF_ROWS": 792}),
    Variant("half the elementwise blocks", constants={"BLOCKS_OF_PLANES": 792, "BLOCKS_OF_ROWS": 396}),
    Variant("double elementwise blocks", constants={"BLOCKS_OF_PLANES": 3168, "BLOCKS_OF_ROWS": 1584}),
    Variant("one round of blocks", constants={"SHORT": ((2, 132), (4, 264), (8, 264))}),
    Variant("sums, 4 columns", constants={"COLUMNS_OF_SUMS": 4}),
    Variant("blocks of 128", threads=128),
)


@dataclass
class Result:
    """One variant at one shape: microseconds of a replay of the step, and of each kernel.

    ``of_as_is`` is the time of the kernels as they are over its own, ``of_copy`` the copy's: 2 is twice as fast.
    """

    shape: Shape
    dtype: str
    layout: str
    variant: str
    step_us: float
    of_as_is: float
    of_copy: float
    kernel_us: dict[str, float] = field(default_factory=dict)


def kernels_of(variant: Variant, launchers: dict[object, CupyLauncher]) -> CupyKernels:
    """Returns the kernels of a variant. Variants of the geometry share the compiled ones."""
    return CupyKernels(launchers.setdefault(variant.source, CupyLauncher()), threads=variant.threads)


@contextmanager
def changed(variant: Variant) -> Iterator[None]:
    """Lets new launches have the geometry of a variant, and new kernels its source."""
    texts = {step: variant.text(step) for step in STEPS}
    before = {name: vars(geometry)[name] for name in variant.constants}
    vars(geometry).update(variant.constants)
    geometry.plan.cache_clear()
    try:
        with mock.patch.object(launch, "source", texts.__getitem__):
            yield
    finally:
        vars(geometry).update(before)
        geometry.plan.cache_clear()


def compile_all(variants: Sequence[Variant], launchers: dict[object, CupyLauncher], cases: Sequence[Case]) -> None:
    """Compiles every kernel that the cases need, several side by side."""
    kinds = sorted({(case.dtype, layout) for case in cases for layout in ("Planes", "Rows")})
    device = torch.cuda.current_device()
    for variant in {v.source: v for v in variants}.values():
        launcher = kernels_of(variant, launchers).launcher
        names = [kernel_name(step, getattr(torch, dtype), layout, False) for step in STEPS for dtype, layout in kinds]

        def one(name: str, launcher: Any = launcher) -> None:
            launcher.compile(name, device)

        with changed(variant), ThreadPoolExecutor(COMPILERS) as pool:
            list(pool.map(one, names))


def step_of(found: CupyKernels, x: Tensor, grad_y: Tensor) -> Step:
    """Returns a step: the four launches, without autograd and without a group."""
    x = x.detach()
    C, dtype = x.size(1), torch.promote_types(x.dtype, torch.float32)
    weight, bias = (torch.ones(C, dtype=dtype, device=x.device) for _ in range(2))
    mean, var, seen = (
        torch.zeros_like(weight),
        torch.ones_like(weight),
        torch.zeros((), dtype=torch.int64, device=x.device),
    )
    running = Running(mean, var, seen, 0.1)
    status = Status(0.0, 1.0, 1.0, *DTYPE_VOTES[x.dtype])

    def step() -> object:
        wire = found.local_moments(x, None, MESSAGE.numbers, status)
        y, stats = found.normalize(x, wire, Parameters(weight, bias, 1e-5, running), MESSAGE)
        sums = found.backward_sums(grad_y, x, stats, MESSAGE.numbers, weight.dtype, weight.dtype)
        return y, found.backward_input(grad_y, x, None, sums[0], weight, stats, MESSAGE)

    return step


def measure(
    case: Case, variants: Sequence[Variant], launchers: dict[object, CupyLauncher], repeats: int
) -> list[Result]:
    """Times all variants at one shape in turns, then profiles each."""
    x, grad_y = case.tensors()
    source = torch.empty(5 * x.numel() * x.element_size() // 2, dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    capturer, graphs = timing.Capturer(), dict[str, Any]()
    expected: list[Tensor] = []
    for variant in variants:
        with changed(variant):
            step = step_of(kernels_of(variant, launchers), x, grad_y)
            results = [each.double() for each in step()]  # type: ignore[attr-defined]
            expected = expected or results
            wrong = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, expected, strict=True))
            if not wrong < 1e-2:
                raise RuntimeError(f"{variant.name} at {case} computes something else: {wrong:g} off")
            graphs[variant.name] = capturer.captured_step(step)
    del results, expected
    replays = {name: graph.replay for name, graph in graphs.items()}
    turns = timing.in_turns({**replays, COPY: lambda: target.copy_(source)}, repeats)
    profiled = timing.profiled({COPY: lambda: target.copy_(source)})
    copy_us = min([statistics.median(turns[COPY]), *(counts.gpu_us for counts in profiled.values())])
    counted = {name: kernel_times(replay) for name, replay in replays.items()}
    for graph in graphs.values():
        graph.reset()
    torch.cuda.empty_cache()
    return [
        Result(
            *(case.shape, case.dtype, case.layout, name, step_us := statistics.median(turns[name])),
            *(median_ratio(turns[AS_IS], turns[name]), copy_us / step_us, counted[name]),
        )
        for name in replays
    ]


def kernel_times(step: Step, count: int = 5) -> dict[str, float]:
    """Returns the mean microseconds of each kernel on the GPU, by torch's profiler."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    found = dict.fromkeys(STEPS, 0.0)
    for event in profiler.events() or ():
        for name in STEPS:
            if event.name.startswith(name) or f" {name}<" in event.name:
                found[name] += event.time_range.elapsed_us() / count
    return found


def table(results: Sequence[Result]) -> str:
    """Renders the results: a row for each shape and variant, and the geometric mean of each variant."""
    headers = ("N,C,spatial", "dtype", "layout", "variant", "step us", "as is / it", "of copy", *STEPS)
    rows = [
        (
            *(",".join(map(str, r.shape)), r.dtype, r.layout, r.variant, f"{r.step_us:.1f}"),
            *(f"{r.of_as_is:.3f}", f"{r.of_copy:.2f}", *(f"{us:.1f}" for us in r.kernel_us.values())),
        )
        for r in results
    ]
    names = dict.fromkeys(r.variant for r in results)
    means = []
    for name in names:
        ratios = [r.of_as_is for r in results if r.variant == name]
        mean = statistics.geometric_mean(ratios)
        means.append((name, *(f"{ratio:.3f}" for ratio in (mean, min(ratios), max(ratios)))))
    summary = tabulate(means, ("variant", "as is / it, mean", "worst", "best"), disable_numparse=True)
    return tabulate(rows, headers, disable_numparse=True) + "\n\n" + summary


def write(results: Sequence[Result], path: str) -> None:
    """Writes the results as JSON, atomically: a reader, also after a kill, gets a complete document."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; 1 without a GPU that gets the kernels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.variants", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="N,C,H,W", default=SHAPES)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=at_least(1), default=7, help="(default: %(default)s)")
    parser.add_argument("--time-limit", type=seconds, default=math.inf, help="seconds after which the rest is left out")
    parser.add_argument("--output", metavar="FILE", help="write the results there as JSON, after every shape")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="also time the .cu files of another version")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or kernels.explain_device().name != "cupy":
        reason = kernels.explain_device().reason if torch.cuda.is_available() else "torch finds none"
        print(f"benchmarks.gpu.variants: it needs an NVIDIA GPU and CuPy; {reason}.", file=sys.stderr)
        return 1
    start = time.monotonic()
    variants = [*VARIANTS, *([Variant("before", folder=args.before)] if args.before else [])]
    cases = [Case(s, d, each) for s in args.shapes for d in args.dtypes for each in LAYOUTS]
    launchers: dict[object, CupyLauncher] = {}
    compile_all(variants, launchers, cases)
    print(f"{torch.cuda.get_device_name()}, compiled in {time.monotonic() - start:.0f} s", flush=True)
    results: list[Result] = []
    for case in tqdm(cases, unit="shape", disable=None, leave=False):
        if time.monotonic() - start > args.time_limit:
            print(f"Ended by the time limit before {case}.")
            break
        results += measure(case, variants, launchers, args.repeats)
        if args.output:
            write(results, args.output)
    print(table(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
