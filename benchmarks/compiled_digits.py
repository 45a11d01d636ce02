# SPDX-License-Identifier: BSD-3-Clause
"""Times a training step of the network of examples/digits.py, eager and under torch.compile, on any processes.

    $ NPROC=2 launch/mpirun.sh benchmarks/compiled_digits.py

Eager runs the host kernels if they were built. Compiled is one graph without a break, of torch operators around the
all-reduce; the compiler fuses sums and normalisation with their neighbours. Each row is forward, backward and SGD on
the local batch, the batch split evenly; medians of steps that take turns, on the slowest process.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

import syncbn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits_model


def make_step(model, x, y):
    """One step of SGD without the averaging of gradients, which is the same for both."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(world, steps, repeats):
    """The median seconds of each step; they take turns, and all processes begin each together."""
    for _ in range(3):
        for step in steps:
            step()
    seconds = [[] for _ in steps]
    for _ in range(repeats):
        for step, taken in zip(steps, seconds, strict=True):
            world.barrier()
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
    mine = torch.tensor([statistics.median(taken) for taken in seconds], dtype=torch.float64)
    table = torch.zeros(world.size, len(steps), dtype=torch.float64)
    table[world.rank] = mine
    return world.transport.all_reduce(table).amax(0).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 512], help="of all processes")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    eager = syncbn.convert_sync_batchnorm(digits_model.build(1, 10, seed=0, dtype=torch.float32))
    rows = []
    for batch in args.batches:
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=args.backend, dynamic=False)
        n = batch // world.size
        x, y = torch.randn(n, 1, 8, 8), torch.randint(10, (n,))
        times = measure(world, [make_step(model, x, y) for model in (copy.deepcopy(eager), compiled)], args.repeats)
        rows.append([batch, *(f"{1e3 * t:.2f}" for t in times), f"{times[1] / times[0]:.2f}"])
    if world.rank == 0:
        print(f"{world.size} processes ({world.transport.name}), torch {torch.__version__}, backend {args.backend}")
        print(tabulate(rows, ["batch", "eager ms", "compiled ms", "compiled / eager"], tablefmt="github"))


if __name__ == "__main__":
    main()
