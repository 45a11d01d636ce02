# SPDX-License-Identifier: BSD-3-Clause
"""The programs that the tests of launch/ start."""

from tests import processes

LAUNCH = processes.ROOT / "launch"


LIMIT = 60

# One training step: the running mean shows that statistics were synchronised, the output who took part.
TRAIN = """
import sys, torch, syncbn
world = syncbn.init()
layer = syncbn.SyncBatchNorm(1, momentum=1.0)
layer(torch.arange(4.0).view(4, 1) + 10 * world.rank).square().mean().backward()
world.average_gradients(layer)
sys.stdout.write(f"{world.rank} of {world.size} {world.transport.name} {layer.running_mean.item():g} {sys.argv[1:]}\\n")
"""


# Rank 1 does something else while rank 0 waits for it in a forward all-reduce.
STUCK = """
import os, signal, sys, time, torch, syncbn
world = syncbn.init()
layer = syncbn.SyncBatchNorm(1)
layer(torch.randn(4, 1))
if world.rank == 1:
    print("ready", flush=True)
    time.sleep(0.5)
    if sys.argv[1] == "raises":
        raise ValueError("rank 1 gives up")
    if sys.argv[1] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "is deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("deaf", flush=True)
    time.sleep(1000)
layer(torch.randn(4, 1))
"""


# What launchers tell glibc, so that it keeps memory that is freed.
KEPT = ["33554432", "2000000000"]
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# Who this rank is, what glibc is told, and where the ranks of torchrun meet.
TOLD = """
import json, os, sys
rank = next((os.environ[n] for n in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK") if n in os.environ), None)
names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MASTER_ADDR")
sys.stdout.write(json.dumps([rank, *map(os.environ.get, names)]) + "\\n")
"""
