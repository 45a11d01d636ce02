# SPDX-License-Identifier: BSD-3-Clause
"""What takes long and is no fault does not end a job."""

import pytest

from tests import warm

LATE_TO_A_GROUP = """
import time
import torch, syncbn
world = syncbn.init(timeout=2)
if world.rank == 1:
    time.sleep(60)
syncbn.SyncBatchNorm(3, group_size=2)(torch.randn(4, 3))
"""


@pytest.mark.parametrize("launcher", [warm.mpirun, warm.torchrun])
def test_a_rank_that_does_not_come_to_the_first_use_of_a_group_is_named(launcher, tmp_path):
    program = tmp_path / "late.py"
    program.write_text(LATE_TO_A_GROUP)
    done = launcher(2, program, limit=40)
    assert done.returncode != 0
    assert "rank 0 waits in the first use of the group of 2 consecutive ranks" in " ".join(done.stderr.split())
    assert f"Rank 1 is in no call of syncbn, at {program}:6 in <module>" in " ".join(done.stderr.split())


@pytest.mark.parametrize("launcher", [warm.mpirun, warm.torchrun])
def test_a_debugger_a_compilation_a_checkpoint_and_a_barrier_may_take_longer_than_the_limit(launcher):
    done = launcher(2, "-m", "tests.waits.patient_program")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("save", "debug", "compile", "barrier"):
        assert f"{name} survived" in done.stdout
    assert "waits in World.barrier (call 3); it waits without a limit" in done.stderr  # and says so
