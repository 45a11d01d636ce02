# SPDX-License-Identifier: BSD-3-Clause
"""A program that calls init_process_group itself: torch connects whoever comes, and the ranks compare their jobs."""

import sys

import pytest

from tests.processes import run

pytestmark = pytest.mark.program

PROGRAM = """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import syncbn

def main(rank, file):
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    try:
        syncbn.SyncBatchNorm(3)(torch.ones(2, 3) * rank)
    except RuntimeError as error:
        print(f"rank {rank}: {error}\\n", end="", flush=True)

if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), nprocs=2)
"""


def test_ranks_of_two_steps_that_torch_has_connected_all_raise(tmp_path):
    program = tmp_path / "mixed.py"
    program.write_text(PROGRAM)
    done = run(sys.executable, program, tmp_path / "store", PYTHONPATH=".", limit=90)
    assert done.returncode == 0, done.stderr
    jobs = "step 0 of Slurm job 7 on rank 0 and step 1 of Slurm job 7 on rank 1"
    for rank in range(2):
        assert f"rank {rank}: All ranks of torch.distributed must be of one job; received {jobs}" in done.stdout, done
