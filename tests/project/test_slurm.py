# SPDX-License-Identifier: BSD-3-Clause
"""launch/slurm.sbatch starts what it says, on a stand-in for srun."""

import json
import os
import sys

import pytest

from tests import processes, warm
from tests.project.launched import KEPT, LAUNCH, LIMIT, MALLOC, STUCK, TOLD, TRAIN

pytestmark = pytest.mark.program


# Stands in for srun: starts --ntasks local processes with the variables of a step, and ends all when one fails.
# With a PMI the real mpirun starts them, which is what lets MPI_Init succeed.
SRUN = """#!{python}
import itertools, json, os, subprocess, sys, time
words = sys.argv[1:]
options = dict(word[2:].split("=") for word in itertools.takewhile(lambda word: word.startswith("--"), words))
command = words[len(options):]
json.dump([options, command, os.environ.get("MASTER_ADDR"), os.environ["OMP_NUM_THREADS"]], open({record!r}, "w"))
n = int(options["ntasks"])
step = dict(os.environ, SLURM_STEP_NUM_TASKS=str(n), SLURM_STEP_NUM_NODES=os.environ["SLURM_JOB_NUM_NODES"])
if options["mpi"] != "none":
    sys.exit(subprocess.call(["mpirun", "-n", str(n), *command], env=step))
ranks = [subprocess.Popen(command, env=dict(step, SLURM_PROCID=str(r), SLURM_LOCALID=str(r))) for r in range(n)]
while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
    time.sleep(0.05)
for rank in ranks:
    if rank.poll() is None:
        rank.kill()
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sbatch as sbatch would, with stand-ins for srun and scontrol first on PATH."""
    record = tmp_path / "srun.json"

    def run(*words, nodes=1, limit=LIMIT, **extra):
        stand_ins = {
            "srun": SRUN.format(python=sys.executable, record=str(record)),
            "scontrol": "#!/bin/sh\nprintf 'localhost\\nother-host\\n'\n",
        }
        for name, text in stand_ins.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:{warm.environment()['PATH']}"
        job = {"SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "localhost,other-host"}
        root = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1}
        done = processes.run(
            "bash",
            LAUNCH / "slurm.sbatch",
            *words,
            limit=limit,
            **{"PATH": path, "SLURM_NTASKS": 2, **job, **root, **extra},
        )
        assert record.exists(), done.stderr
        return done, *json.loads(record.read_text())

    return run


def test_slurm_without_pmi_trains_over_torch_distributed(program, slurm):
    done, options, command, address, threads = slurm(program(TRAIN), "--epochs", "3", PMI="none", SLURM_CPUS_PER_TASK=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 shm 6.5 ['--epochs', '3']" for r in (0, 1)]
    assert options == {"mpi": "none", "ntasks": "2", "cpus-per-task": "2", "kill-on-bad-exit": "1"}
    assert (command[0], address, threads) == ("python", None, "1")


def test_slurm_tells_every_rank_to_keep_freed_memory(program, slurm, monkeypatch):
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    done, *_ = slurm(program(TOLD), PMI="none")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)[1:3] for line in done.stdout.splitlines()] == [KEPT, KEPT]


def test_slurm_on_two_hosts_meets_at_the_first(program, slurm):
    done, _, _, address, _ = slurm(program(TRAIN), nodes=2, PMI="none")
    assert done.returncode == 0, done.stderr
    assert address == "localhost"
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 shm 6.5 []" for r in (0, 1)]


def test_slurm_with_pmi_trains_over_mpi(program, slurm):
    done, options, command, address, _ = slurm(program(TRAIN), NPROC=2, SLURM_NTASKS=7)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 shm 6.5 []" for r in (0, 1)]
    assert (options["mpi"], options["ntasks"], command[1:3], address) == ("pmix", "2", ["-m", "mpi4py"], None)


def test_slurm_ends_with_the_status_of_a_failed_rank(program, slurm):
    done, *_ = slurm(program(STUCK), "raises", PMI="none")
    assert done.returncode != 0
    assert "rank 1 gives up" in done.stderr
