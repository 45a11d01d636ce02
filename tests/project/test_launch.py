# SPDX-License-Identifier: BSD-3-Clause
"""The files of launch/: they start what they say, and nothing that they started outlives a failure."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
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

KEPT = ["33554432", "2000000000"]
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# Who this rank is, what glibc is told, and where the ranks of torchrun meet.
TOLD = """
import json, os, sys
rank = next((os.environ[n] for n in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK") if n in os.environ), None)
names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MASTER_ADDR")
sys.stdout.write(json.dumps([rank, *map(os.environ.get, names)]) + "\\n")
"""

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


def told(launcher, path, **options):
    """What each rank is told, by a launcher that gets no number of ranks: the memory settings, and the address."""
    done = processes.run(LAUNCH / launcher, path, limit=LIMIT, PYTHON=sys.executable, **options)
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
    done = processes.torchrun(3, program(AGAIN), limit=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} torch 11.5" for i in range(3) for _ in range(3))


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
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    done, *_ = slurm(program(TOLD), PMI="none")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)[1:3] for line in done.stdout.splitlines()] == [KEPT, KEPT]


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
    "-m pip"*) mkdir -p "$RESULTS/site/lib/python3.12/site-packages" && exit {pip} ;;
    *test_layer.py*)
        echo "tests/test_layer.py::test_a "
        [ -z "$NAP" ] || sleep "$NAP"
        [ {layer} = 0 ] || echo "FAILED tests/test_layer.py::test_a[(5, 3)] - AssertionError: 1 | 2"
        echo "===== 1 failed, 2 passed in 3.00s ====="
        exit {layer}
        ;;
    *"-m not program and not slow tests/multiprocess") echo "===== 5 passed in 1.00s =====" ;;
    *) echo "$LD_LIBRARY_PATH $PYTHONPATH" ;;
esac
"""
TOOLS = (
    *("bash", "cat", "cut", "dirname", "env", "grep", "gzip", "head", "mkdir", "mv", "rm"),
    *("seq", "sleep", "tail", "tar", "timeout", "xargs"),
)
GPU_FILES = (
    *("syncbn/__init__.py", "benchmarks/gpu/__main__.py", "benchmarks/gpu/variants.py", "tests/gpu/stress.py"),
    *("tests/gpu/test_gpu.py", "tests/gpu/test_nccl.py"),
)
GPU_PARTS = {
    "contact": [
        *("kernels", "cases", "gpu", "nccl", "contract", "alone", "compile"),
        *("torchrun2-bits", "mpirun2-bits"),
    ],
    "bench": ["bench"],
    "ranks": [
        *("mpirun2", "mpirun3", "torchrun2", "torchrun3", "mpirun3-bits", "torchrun3-bits"),
        "mpirun2-compiled",
    ],
    "sanitize": ["memcheck", "racecheck", "synccheck", "initcheck", "stress"],
    "variants": ["variants"],
}
GPU_JOBS = [job for jobs in GPU_PARTS.values() for job in jobs]


class Gpu:
    """gpu.sh in a tree of its own, where the tools on PATH and what they say are ours."""

    def __init__(self, folder, *present, layer=0, pytest_mpi=0, pip=0):
        self.folder, self.results, self.archive = folder, folder / "results", folder / "kept/gpu.tgz"
        for name in ("launch", "bin", *(Path(file).parent for file in GPU_FILES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in GPU_FILES:
            (folder / name).touch()
        shutil.copy(LAUNCH / "gpu.sh", folder / "launch")
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        python = GPU_PYTHON.format(layer=layer, pytest_mpi=pytest_mpi, pip=pip)
        start = '#!/bin/bash\nexec "$PYTHON" "$@"\n'
        texts = {"bin/python": python, "launch/mpirun.sh": start, "launch/torchrun.sh": start}
        for name, text in (texts | {f"bin/{tool}": "#!/bin/bash\necho sanitized\n" for tool in present}).items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def words(self, extra):
        paths = {"PATH": self.folder / "bin", "PYTHON": self.folder / "bin/python"}
        return {**paths, "RESULTS": self.results, "ARCHIVE": self.archive, "OUT": self.folder / "not ours", **extra}

    def run(self, *parts, **extra):
        return processes.run("bash", self.folder / "launch/gpu.sh", *parts, limit=LIMIT, **self.words(extra))

    def start(self, *parts, **extra):
        return processes.start("bash", self.folder / "launch/gpu.sh", *parts, **self.words(extra))

    def packed(self):
        """The files of the archive: name and text."""
        with tarfile.open(self.archive) as archive:
            return {Path(f.name).name: archive.extractfile(f).read().decode() for f in archive if f.isfile()}


def gpu_tables(text):
    """The lines of each table that gpu.sh prints, by job. An empty line ends a table."""
    tables = [part.partition("\n\n")[0].splitlines()[1:] for part in re.split(r"^job  ", text, flags=re.MULTILINE)[1:]]
    return [{line.split()[0]: line for line in table if not line.startswith(" ")} for table in tables]


@pytest.fixture
def gpu(tmp_path):
    return partial(Gpu, tmp_path)


@contextlib.contextmanager
def napping_gpu(gpu):
    """The part contact, with one job that does not end and all others done and packed."""
    tree = gpu("mpirun")
    process, deadline, others = tree.start("contact", NAP=1000), time.monotonic() + LIMIT, GPU_PARTS["contact"]
    family = []
    try:
        want = {f"{job}.result" for job in others} - {"alone.result"}
        while not (tree.archive.exists() and want <= tree.packed().keys()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = processes.descendants(process)
        assert any(p.name() == "sleep" and p.cmdline()[1] == "1000" for p in family)
        yield tree, process, family
    finally:
        for each in [*family, *processes.descendants(process), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate()


def test_gpu_runs_its_five_parts_in_order_and_prints_the_table_after_each(gpu):
    tree = gpu("mpirun", "compute-sanitizer")
    done = tree.run()
    assert done.returncode == 0, done.stdout + done.stderr
    tables = gpu_tables(done.stdout)
    ends = [sum(len(jobs) for jobs in list(GPU_PARTS.values())[:n]) for n in range(1, 6)]
    assert [list(table) for table in tables] == [GPU_JOBS[:end] for end in (1, *ends)]  # once more after kernels
    assert all(" passed " in line for line in tables[-1].values())
    for job in ("mpirun2", "mpirun3", "torchrun2", "torchrun3"):
        assert "5 passed in 1.00s" in tables[-1][job]
    compiled = "-m slow -k not inductor tests/multiprocess/test_compile.py tests/multiprocess/test_combinations.py"
    assert compiled in (tree.results / "mpirun2-compiled.log").read_text()
    assert (tree.results / "mpirun3.log").read_text().startswith("cuda:0 3: -m pytest")
    assert "--with-mpi" in (tree.results / "mpirun3.log").read_text()
    assert "--with-mpi" not in (tree.results / "torchrun3.log").read_text()
    assert (tree.results / "contract.log").read_text().startswith("cuda:0 ")
    assert not (tree.folder / "not ours").exists()


def test_gpu_packs_every_log_and_result(gpu):
    tree = gpu("mpirun", "compute-sanitizer")
    done = tree.run()
    files = {f"{job}.{what}" for job in GPU_JOBS for what in ("log", "result")}
    assert tree.packed().keys() == files | {"table.txt"}
    assert tree.packed()["table.txt"] == "\n" + done.stdout[done.stdout.rindex("job  ") :]


def test_gpu_runs_the_parts_it_is_told(gpu):
    done = gpu("mpirun").run("variants", "bench")
    assert done.returncode == 0, done.stderr
    assert [list(table) for table in gpu_tables(done.stdout)] == [["variants"], ["variants", "bench"]]
    assert "-m benchmarks.gpu --repeats 5" in done.stdout  # the log of the benchmark


def test_gpu_refuses_an_unknown_part_before_it_runs_any(gpu):
    tree = gpu()
    done = tree.run("contact", "speed")
    assert done.returncode == 2
    assert done.stderr == (
        "launch/gpu.sh takes contact, bench, ranks, sanitize and variants, or nothing for all; received speed.\n"
    )
    assert not tree.results.exists()


@pytest.mark.parametrize(("status", "result"), [(1, " FAILED "), (124, " TIMEOUT after 110 s "), (137, " FAILED ")])
def test_gpu_ends_with_1_after_all_parts_where_a_job_fails(gpu, status, result):
    done = gpu("mpirun", layer=status).run("contact", "bench")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 1
    assert result in table["alone"]
    assert "1 failed, 2 passed in 3.00s" in table["alone"]
    assert "\n    FAILED tests/test_layer.py::test_a[(5, 3)] - AssertionError: 1 | 2\n" in done.stdout
    assert all(" passed " in line for name, line in table.items() if name != "alone")


@pytest.mark.parametrize("slower", [1, 2])
def test_gpu_ends_a_job_at_its_limit(gpu, slower):
    tree = gpu("mpirun")
    script = tree.folder / "launch/gpu.sh"
    script.write_text(script.read_text().replace("110 alone", "1 alone"))
    done = tree.run("contact", NAP=1000, SLOWER=slower)
    assert done.returncode == 1
    assert f" TIMEOUT after {slower} s " in gpu_tables(done.stdout)[-1]["alone"]
    assert "tests/test_layer.py::test_a" in gpu_tables(done.stdout)[-1]["alone"]  # the test that ran


def test_gpu_says_which_jobs_it_leaves_out_and_why(gpu):
    tree = gpu(pytest_mpi=1)
    done = tree.run(SYNCBN_TEST_DEVICE="cpu")
    table = gpu_tables(done.stdout)[-1]
    ran = {"contract", "alone", "compile", "torchrun2-bits", "torchrun2", "torchrun3", "torchrun3-bits"}
    assert done.returncode == 0
    assert table.keys() == set(GPU_JOBS)
    assert {name for name, line in table.items() if "passed" in line} == ran
    assert all("left out" in table[name] and "no mpirun" in table[name] for name in GPU_JOBS if "mpirun" in name)
    assert all("not on a GPU" in table[name] for name in set(GPU_JOBS) - ran if "mpirun" not in name)
    assert (tree.results / "torchrun2.log").read_text().startswith("cpu 2: ")


def test_gpu_leaves_out_what_a_checkout_or_a_machine_does_not_have(gpu):
    tree = gpu("mpirun")
    (tree.folder / "tests/gpu/test_nccl.py").unlink()
    done = tree.run("contact", "sanitize")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 0
    assert "no tests/gpu/test_nccl.py" in table["nccl"]
    assert "no compute-sanitizer" in table["racecheck"]
    assert " passed " in table["stress"]


def test_gpu_installs_wheels_beside_the_results_and_uses_them(gpu):
    tree = gpu("mpirun")
    done = tree.run("contact", WHEELS="wheels", LD_LIBRARY_PATH="/theirs")
    assert done.returncode == 0, done.stderr
    assert f"--prefix {tree.results}/site wheels/*.whl" in (tree.results / "wheels.log").read_text()
    said = (tree.results / "gpu.log").read_text()
    assert f"{tree.results}/site/lib:/theirs {tree.results}/site/lib/python3.12/site-packages:" in said


def test_gpu_goes_on_where_the_wheels_cannot_be_installed(gpu):
    done = gpu("mpirun", pip=1).run("contact", WHEELS="wheels")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 1
    assert " FAILED " in table["wheels"]
    assert " passed " in table["gpu"]


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_gpu_ends_all_jobs_when_it_is_stopped_and_keeps_what_they_said(gpu, by, status):
    with napping_gpu(gpu) as (tree, process, family):
        os.killpg(process.pid, by)
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == status, err
        assert processes.survivors(family) == []
        table = gpu_tables(out)[-1]
        assert " stopped " in table["alone"]
        assert "tests/test_layer.py::test_a" in table["alone"]  # the test that ran
        assert " passed " in table["gpu"]
        assert " stopped " in gpu_tables(tree.packed()["table.txt"])[0]["alone"]


def test_gpu_that_is_killed_leaves_what_was_done_in_the_archive(gpu):
    with napping_gpu(gpu) as (tree, process, _):
        process.kill()
        process.wait(LIMIT)
        table = gpu_tables(tree.packed()["table.txt"])[0]
        assert "has not ended" in table["alone"]
        assert all(" passed " in line for name, line in table.items() if name != "alone")
        assert "tests/test_layer.py::test_a" in tree.packed()["alone.log"]


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
