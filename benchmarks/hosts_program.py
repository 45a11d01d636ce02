# SPDX-License-Identifier: BSD-3-Clause
"""What ``benchmarks/hosts.py`` starts on every rank: times the ways of summing a wire on networks of several shapes.

hosts_program.py CONTROL DELAY_US:MBIT... WAY...
"""

import json
import os
import sys
import time

import torch

import syncbn
from syncbn import moments
from syncbn.transports.nodes import by_nodes
from syncbn.transports.torch_dist import TorchTransport, group_of_everyone, sum_in_place

LENGTHS = [moments.wire_length(C) for C in (64, 512, 2048)]
SECONDS, MOST, BLOCKS = 0.8, 20, 4
"""Of all repeats of a case, if enough fit; the most repeats of a block; and the blocks, of which the best counts."""


class Gloo:
    """gloo's own all-reduce."""

    def __init__(self, everyone):
        self.group = everyone.group

    def all_reduce(self, wire):
        """Sums a wire in place."""
        sum_in_place(wire, self.group)


def connect(names):
    """The ways by name. Under mpirun the only one is MPI, by the algorithm that the environment asks for."""
    if "mpi" in names:
        return {"mpi": syncbn.init(device="cpu").transport}
    syncbn.init(torch_distributed=True, device="cpu")
    everyone = TorchTransport(group_of_everyone("cpu"))
    makers = {"gloo": Gloo, "direct": lambda everyone: everyone, "nodes": lambda everyone: by_nodes(everyone, "auto")}
    return {name: makers[name](everyone) for name in names}


def seconds_of(way, wire, repeats):
    """The seconds of a sum, over some in a row: of a single one, a rank that comes late sees less than it takes."""
    began = time.perf_counter()
    for _ in range(repeats):
        wire.fill_(1.0)
        way.all_reduce(wire)
    return (time.perf_counter() - began) / repeats


def main():
    """Prints a line of JSON for each case on rank 0."""
    control, words = sys.argv[1], sys.argv[2:]
    shapes = [tuple(map(float, word.split(":"))) for word in words if ":" in word]
    names = [word for word in words if ":" not in word]
    syncbn_world = syncbn.init(device="cpu")
    ways = connect(names)
    for delay, mbit in shapes:
        syncbn_world.barrier()
        if syncbn_world.rank == 0:
            with open(control, "w", encoding="ascii") as pipe:
                pipe.write(f"shape {delay:g} 0 {mbit:g}\n")
        time.sleep(0.3)
        for length in LENGTHS:
            wire = torch.empty(length, dtype=torch.float64)
            for name, way in ways.items():
                first = syncbn_world.average(seconds_of(way, wire, 2))
                repeats = int(max(3, min(MOST, SECONDS / BLOCKS / first)))
                times = [syncbn_world.average(seconds_of(way, wire, repeats)) * 1e3 for _ in range(BLOCKS)]
                right = bool((wire == syncbn_world.size).all())
                if syncbn_world.rank == 0:
                    label = os.environ.get("LABEL", name)
                    row = {"way": label, "delay_ms": delay / 1e3, "mbit": mbit, "doubles": length}
                    print(json.dumps({**row, "ms": min(times), "right": right}), flush=True)
    syncbn_world.barrier()


if __name__ == "__main__":
    main()
