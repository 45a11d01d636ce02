# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small network, and lets one rank do something else after three good steps.

NPROC=3 launch/mpirun.sh -m tests.waits.fault_program sleep --rank 1 --how ddp

It prints when the fault began, so that a test can measure how soon the job ended.
"""

import argparse
import contextlib
import sys
import threading
import time

import torch
from torch import nn

import syncbn
from tests.waits.fault_kinds import FAULTS

GOOD_STEPS, STEPS = 3, 6


class Net(nn.Module):
    """Four batch norms: a stem, two branches of one width and a third one that is wider."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.left = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.wide = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.order = ["left", "right", "wide"]

    def forward(self, x):
        h = self.stem(x).relu()
        return {name: getattr(self, name)(h).square().mean() for name in self.order}


class Job:
    """What the faults change. ``fault`` is None on the ranks that do none."""

    def __init__(self, how):
        torch.manual_seed(0)
        self.world = syncbn.init(torch_distributed=True if how == "ddp" else None)
        self.how, self.good_steps, self.steps = how, GOOD_STEPS, STEPS
        self.shape, self.dtype = (2, 3, 8, 8), torch.float32
        self.net = syncbn.convert_sync_batchnorm(Net())
        self.model = self.net
        if how == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.net)
        if how == "compiled":
            self.model = torch.compile(self.net, backend="aot_eager")
        self.backward = self.plain_backward
        self.catches = ()

    def plain_backward(self, losses):
        sum(losses.values()).backward()

    def average(self):
        if self.how != "ddp":
            self.world.average_gradients(self.net)

    def step(self):
        self.net.zero_grad()
        x = torch.randn(self.shape, dtype=self.dtype)
        self.backward(self.model(x))
        self.average()
        descend(self.net)

    def run(self, fault):
        for number in range(STEPS):
            if number == GOOD_STEPS:
                say(f"fault at {time.time()}")
                if fault is not None:
                    FAULTS[fault](self)
            if number >= self.steps:
                return
            try:
                self.step()
            except self.catches as error:
                say(f"caught {type(error).__name__}")


def descend(net):
    """A step of SGD. torch.optim imports torch's compiler, which would double the time until a job begins."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)


def say(text):
    sys.stdout.write(f"{text}\n")  # in one piece, since ranks share a pipe
    sys.stdout.flush()


def threads(job):
    """Every rank trains two models of one group from two threads."""
    others = [syncbn.convert_sync_batchnorm(Net()) for _ in range(2)]

    def train(net):
        with contextlib.suppress(ValueError):  # ranks in different calls: every rank gets that
            for _ in range(50):
                sum(net(torch.randn(job.shape)).values()).backward()
        say("thread ended")

    running = [threading.Thread(target=train, args=(net,)) for net in others]
    for thread in running if job.world.rank % 2 else reversed(running):
        thread.start()
    for thread in running:
        thread.join()


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", choices=[*FAULTS, "threads"], nargs="+")
    parser.add_argument("--rank", type=int, nargs="+", default=[1])
    parser.add_argument("--how", choices=["average", "ddp", "compiled"], default="average")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    for name in options.faults:
        try:
            run(name, options)
        except (ValueError, TypeError) as error:  # every rank gets it, so the job can go on
            if name == options.faults[-1]:
                raise
            say(f"raised by {name}: {error}")
    say("done")


def run(name, options):
    job = Job(options.how)
    if name == "threads":
        say(f"fault at {time.time()}")
        threads(job)
    else:
        job.run(name if job.world.rank in options.rank else None)


if __name__ == "__main__":
    main(sys.argv[1:])
