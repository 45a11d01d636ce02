# SPDX-License-Identifier: BSD-3-Clause
"""A Slurm of this machine, and jobs in it: all are submitted at once, and each test looks at the end of one."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests import processes, warm
from tests.processes import ROOT
from tests.project.launched import STUCK

CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol", "squeue")
SECONDS = 150
"""In which all jobs must have ended; they need 15 to 40 s on two cores."""

# Every rank has the same value, so a mean between those of two jobs shows that they have mixed.
VALUE = """
import sys, time, torch, syncbn
world = syncbn.init()
layer = syncbn.SyncBatchNorm(1, momentum=1.0)
for _ in range(3):
    layer(torch.full((4, 1), float(sys.argv[1]) + world.rank))
time.sleep(1)
layer(torch.full((4, 1), float(sys.argv[1]) + world.rank))
sys.stdout.write(f"{world.rank} of {world.size} {world.transport.name} {layer.running_mean.item():g}\\n")
"""
# A layer, and no syncbn.init().
PLAIN = """
import sys, warnings, torch, syncbn
group = None
if sys.argv[1] == "communicator":
    from mpi4py import MPI
    group = MPI.COMM_WORLD
layer = syncbn.SyncBatchNorm(1, process_group=group)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layer(torch.randn(4, 1))
sys.stdout.write("".join(f"said: {each.message}\\n" for each in said))
"""
# As launch/slurm.sbatch is without the word that it draws: two steps at once.
STEPS = """#!/bin/bash
srun --mpi={mpi} --ntasks=2 --exact --kill-on-bad-exit=1 {python} {program} 100 &
srun --mpi={mpi} --ntasks=2 --exact --kill-on-bad-exit=1 {python} {program} 8 &
wait -n && wait -n
"""
ONE_STEP = """#!/bin/bash
exec srun --mpi={mpi} --ntasks=2 {python} {program} {word}
"""


def unusable():
    """Says why there can be no cluster here, or returns nothing."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        return f"needs Slurm and munge, as `apt-get install slurm-wlm munge` brings them; no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "needs root, to start the daemons of Slurm"


class Job:
    """A job that was submitted."""

    def __init__(self, call, folder, name, words, **extra):
        self.name, self._call, self._out = name, call, folder / f"{name}.out"
        done = call("sbatch", "--parsable", f"--job-name={name}", f"--output={self._out}", *words, **extra)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    @property
    def said(self):
        """Returns what the job has printed, both streams."""
        return self._out.read_text() if self._out.exists() else ""

    def until_said(self, text, times=1):
        """Waits until the job has printed a text."""
        deadline = time.monotonic() + SECONDS
        while self.said.count(text) < times:
            assert time.monotonic() < deadline, f"{self.name}: {self.said}"
            assert not self.has_ended(), f"{self.name}: {self.said}"
            time.sleep(0.2)

    def facts(self):
        """Returns what Slurm knows of the job."""
        words = self._call("scontrol", "--oneliner", "show", "job", self.number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def has_ended(self):
        return self.facts()["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

    def end(self):
        """Waits for the end. Returns Slurm's word for it, and what the job printed."""
        deadline = time.monotonic() + SECONDS
        while not self.has_ended():
            assert time.monotonic() < deadline, f"{self.name} runs after {SECONDS} s: {self.said}"
            time.sleep(0.2)
        return self.facts()["JobState"], self.said


def left_over(folder):
    """Returns the processes that run a program of this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if processes.is_alive(process) and any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Runs commands against a cluster of this machine."""
    if why := unusable():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    environ = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": 1}

    def call(*words, **extra):
        conf = {"SLURM_CONF": folder / "cluster" / "slurm.conf", "SLOTS": 12}
        return processes.run(*words, limit=60, **conf, **environ, **extra)

    up = call(CLUSTER, "up", folder / "cluster", WHILE=os.getpid())  # also if this process is killed
    if up.returncode:
        pytest.skip(f"no Slurm could be started here: {up.stderr[-500:]}")
    yield SimpleNamespace(call=call, folder=folder, pmix=call("srun", "--mpi=pmix", "true").returncode == 0)
    call(CLUSTER, "down", folder / "cluster")
    for process in left_over(folder):
        process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def jobs(cluster):
    """Submits all jobs, which mostly wait, at once. Those through PMIx only where Slurm has it."""
    programs = {}
    for name, text in {"stuck": STUCK, "value": VALUE, "plain": PLAIN}.items():
        programs[name] = cluster.folder / f"{name}.py"
        programs[name].write_text(text)
    made = {}

    python = warm.commands() / "python"  # of jobs that end by themselves: a fork is no child of Slurm's

    def submit(name, *words, **extra):
        options = {"PYTHON": sys.executable, "SYNCBN_TIMEOUT": 5}
        made[name] = Job(cluster.call, cluster.folder, name, words, **{**options, **extra})

    def script(name, text, **facts):
        path = cluster.folder / f"{name}.sh"
        path.write_text(text.format(python=python, **facts))
        return path

    shipped = ROOT / "launch" / "slurm.sbatch"
    submit("late", "--ntasks=2", shipped, programs["stuck"], "hangs", PMI="none", SYNCBN_TIMEOUT=1000)
    submit("cancelled", "--ntasks=2", shipped, programs["stuck"], "hangs", PMI="none", SYNCBN_TIMEOUT=1000)
    for pmi in ("none", "pmix") if cluster.pmix else ("none",):
        for word, name in ("raises", "raises"), ("is killed", "killed"), ("hangs", "hangs"):
            submit(f"{name}-{pmi}", "--ntasks=2", shipped, programs["stuck"], word, PMI=pmi)
        submit(f"steps-{pmi}", "--ntasks=4", script(f"steps-{pmi}", STEPS, mpi=pmi, program=programs["value"]))
        submit(f"two-{pmi}", "--ntasks=2", shipped, programs["value"], 10, PMI=pmi, PYTHON=python)
    submit("four-none", "--ntasks=4", shipped, programs["value"], 10, PMI="none", PYTHON=python)
    for word in "layer", "communicator":
        text = script(word, ONE_STEP, mpi="none", program=programs["plain"], word=word)
        submit(f"plain-{word}", "--ntasks=2", text)
    return made
