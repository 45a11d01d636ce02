# SPDX-License-Identifier: BSD-3-Clause
"""What takes long and is no fault does not end a job."""

import pytest

from tests import processes


@pytest.mark.parametrize("launcher", [processes.mpirun, processes.torchrun])
def test_a_debugger_a_compilation_a_checkpoint_and_a_barrier_may_take_longer_than_the_limit(launcher):
    done = launcher(2, "-m", "tests.waits.patient_program")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("save", "debug", "compile", "barrier"):
        assert f"{name} survived" in done.stdout
    assert "waits in World.barrier (call 3); it waits without a limit" in done.stderr  # and says so
