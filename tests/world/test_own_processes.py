# SPDX-License-Identifier: BSD-3-Clause
"""Processes that a program starts itself, and processes that torchrun starts again."""

import sys

import pytest

from tests import warm
from tests.processes import run

pytestmark = pytest.mark.program

SPAWN = """
import datetime, os, sys, time
import torch, torch.distributed as dist, torch.multiprocessing as mp
import syncbn
from syncbn.transports import torch_dist

def main(rank, W, file):
    limit = datetime.timedelta(seconds=4)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=W, timeout=limit)
    world = syncbn.init()
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.ones(2, 3) * rank)
    groups = world.transport.group, world.transport.split(0).group
    limits = [torch_dist.limit_of(group, "cpu") for group in groups]
    place = f"rank {world.rank} of {world.size}, local {world.local_rank}"
    print(f"{place}, {limits == [limit, limit]}\\n", end="", flush=True)
    if rank == W - 1:  # stays away, but does not end: the sockets stay open
        time.sleep(18)
        return
    began = time.monotonic()
    try:
        layer(torch.ones(2, 3))
    except ValueError as error:
        print(f"rank {rank} waited {time.monotonic() - began < 20}: {error}\\n", end="", flush=True)

if __name__ == "__main__":
    mp.spawn(main, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]))
"""


def test_spawned_processes_count_themselves_and_keep_the_users_limit(tmp_path):
    """init_process_group(rank=...) leaves no variable that says which process of this host each one is."""
    program = tmp_path / "spawn.py"
    program.write_text(SPAWN)
    done = run(sys.executable, program, 2, tmp_path / "store", PYTHONPATH=".", SYNCBN_TRANSPORT="torch", limit=90)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2, local {rank}, True" in done.stdout, done.stdout + done.stderr
    assert "rank 0 waited True: All ranks must be in one call" in done.stdout, done.stdout + done.stderr
    assert "it sent no word on rank 1" in done.stdout


RESTART = """
import os, sys
import torch, syncbn

world = syncbn.init()
layer = syncbn.SyncBatchNorm(3, momentum=1.0)
layer(torch.full((2, 3), float(world.rank)))
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"round {attempt} rank {world.rank} mean {layer.running_mean[0]:g}\\n", end="", flush=True)
world.barrier()
sys.exit(3 if attempt == 0 and world.rank == 1 else 0)
"""


def test_a_job_that_torchrun_starts_again_connects_again(tmp_path):
    """The agent keeps its store: without a prefix of the round, the second round would read the first's addresses."""
    program = tmp_path / "restart.py"
    program.write_text(RESTART)
    words = ("torchrun", "--nproc-per-node", 3, "--max-restarts", 1, "--monitor-interval", 0.2)
    done = warm.run(*words, program, limit=90)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert f"round 1 rank {rank} mean 1" in done.stdout, done.stdout + done.stderr
