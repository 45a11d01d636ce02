# SPDX-License-Identifier: BSD-3-Clause
"""Times all-reduces and training steps of the CPU over every transport that connects these processes.

    $ NPROC=2 launch/mpirun.sh benchmarks/transports.py
    $ NPROC=2 launch/torchrun.sh benchmarks/transports.py --json

The transports take turns in one run; medians on the slowest process. The rows:

- one all-reduce of so many doubles;
- a step of the network of examples/digits.py in DistributedDataParallel, on a batch of 2 a process;
- forward and backward of the 53 batch norms of a ResNet-50 on 2 images of 224 x 224 a process, without convolutions.
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import syncbn
from syncbn import transports

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits_model

LENGTHS = (129, 513, 4105, 40_000, 400_000)


def connected(world):
    """Every transport that connects all ranks on the CPU, by its name."""
    auto = world.transport
    found = {auto.name: auto}
    if auto.name == "shm":
        found[auto.host.name] = auto.host
    if "torch" not in found:
        from syncbn.transports.torch_dist import TorchTransport, group_of_everyone

        found["torch"] = TorchTransport(group_of_everyone("cpu"), "cpu")
    return found


def resnet50_shapes():
    """(C, H) of every batch norm, H = W."""
    shapes = [(64, 112)]
    for blocks, width, size in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for block in range(blocks):
            first = 2 * size if block == 0 and width > 64 else size
            shapes += [(width, first), (width, size), (4 * width, size)]
        shapes.append((4 * width, size))
    return shapes


def resnet50_layers():
    """Forward and backward of 53 layers, one after the other."""
    torch.manual_seed(1)
    layers = [syncbn.SyncBatchNorm(C) for C, _ in resnet50_shapes()]
    xs = [torch.randn(2, C, H, H, requires_grad=True) for C, H in resnet50_shapes()]
    grads = [torch.randn_like(x) for x in xs]

    def step():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        for y, grad in zip(reversed(ys), reversed(grads), strict=True):
            y.backward(grad)

    return step


def digits_step():
    """One step of SGD of the network of the demo, in DDP."""
    model = digits_model.build(1, 10, seed=0, dtype=torch.float32)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(model)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(2, 1, 8, 8), torch.randint(10, (2,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(world, found, action, times, rounds):
    """Median microseconds of an action over each transport, on the slowest process: {name: us}."""
    taken = {name: [] for name in found}
    actions = {}
    for repeat in range(rounds + 1):
        for name, transport in found.items():
            transports.choose = lambda *_, chosen=transport: chosen
            if name not in actions:
                actions[name] = action(transport)
            world.transport.barrier()
            began = time.perf_counter()
            for _ in range(times):
                actions[name]()
            if repeat > 0:  # the first one is for caches
                taken[name].append((time.perf_counter() - began) / times * 1e6)
    table = torch.zeros(world.size, len(found), dtype=torch.float64)
    table[world.rank] = torch.tensor([statistics.median(each) for each in taken.values()])
    return dict(zip(found, world.transport.all_reduce(table).amax(0).tolist(), strict=True))


def reduce(transport, length):
    return functools.partial(transport.all_reduce, torch.zeros(length, dtype=torch.float64))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = syncbn.init(device="cpu", torch_distributed=True)
    world = syncbn.init(device="cpu") if world.transport.name == "torch" else world
    found = connected(world)
    cases = {
        f"{length} doubles": (functools.partial(reduce, length=length), 200 if length < 10_000 else 10)
        for length in LENGTHS
    }
    cases["digits in DDP, a step"] = (lambda _: digits_step(), 20)
    cases["53 layers of a ResNet-50"] = (lambda _: resnet50_layers(), 1)
    rows = {}
    for name in tqdm(cases, disable=world.rank > 0 or not sys.stderr.isatty()):
        action, times = cases[name]
        rows[name] = measure(world, found, action, times, args.rounds)
    if world.rank > 0:
        return
    if args.json:
        print(json.dumps({"processes": world.size, "launcher": world.launcher, "us": rows}, indent=2))
        return
    print(f"{world.size} processes under {world.launcher}, torch {torch.__version__}; us")
    first, *others = found
    head = ["", *found, *(f"{other} / {first}" for other in others)]
    table = [[name, *us.values(), *(us[other] / us[first] for other in others)] for name, us in rows.items()]
    print(tabulate(table, head, tablefmt="github", floatfmt=["", *[".1f"] * len(found), *[".2f"] * len(others)]))


if __name__ == "__main__":
    main()
