# SPDX-License-Identifier: BSD-3-Clause
"""The files of launch/: they start what they say, and nothing that they started outlives Ctrl-C.

That a rank which fails ends all ranks at once is in waits/test_launched_faults.py.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import yaml

from tests import processes, warm
from tests.project.launched import KEPT, LAUNCH, LIMIT, MALLOC, STUCK, TOLD, TRAIN

pytestmark = pytest.mark.program
SHELL_FILES = ("mpirun.sh", "torchrun.sh", "slurm.sbatch")
LAUNCHERS = ("mpirun.sh", "torchrun.sh")
SECONDS_TO_END = 15  # it takes one or two on an idle machine; unended, the other ranks would wait for ever


# torch.distributed is connected, used and ended, three times.
AGAIN = """
import sys, torch, syncbn
for i in range(3):
    world = syncbn.init()
    layer = syncbn.SyncBatchNorm(1, momentum=1.0)
    layer(torch.arange(4.0).view(4, 1) + 10 * world.rank)
    sys.stdout.write(f"{i} {world.transport.name} {layer.running_mean.item():g}\\n")
    world.barrier()
    torch.distributed.destroy_process_group()
"""


LISTENERS = """
import json, sys, psutil, torch, syncbn
from syncbn.transports import launchers
if launchers.detect().speaks_mpi:
    from mpi4py import MPI  # MPI opens listeners of its own: those are there before
def listeners():
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
before = listeners()
world = syncbn.init(torch_distributed=True)
torch.distributed.all_reduce(torch.ones(1))
sys.stdout.write(json.dumps([world.rank, sorted(listeners() - before)]) + "\\n")
sys.stdout.flush()
world.barrier()
"""


def start_stuck(launcher, path, what):
    """Starts two ranks, waits until rank 0 waits for rank 1, and returns the launcher and all it has started."""
    process = processes.start(LAUNCH / launcher, path, what, NPROC=2, PYTHON=sys.executable)
    guard = threading.Timer(LIMIT, processes.kill, [process])
    guard.start()
    for line in process.stdout:
        if line.strip() == ("deaf" if what == "is deaf" else "ready"):
            break
    family = processes.descendants(process)
    assert len(family) >= 2, process.communicate()
    return process, family, guard


def seconds_until_all_ended(process, family, guard, limit):
    """Waits for the launcher and its processes; fails, and ends them, where one is left after the limit."""
    started = time.monotonic()
    try:
        _, err = process.communicate(timeout=limit)
        alive = processes.survivors(family)
        assert not alive, f"{alive} outlived the launcher\n{err}"
    finally:
        guard.cancel()
        for each in [*family, *processes.descendants(process), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    return time.monotonic() - started, err


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_are_strict_short_and_clean(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert len(lines) <= 40
    assert "set -euo pipefail" in lines
    assert any(line.startswith("NPROC=${NPROC:-") for line in lines)
    assert os.access(LAUNCH / name, os.X_OK)
    done = processes.run("shellcheck", LAUNCH / name)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("start", "transport"), [(processes.mpirun, "shm"), (processes.torchrun, "shm")])
def test_a_launcher_starts_nproc_ranks_that_train_together(program, start, transport):
    done = start(3, program(TRAIN), "two words", "--flag", limit=LIMIT)
    assert done.returncode == 0, done.stderr
    expected = [f"{rank} of 3 {transport} 11.5 ['two words', '--flag']" for rank in range(3)]
    assert sorted(done.stdout.split("\n"))[1:] == expected


def told(launcher, path, **options):
    """What each rank is told, by a launcher that gets no number of ranks: the memory settings, and the address."""
    done = warm.run(LAUNCH / launcher, path, limit=LIMIT, **options)
    assert done.returncode == 0, done.stderr
    ranks = sorted(map(json.loads, done.stdout.splitlines()))
    assert [rank for rank, *_ in ranks] == ["0", "1"]
    return [(memory, address) for _, *memory, address in ranks]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_two_ranks_unless_told_and_tells_them_to_keep_freed_memory(program, launcher, monkeypatch):
    """torchrun does not look up the name of the host: without an address, that takes 90 seconds and fails."""
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    address = "127.0.0.1" if launcher == "torchrun.sh" else None
    assert told(launcher, program(TOLD)) == [(KEPT, address)] * 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_leaves_the_memory_settings_of_the_user(program, launcher):
    settings = dict(zip(MALLOC, ("131072", "262144"), strict=True))
    assert [memory for memory, _ in told(launcher, program(TOLD), **settings)] == [["131072", "262144"]] * 2


def test_torch_distributed_may_be_ended_and_connected_again_under_torchrun(program):
    """The agent keeps one store for all: without a name of its own each time, gloo finds the old addresses there."""
    done = warm.torchrun(3, program(AGAIN), limit=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} shm 11.5" for i in range(3) for _ in range(3))


def test_mpirun_takes_options_with_its_command(program, tmp_path):
    where = tmp_path / "elsewhere"
    where.mkdir()
    text = "import os\nprint(os.path.basename(os.getcwd()))"
    done = warm.mpirun(2, program(text), limit=LIMIT, MPIRUN=f"mpirun -wdir {where}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["elsewhere", "elsewhere"]


def test_without_the_runner_of_mpi4py_the_watchdog_ends_the_other_ranks(program):
    process = processes.start(
        *("mpirun", "-n", 2, sys.executable, program(STUCK), "raises"),
        **{"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1},
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
    )
    try:
        _, err = process.communicate(timeout=60)
    finally:
        processes.kill(process)
    assert process.returncode != 0
    assert "RankEndedError: Rank 1 ended with ValueError: rank 1 gives up, while rank 0 waits" in " ".join(err.split())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_leaves_no_process_behind(program, launcher):
    stuck = start_stuck(launcher, program(STUCK), "sleeps")
    os.killpg(stuck[0].pid, signal.SIGINT)  # as a terminal does: to the launcher's process group
    seconds, _ = seconds_until_all_ended(*stuck, limit=SECONDS_TO_END + 20)
    assert stuck[0].returncode != 0
    assert seconds < SECONDS_TO_END


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_ends_a_rank_that_does_not_listen(program, launcher):
    stuck = start_stuck(launcher, program(STUCK), "is deaf")
    os.killpg(stuck[0].pid, signal.SIGINT)
    if launcher == "mpirun.sh":  # MPICH asks at the first and kills at the second; Open MPI kills at the first
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stuck[0].pid, signal.SIGINT)
    seconds, _ = seconds_until_all_ended(*stuck, limit=SECONDS_TO_END + 30)
    assert seconds < SECONDS_TO_END  # torchrun left to itself takes 30 seconds


@pytest.mark.parametrize(("start", "least"), [(warm.mpirun, 3), (warm.torchrun, 2)])
def test_torch_distributed_listens_on_loopback_alone(program, start, least):
    done = start(2, program(LISTENERS), limit=LIMIT)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    opened = [address for _, listeners in ranks for address, _ in listeners]
    assert len(ranks) == 2
    assert len(opened) >= least  # each rank's gloo; under mpirun also the store of rank 0
    assert set(opened) == {"127.0.0.1"}


def test_mpijob_starts_what_mpirun_sh_starts():
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas = job["spec"]["mpiReplicaSpecs"]
    launcher, worker = (replicas[role]["template"]["spec"]["containers"][0] for role in ("Launcher", "Worker"))
    words = [*launcher["command"], *launcher["args"]]
    environment = {item["name"]: item["value"] for item in launcher["env"]}
    script = (LAUNCH / "mpirun.sh").read_text()

    assert replicas["Launcher"]["replicas"] == 1
    assert words[0] == "mpirun"
    assert int(words[words.index("-n") + 1]) == job["spec"]["slotsPerWorker"] * replicas["Worker"]["replicas"]
    assert int(worker["resources"]["limits"]["cpu"]) == job["spec"]["slotsPerWorker"]
    assert words[-4:] == ["python", "-m", "mpi4py", "train.py"]
    assert '"$PYTHON" -m mpi4py "$@"' in script
    assert [words[i + 1] for i, word in enumerate(words) if word == "-x"] == ["OMP_NUM_THREADS", *MALLOC]
    for name in MALLOC:
        assert f"export {name}=${{{name}:-{environment[name]}}}" in script
    for name in ("OMP_NUM_THREADS", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        assert environment[name] == "1"
        assert f"{name}=" in script
    assert environment["PRTE_MCA_prte_default_hostfile"] == "/etc/mpi/hostfile"
    assert launcher["image"] == worker["image"]
