# SPDX-License-Identifier: BSD-3-Clause
"""Trains a network whose batch norms see uneven shares, and compares every bit with one process.

    train_program.py                ten steps; then each rank says whether all bits are those of one process
    train_program.py --endless 5    steps until something ends the job; each rank says where it is, and when it trains.
                                    From then on waits have this limit: to start may take longer

S pixels, W ranks.
"""

import argparse
import itertools
import os
import socket
import sys
import time

import torch
from torch import nn

import syncbn
from syncbn.transports import gather

STEPS, BATCH = 10, 13


def network(**group):
    """Two layers, and between them what works on each sample alone: so one process computes the same bits."""
    return nn.Sequential(syncbn.SyncBatchNorm(5, **group), nn.ReLU(), syncbn.SyncBatchNorm(5, momentum=None, **group))


def shares(size):
    """Samples of each rank: 1, 2, 1, 2, ... and the last one has the rest; of three ranks and more one has none."""
    counts = [1 + rank % 2 for rank in range(size - 1)]
    if size > 2:
        counts[1] = 0
    return [*counts, BATCH - sum(counts)]


def step(net, x, grad_y):
    x = x.clone().requires_grad_()
    y = net(x)
    y.backward(grad_y)
    return y.detach(), x.grad


def same_bits(world):
    """Trains in the group of all ranks, and in that of each host if it has some."""
    hosts = gather.gather_notes(socket.gethostname(), world.transport)
    mine = [rank for rank, host in enumerate(hosts) if host == socket.gethostname()]
    different = differences(world.rank, shares(world.size), range(world.size))
    if len(mine) > 1:
        different += differences(world.rank, shares(world.size), mine, group_size="node")
    say(f"rank {world.rank} on {socket.gethostname()} by {world.transport.name}: {different} differences")


def differences(rank, counts, members, **group):
    """The tensors that differ from those of one process that has the samples of all members of a group."""
    ends = list(itertools.accumulate(counts, initial=0))
    mine, theirs = slice(ends[rank], ends[rank + 1]), slice(ends[members[0]], ends[members[-1] + 1])
    own = slice(mine.start - theirs.start, mine.stop - theirs.start)
    ours, one, different = network(**group), network(group_size=1), 0
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        x = torch.randn(BATCH, 5, 7, 4, generator=generator) + number
        grad_y = torch.randn(BATCH, 5, 7, 4, generator=generator)
        got, whole = step(ours, x[mine], grad_y[mine]), step(one, x[theirs], grad_y[theirs])
        different += sum(not torch.equal(a, b[own]) for a, b in zip(got, whole, strict=True))
        different += sum(not torch.equal(a, b) for a, b in zip(ours.buffers(), one.buffers(), strict=True))
    return different


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def endless(world, limit):
    net = network()
    say(f"rank {world.rank} on {socket.gethostname()} is process {os.getpid()}")
    number = 0
    while True:
        step(net, torch.randn(3, 5, 7, 4), torch.randn(3, 5, 7, 4))
        number += 1
        if number == 5:
            syncbn.init(timeout=limit)
            say(f"ready: rank {world.rank}")
        time.sleep(0.01)


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--endless", type=float)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    world = syncbn.init(timeout=300 if options.endless else None)
    endless(world, options.endless) if options.endless else same_bits(world)


if __name__ == "__main__":
    main(sys.argv[1:])
