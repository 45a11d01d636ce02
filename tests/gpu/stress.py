# SPDX-License-Identifier: BSD-3-Clause
"""Random cases against the definition in float64, until the first wrong result or the end of the time. A program.

python -m tests.gpu.stress --seconds 20                                     on the GPU; --seed goes on from elsewhere
python -m tests.gpu.stress --only 4711                                      one case again, by the seed that it printed
compute-sanitizer --error-exitcode 9 python -m tests.gpu.stress --cases 12 --small
SYNCBN_TEST_DEVICE=fake-cuda python -m tests.gpu.stress --cases 12 --small  without a GPU

A case is a dtype, a layout, a shape, the place of x and grad_y in memory, and a stream; it runs in both arithmetics of
the sums. The first 12 reach every instance of every kernel, all three widths of access, and one and several blocks a
group.
"""

import argparse
import math
import os
import random
import sys
import time
from typing import NamedTuple

import torch

from syncbn import kernels, moments
from syncbn.kernels import dispatch
from syncbn.kernels.base import Parameters, split_stats
from syncbn.kernels.cuda import geometry
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import DTYPES, Message, Running, Status
from tests import fake_cuda
from tests.kernels.contract import ArithmeticLauncher, bound, exact, moved
from tests.multiprocess.batches import LAYOUTS
from tests.tolerances import error

EPS = 1e-5
VIEWS = ("dense", "dense", "moved", "permuted", "sliced", "expanded")
INSTANCES = [(dtype, layout) for layout in ("contiguous", "channels_last") for dtype in DTYPES]


class Case(NamedTuple):
    """What the seed of a case has chosen."""

    seed: int
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    view_x: str
    view_grad_y: str
    offset: int
    """Of a moved tensor, in bytes."""
    stream: int

    def __str__(self):
        layout = f"{self.layout}, x {self.view_x}, grad_y {self.view_grad_y}, {self.offset} bytes off"
        return f"seed {self.seed}: {self.dtype} {self.shape} {layout}, stream {self.stream}"


def choose(seed, small):
    """Returns the case of a seed. Instance, width of access and number of blocks go round, the rest is random."""
    rng = random.Random(seed)
    dtype, layout = INSTANCES[seed % len(INSTANCES)]
    rounds = seed // len(INSTANCES)
    V = 16 // dtype.itemsize
    multiple = (V, max(1, V // 2), 1)[(rounds + seed) % 3]  # a plane or a row is one of as many values
    if (rounds + seed) % 2:  # several blocks a group
        N, C, H, W = rng.randint(40, 60), rng.randint(1, 8), rng.randint(16, 24), rng.randint(16, 24)
    else:
        tops = [(4, 600, 64), (64, 64, 60), (600, 8, 20), (3, 3, 500), (2, 2100, 8)]
        top_n, top_c, top_s = (12, 40, 12) if small else rng.choice(tops)
        N, C, H, W = (rng.randint(1, top) for top in (top_n, top_c, top_s, top_s))
    if layout == "channels_last":
        C = multiple * (math.ceil(C / multiple) | 1)  # an odd number of them, so that no wider access is possible
        spatial = (H, W)
    else:
        H, W = H | 1, multiple * (math.ceil(W / multiple) | 1)
        plain = not rounds or (rounds + seed) % 2
        spatial = (H, W) if plain else rng.choice([(H, W), (H, W), (W,), (H, 1, W), ()])
    N = N + 1 if N * math.prod(spatial) < 2 else N
    view_x, view_grad_y = (rng.choice(VIEWS) if rounds else "dense" for _ in range(2))
    offset = rng.choice([b for b in (2, 4, 8) if b % dtype.itemsize == 0])
    return Case(seed, dtype, layout, (N, C, *spatial), view_x, view_grad_y, offset, rng.randrange(3))


def lay_out(tensor, view, case):
    """Gives a tensor its place in memory."""
    if case.layout == "channels_last":
        tensor = LAYOUTS["channels_last"](tensor)
    if view == "moved":
        return moved(tensor, case.offset)
    if view == "expanded":
        return tensor[:, :, :1].expand(tensor.shape) if tensor.dim() > 2 else tensor
    return tensor if view == "dense" else LAYOUTS[view](tensor)


def check(case, k):
    """Runs the four steps twice and returns what is wrong, or an empty string."""
    rng = torch.Generator("cuda").manual_seed(case.seed)
    shape, dtype, C = case.shape, case.dtype, case.shape[1]
    x, grad_y = (torch.randn(shape, generator=rng, device="cuda") for _ in range(2))
    x = lay_out((x + 0.5).to(dtype), case.view_x, case)
    grad_y = lay_out(grad_y.to(dtype), case.view_grad_y, case)
    weight, bias = (torch.rand(C, generator=rng, device="cuda") + 0.5 for _ in range(2))
    message = Message((1, case.seed % moments.LIMIT, 5, 7), 1, "'stress'", 0, case.seed)
    status = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[dtype])
    copies = x.clone(), grad_y.clone()

    def steps():
        running = Running(torch.zeros(C).cuda(), torch.ones(C).cuda(), torch.tensor(0).cuda(), 0.1)
        wire = k.local_moments(x, None, message.numbers, status)
        y, stats = k.normalize(x, wire, Parameters(weight, bias, EPS, running), message)
        sums, *grads = k.backward_sums(grad_y, x, stats, message.numbers, torch.float32, torch.float32)
        grad_x = k.backward_input(grad_y, x, None, sums, weight, stats, message)
        return wire, y, stats, sums, *grads, grad_x, *running[:3]

    results, again = steps(), steps()
    if not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        return "two runs differ in bits"
    if not (torch.equal(x, copies[0]) and torch.equal(grad_y, copies[1])):
        return "an input has changed"
    _, y, stats, _, grad_weight, grad_bias, grad_x, running_mean, _, _ = results
    mean, invstd, count = split_stats(stats)
    x64, g64 = (t.double().transpose(0, 1).reshape(C, -1) for t in (x, grad_y))
    var = x64.var(1, correction=0)
    exact_y, exact_grad_x = exact(x, grad_y, weight, bias)
    exact_grad_weight = (g64 * (x64 - x64.mean(1, keepdim=True))).sum(1) * (var + EPS).rsqrt()
    # Few values may lie close together. What a rounding of their mean, or of their squares, does is then larger.
    loss = max(1.0, (x64.square().mean(1) / (var + EPS)).max().item())
    lost = loss if dtype == torch.float64 else loss**0.5
    sums = 1e-6 * max(1.0, g64.abs().sum(1).max().item())
    wrong = {
        "count": abs(count.item() - x64.size(1)),
        "mean": error(mean, x64.mean(1)) / 1e-13,
        "invstd": ((invstd / (var + EPS).rsqrt() - 1).abs().max().item()) / (1e-13 * loss),
        "y": error(y, exact_y) / (bound(dtype, exact_y.abs().max().item()) * lost),
        "grad_x": error(grad_x, exact_grad_x) / (scale_of_grad(grad_y, invstd, weight, dtype) * lost),
        "grad_weight": error(grad_weight, exact_grad_weight) / (sums * loss**0.5),
        "grad_bias": error(grad_bias, g64.sum(1)) / sums,
        "running_mean": error(running_mean, 0.1 * x64.mean(1)) / 1e-6,
    }
    return ", ".join(f"{name} {value:.3g} of what is allowed" for name, value in wrong.items() if not value <= 1)


def scale_of_grad(grad_y, invstd, weight, dtype):
    """The bound for grad_x, whose terms may cancel: of the largest term."""
    return bound(dtype, grad_y.double().abs().max().item() * (invstd * weight.double()).max().item())


def run(case, stream):
    """Runs a case in both arithmetics and returns what is wrong, or an empty string."""
    launcher = dispatch.launcher()
    try:
        for slow in (False, True):
            with torch.cuda.stream(stream):
                wrong = check(case, CupyKernels(ArithmeticLauncher(launcher, slow=slow)))
            torch.cuda.synchronize()
            launcher.deferred_errors(torch.empty(0, device="cuda")).look()
            if wrong:
                return f"{wrong}, sums in {'expansions' if slow else 'float64'}"
    except Exception as problem:  # also one that CUDA reports late
        return f"{type(problem).__name__}: {problem}"
    return ""


def coverage(case):
    """Names what of the kernels a case reaches."""
    x = torch.empty(case.shape, dtype=case.dtype, device="meta")
    x = LAYOUTS["channels_last"](x) if case.layout == "channels_last" else x
    plan = geometry.plan(x.shape, x.stride(), x.element_size())
    width = next((w for w in (16, 8) if plan.unit % w == 0), 1)
    return {f"{plan.layout}, width {width}", f"{plan.layout}, {'one block' if plan.blocks == 1 else 'several blocks'}"}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.0, help="for how long; 0 for no limit")
    parser.add_argument("--cases", type=int, default=0, help="how many; 0 for no limit")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--only", type=int, help="the seed of a single case")
    parser.add_argument("--small", action="store_true", help="small shapes, as for a sanitizer")
    options = parser.parse_args(words)
    if os.environ.get("SYNCBN_TEST_DEVICE") == fake_cuda.NAME:
        fake_cuda.install()
    if kernels.explain_device().name != "cupy" or not torch.cuda.is_available():
        sys.stderr.write(f"This needs a GPU and its kernels; here: {kernels.explain_device().reason}\n")
        return 2
    first, count = (options.seed, options.cases) if options.only is None else (options.only, 1)
    if not count and not options.seconds:
        count = 12
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    began, seed, reached = time.monotonic(), first, set()
    while (not count or seed < first + count) and (not options.seconds or time.monotonic() - began < options.seconds):
        case = choose(seed, options.small)
        wrong = run(case, streams[case.stream])
        if wrong:
            sys.stdout.write(f"WRONG {case}: {wrong}\n")
            return 1
        reached |= coverage(case)
        seed += 1
    took = time.monotonic() - began
    sys.stdout.write(f"{seed - first} cases right, seeds {first} to {seed - 1}, in {took:.1f} s; reached:\n")
    sys.stdout.write("".join(f"    {each}\n" for each in sorted(reached)))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
