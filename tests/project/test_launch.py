# SPDX-License-Identifier: BSD-3-Clause
"""The files of launch/: they start what they say, and nothing that they started outlives a failure."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests import processes

pytestmark = pytest.mark.program
LAUNCH = processes.ROOT / "launch"
SHELL_FILES = ("mpirun.sh", "torchrun.sh", "slurm.sbatch")
LAUNCHERS = ("mpirun.sh", "torchrun.sh")
SECONDS_TO_END = 15  # it takes one or two on an idle machine; unended, the other ranks would wait for ever
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

# What glibc is told in each rank.
MEMORY = """
import os, sys
names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
sys.stdout.write(" ".join(os.environ.get(name, "unset") for name in names) + "\\n")
"""
KEPT = "33554432 2000000000"

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
def program(tmp_path):
    """Writes a Python program and gives its path."""

    def write(text):
        path = tmp_path / "a program.py"
        path.write_text(text)
        return path

    return write


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
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
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


@pytest.mark.parametrize(("start", "transport"), [(processes.mpirun, "mpi"), (processes.torchrun, "torch")])
def test_a_launcher_starts_nproc_ranks_that_train_together(program, start, transport):
    done = start(3, program(TRAIN), "two words", "--flag", limit=LIMIT)
    assert done.returncode == 0, done.stderr
    expected = [f"{rank} of 3 {transport} 11.5 ['two words', '--flag']" for rank in range(3)]
    assert sorted(done.stdout.split("\n"))[1:] == expected


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_two_ranks_unless_told(program, launcher):
    done = processes.run(LAUNCH / launcher, program(TRAIN), limit=LIMIT, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["0", "1"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_tells_every_rank_to_keep_freed_memory(program, launcher, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    done = processes.run(LAUNCH / launcher, program(MEMORY), limit=LIMIT, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [KEPT, KEPT]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_leaves_the_memory_settings_of_the_user(program, launcher):
    settings = {"MALLOC_MMAP_THRESHOLD_": 131072, "MALLOC_TRIM_THRESHOLD_": 262144}
    done = processes.run(LAUNCH / launcher, program(MEMORY), limit=LIMIT, PYTHON=sys.executable, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["131072 262144"] * 2


@pytest.mark.parametrize("n", [2, 3])
def test_torch_distributed_may_be_ended_and_connected_again_under_torchrun(program, n):
    """The agent keeps one store for all: without a name of its own each time, gloo finds the old addresses there."""
    done = processes.torchrun(n, program(AGAIN), limit=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    mean = 1.5 + 5 * (n - 1)
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} torch {mean:g}" for i in range(3) for _ in range(n))


def test_mpirun_takes_options_with_its_command(program, tmp_path):
    where = tmp_path / "elsewhere"
    where.mkdir()
    text = "import os\nprint(os.path.basename(os.getcwd()))"
    done = processes.mpirun(2, program(text), limit=LIMIT, MPIRUN=f"mpirun -wdir {where}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["elsewhere", "elsewhere"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("what", ["raises", "is killed"])
def test_a_rank_that_fails_ends_all_ranks_at_once(program, launcher, what):
    stuck = start_stuck(launcher, program(STUCK), what)
    seconds, err = seconds_until_all_ended(*stuck, limit=SECONDS_TO_END + 20)
    assert stuck[0].returncode != 0
    assert seconds < SECONDS_TO_END
    if what == "raises":
        assert "rank 1 gives up" in err


def test_without_the_runner_of_mpi4py_the_other_ranks_would_wait(program):
    process = processes.start(
        *("mpirun", "-n", 2, sys.executable, program(STUCK), "raises"),
        **{"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1},
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
    )
    try:
        assert process.stdout.readline().strip() == "ready"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    finally:
        processes.kill(process)
        process.communicate()


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


@pytest.mark.parametrize(("start", "least"), [(processes.mpirun, 3), (processes.torchrun, 2)])
def test_torch_distributed_listens_on_loopback_alone(program, start, least):
    done = start(2, program(LISTENERS), limit=LIMIT)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    opened = [address for _, listeners in ranks for address, _ in listeners]
    assert len(ranks) == 2
    assert len(opened) >= least  # each rank's gloo; under mpirun also the store of rank 0
    assert set(opened) == {"127.0.0.1"}


def test_slurm_without_pmi_trains_over_torch_distributed(program, slurm):
    done, options, command, address, threads = slurm(program(TRAIN), "--epochs", "3", PMI="none", SLURM_CPUS_PER_TASK=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 torch 6.5 ['--epochs', '3']" for r in (0, 1)]
    assert options == {"mpi": "none", "ntasks": "2", "cpus-per-task": "2", "kill-on-bad-exit": "1"}
    assert (command[0], address, threads) == ("python", None, "1")


def test_slurm_tells_every_rank_to_keep_freed_memory(program, slurm, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    done, *_ = slurm(program(MEMORY), PMI="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [KEPT, KEPT]


def test_slurm_on_two_hosts_meets_at_the_first(program, slurm):
    done, _, _, address, _ = slurm(program(TRAIN), nodes=2, PMI="none")
    assert done.returncode == 0, done.stderr
    assert address == "localhost"
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 torch 6.5 []" for r in (0, 1)]


def test_slurm_with_pmi_trains_over_mpi(program, slurm):
    done, options, command, address, _ = slurm(program(TRAIN), NPROC=2, SLURM_NTASKS=7)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} of 2 mpi 6.5 []" for r in (0, 1)]
    assert (options["mpi"], options["ntasks"], command[1:3], address) == ("pmix", "2", ["-m", "mpi4py"], None)


def test_slurm_ends_with_the_status_of_a_failed_rank(program, slurm):
    done, *_ = slurm(program(STUCK), "raises", PMI="none")
    assert done.returncode != 0
    assert "rank 1 gives up" in done.stderr


# Stands in for the Python of gpu.sh: what it is told to run says how it ends.
GPU_PYTHON = """#!/bin/bash
echo "$SYNCBN_TEST_DEVICE $NPROC: $*"
case "$*" in
    "-c import pytest_mpi") exit {pytest_mpi} ;;
    *test_layer.py*) echo "===== 1 failed, 2 passed in 3.00s ====="; exit {layer} ;;
    *test_exactness.py*) sleep "${{NAP:-0}}" && echo "===== 5 passed in 1.00s =====" ;;
esac
"""
TOOLS = ("bash", "env", "timeout", "mkdir", "rm", "grep", "tail", "basename", "dirname", "cat", "sleep")


@pytest.fixture
def gpu(tmp_path):
    """Runs gpu.sh in a tree of its own, where the tools on PATH and what they say are ours."""

    def run(*present, layer=0, pytest_mpi=0, **extra):
        for folder in ("launch", "bin"):
            (tmp_path / folder).mkdir()
        shutil.copy(LAUNCH / "gpu.sh", tmp_path / "launch")
        for tool in TOOLS:
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
        python = GPU_PYTHON.format(layer=layer, pytest_mpi=pytest_mpi)
        start = '#!/bin/bash\nexec "$PYTHON" "$@"\n'
        texts = {"bin/python": python, "launch/mpirun.sh": start, "launch/torchrun.sh": start}
        for name, text in (texts | {f"bin/{tool}": "#!/bin/bash\necho sanitized\n" for tool in present}).items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "tests/multiprocess").mkdir(parents=True)
        (tmp_path / "tests/multiprocess/test_exactness.py").touch()
        words = {"PATH": tmp_path / "bin", "PYTHON": tmp_path / "bin/python", "OUT": tmp_path / "out", **extra}
        if "NAP" in extra:
            return processes.start("bash", tmp_path / "launch/gpu.sh", **words)
        done = processes.run("bash", tmp_path / "launch/gpu.sh", limit=LIMIT, **words)
        table = done.stdout.partition("part  ")[2].splitlines()[1:]
        return done, {line.split()[0]: line for line in table}, tmp_path / "out"

    return run


RANKS = [f"{launcher}{n}{what}" for launcher in ("mpirun", "torchrun") for n in (2, 3) for what in ("", "-bits")]
PARTS = {*RANKS, "alone", "contract", "kernels", "gpu", "sanitizer", "mpirun-compiled", "torchrun-compiled", "bench"}


def test_gpu_runs_all_its_parts_and_keeps_what_they_say(gpu):
    done, table, out = gpu("mpirun", "compute-sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table.keys() == PARTS
    assert all(" passed " in line for line in table.values())
    assert "5 passed in 1.00s" in table["mpirun3"]
    said = (out / "mpirun3.log").read_text()
    assert said.startswith("cuda:0 3: -m pytest")
    assert "--with-mpi" in said
    assert "--with-mpi" not in (out / "torchrun3.log").read_text()
    assert "cpu" in (out / "contract.log").read_text()


@pytest.mark.parametrize(("status", "verdict"), [(1, " FAILED "), (124, " TIMEOUT after 140 s ")])
def test_gpu_ends_with_1_after_all_parts_where_one_fails(gpu, status, verdict):
    done, table, _ = gpu("mpirun", layer=status)
    assert done.returncode == 1
    assert verdict in table["alone"]
    assert "1 failed, 2 passed" in table["alone"]
    assert all(" passed " in line for name, line in table.items() if name not in ("alone", "sanitizer"))


def test_gpu_says_which_parts_it_leaves_out_and_why(gpu):
    done, table, out = gpu(pytest_mpi=1, SYNCBN_TEST_DEVICE="cpu")
    assert done.returncode == 0
    assert table.keys() == {name for name in PARTS if not name.startswith("mpirun")} | {"mpirun"}
    assert all("left out" in table[name] for name in ("mpirun", "kernels", "gpu", "sanitizer", "bench"))
    assert "no mpirun" in table["mpirun"]
    assert "cpu 2: " in (out / "torchrun2.log").read_text()


def test_ctrl_c_ends_the_parts_of_gpu_that_run_side_by_side(gpu):
    process, deadline, napping = gpu("mpirun", NAP=1000), time.monotonic() + LIMIT, []
    try:
        while len(napping) < 2 and time.monotonic() < deadline:  # over MPI, over gloo
            family = processes.descendants(process)
            napping = [p for p in family if processes.is_alive(p) and p.name() == "sleep"]
            time.sleep(0.1)
        assert len(napping) == 2
        os.killpg(process.pid, signal.SIGINT)
        assert processes.survivors([*family, psutil.Process(process.pid)]) == []
        assert process.wait(10) == 130
    finally:
        processes.kill(process)
        process.communicate()


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
    malloc = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    assert [words[i + 1] for i, word in enumerate(words) if word == "-x"] == ["OMP_NUM_THREADS", *malloc]
    for name in malloc:
        assert f"export {name}=${{{name}:-{environment[name]}}}" in script
    for name in ("OMP_NUM_THREADS", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        assert environment[name] == "1"
        assert f"{name}=" in script
    assert environment["PRTE_MCA_prte_default_hostfile"] == "/etc/mpi/hostfile"
    assert launcher["image"] == worker["image"]
