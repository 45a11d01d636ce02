# SPDX-License-Identifier: BSD-3-Clause
"""Starts a program on several hosts in three ways, does something to one of them, and says how each part ended."""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import warm
from tests.hosts.network import AGENT, ROOT

PROGRAM = ROOT / "tests/hosts/train_program.py"
PORT = 29500
WAYS = ("plain", "torchrun", "mpirun")


class Job:
    """A program on some hosts.

    Args:
        hosts: of this job alone.
        way: how it is started. plain: RANK, WORLD_SIZE and the other variables. ssh: mpirun that logs in by ssh.
        per_host: ranks of each host.
        words: for the program.
        forks: whether ranks and agents are forks, see tests/warm. Not where the parent of a process matters.
        environ: further variables.
    """

    def __init__(self, hosts, way, per_host, *words, forks=True, **environ):
        self.hosts, self.way, self.per_host = hosts, way, per_host
        self.python = warm.commands() / "python" if forks else sys.executable
        environ = {"PYTHON_EXEC": self.python, **environ}
        start = {"plain": self._plain, "torchrun": self._torchrun, "mpirun": self._mpirun, "ssh": self._mpirun}[way]
        self.parts = start([PROGRAM, *words], environ)
        """The commands by which the job was started: for each rank, agent or mpirun, with its host."""

    @property
    def size(self):
        return self.per_host * len(self.hosts.names)

    def _plain(self, command, environ):
        parts = []
        for rank in range(self.size):
            host, local = self.hosts.names[rank // self.per_host], rank % self.per_host
            own = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": self.per_host}
            own |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT, **environ}
            parts.append((host, self.hosts.start(host, self.python, *command, **own)))
        return parts

    def _torchrun(self, command, environ):
        words = [self.python, "-m", "torch.distributed.run", "--nnodes", len(self.hosts.names)]
        words += ["--nproc-per-node", self.per_host, "--master-addr", "10.77.0.1", "--master-port", PORT]
        return [
            (host, self.hosts.start(host, *words, "--node-rank", number, *command, **environ))
            for number, host in enumerate(self.hosts.names)
        ]

    def _mpirun(self, command, environ):
        slots = ",".join(f"{host}:{self.per_host}" for host in self.hosts.names)
        passed = [word for name in ("PYTHONPATH", *environ) for word in ("-x", name)]
        agent, login = f"--prtemca plm_ssh_agent {AGENT}", {}
        if self.way == "ssh":
            agent, login = "", {"PRTE_MCA_plm_ssh_args": (self.hosts.folder / "hosts/ssh_args").read_text().strip()}
        own = {
            "NPROC": self.size,
            "PYTHON": self.python,
            "MPIRUN": f"mpirun --host {slots} {agent} {' '.join(passed)}",
            "LOGIN_PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            **login,
            **environ,
        }
        host = self.hosts.names[0]
        return [(host, self.hosts.start(host, "launch/mpirun.sh", *command, **own))]

    @property
    def out(self):
        return "".join(part.out for _, part in self.parts)

    @property
    def err(self):
        return "".join(part.err for _, part in self.parts)

    def ranks(self):
        """The process of each rank and its host, by rank, once all train; fails if they do not."""
        end = time.monotonic() + 90
        while self.out.count("ready: rank") < self.size:
            assert time.monotonic() < end, f"it does not train\n{self.out}\n{self.err}"
            assert all(part.process.poll() is None for _, part in self.parts), f"it ended\n{self.out}\n{self.err}"
            time.sleep(0.1)
        found = re.findall(r"rank (\d+) on (\S+) is process (\d+)", self.out)
        return {int(rank): (host, int(pid)) for rank, host, pid in found}

    def statuses(self, limit):
        """Waits until all commands have ended, and returns their statuses; None if one has not ended in time."""
        end = time.monotonic() + limit
        return [part.done(max(0.1, end - time.monotonic())).status for _, part in self.parts]


@dataclass
class Ended:
    """How a job ended."""

    seconds: dict[str, float | None]
    """From the fault until nothing of it ran, for each host; None if something still runs."""
    launched: list[float | None]
    """The same for each command that started it."""
    statuses: list[int | None]
    out: str
    err: str
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self):
        return f"{self.seconds} {self.launched} {self.statuses} left {self.left}\n{self.out}\n{self.err}"


def watch(job, patience):
    """Waits until nothing of a job runs on any host and its commands have ended."""
    began = time.monotonic()
    seconds = dict.fromkeys(job.hosts.names)
    launched = [None] * len(job.parts)
    while time.monotonic() < began + patience and (None in seconds.values() or None in launched):
        now = time.monotonic() - began
        for i, (_, part) in enumerate(job.parts):
            if launched[i] is None and part.process.poll() is not None:
                launched[i] = round(now, 1)
        for host in job.hosts.names:
            if not job.hosts.pids(host):
                seconds[host] = seconds[host] or round(now, 1)
            else:
                seconds[host] = None
        time.sleep(0.1)
    left = {host: [_line(pid) for pid in job.hosts.pids(host)] for host in job.hosts.names}
    statuses = [part.process.poll() for _, part in job.parts]
    return Ended(seconds, launched, statuses, job.out, job.err, {h: some for h, some in left.items() if some})


def _line(pid):
    try:
        return " ".join(psutil.Process(pid).cmdline())[-100:]
    except psutil.NoSuchProcess:
        return ""


def fault(job, name, rank):
    """Does something to a rank, or to its host."""
    host, pid = job.ranks()[rank]
    if name == "kill":
        os.kill(pid, signal.SIGKILL)
    elif name == "stop":
        os.kill(pid, signal.SIGSTOP)
    elif name == "crash":
        job.hosts.do("crash", host)
    elif name == "drop":
        job.hosts.do("drop", host, "on")
    elif name == "cable":
        job.hosts.do("cable", host, "out")
    elif name == "agent":  # the torchrun of the rank's host, or the daemon of mpirun there
        os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    elif name == "launcher":
        [part] = [part for _, part in job.parts]
        launcher = psutil.Process(part.process.pid)
        for each in [*launcher.children(recursive=True), launcher]:
            if each.name() in ("mpirun", "prterun"):
                each.kill()
