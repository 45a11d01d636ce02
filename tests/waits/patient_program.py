# SPDX-License-Identifier: BSD-3-Clause
"""Rank 1 keeps the others waiting beyond the limit, each time for a reason that is no fault."""

import io
import os
import sys
import threading
import time

import torch

import syncbn

SECONDS = 4.0
LIMIT = 2.0


class SlowFile(io.BytesIO):
    """A file on a slow disk."""

    def write(self, data):
        if self.tell() == 0:
            time.sleep(SECONDS)
        return super().write(data)


def save():
    torch.save({"weight": torch.ones(3)}, SlowFile())


def debug():
    end, begin = os.pipe()
    sys.stdin = os.fdopen(end)
    threading.Timer(SECONDS, os.write, (begin, b"continue\n")).start()
    breakpoint()


def compile_something():
    torch.compile(lambda x: (x.sin() + x.cos()).sum(), backend=slow_backend)(torch.ones(5))


def slow_backend(graph, inputs):
    time.sleep(SECONDS)
    return graph.forward


def wait_in_barrier():
    time.sleep(SECONDS)
    world.barrier()


world = syncbn.init(timeout=LIMIT)
layer = syncbn.SyncBatchNorm(3)
reasons = {"save": save, "debug": debug, "compile": compile_something, "barrier": wait_in_barrier}
for name, keep_waiting in reasons.items():
    if world.rank == 1:
        keep_waiting()
    elif name == "barrier":
        world.barrier()
    layer(torch.randn(4, 3))
    if world.rank == 0:
        sys.stdout.write(f"{name} survived\n")
