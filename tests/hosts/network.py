# SPDX-License-Identifier: BSD-3-Clause
"""Hosts made of network namespaces, see ``hosts.sh``: brings them up, runs commands there, and ends all of it."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests import warm
from tests.processes import ROOT, environment

HERE = Path(__file__).parent
SCRIPT, AGENT = HERE / "hosts.sh", HERE / "agent.sh"
SSHD = os.environ.get("SSHD", "/usr/sbin/sshd")
_numbers = itertools.count()


@cache
def problem():
    """Why this machine cannot have such hosts, or an empty string."""
    if not sys.platform.startswith("linux"):
        return "hosts of network namespaces need Linux"
    missing = [name for name in ("ip", "unshare", "nsenter", "setsid") if shutil.which(name) is None]
    if missing:
        return f"hosts of network namespaces need iproute2 and util-linux: no {', '.join(missing)}"
    if os.geteuid() != 0:
        return "hosts of network namespaces need root"
    name = f"sy{os.getpid()}-probe"
    for command in (
        "unshare --net --uts --ipc --mount true",
        f"ip netns add {name}",
        f"ip -n {name} link add br0 type bridge",
        f"ip -n {name} link add left type veth peer name right",
    ):
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            return f"hosts of network namespaces need more rights here: {command}: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def sshd_problem():
    """Why no host can be logged in to by ssh, or an empty string."""
    if Path(SSHD).exists() and shutil.which("ssh"):
        return ""
    return "needs ssh and sshd (package openssh-server), or the path of one in SSHD"


@dataclass
class Done:
    """A command that has ended."""

    status: int | None
    """None: it did not end in time, and was killed."""
    out: str
    err: str
    seconds: float

    def __str__(self):
        return f"status {self.status} after {self.seconds:.1f} s\n{self.out}\n{self.err}"


class Running:
    """A command on a host. Its output goes to files: whoever reads a pipe waits for all that hold it."""

    def __init__(self, words, folder, env, cwd):
        number = next(_numbers)
        self.paths = [folder / f"{number}.{name}" for name in ("out", "err")]
        self.began = time.monotonic()
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            self.process = subprocess.Popen(
                words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def out(self):
        """What it has printed so far."""
        return self.paths[0].read_text(errors="replace")

    @property
    def err(self):
        """What it has printed to stderr so far."""
        return self.paths[1].read_text(errors="replace")

    def saw(self, pattern, limit):
        """Waits until its output has a pattern; whether it had in time."""
        end = time.monotonic() + limit
        while not re.search(pattern, self.out):
            if time.monotonic() > end or self.process.poll() is not None:
                return bool(re.search(pattern, self.out))
            time.sleep(0.05)
        return True

    def done(self, limit):
        """Waits for its end; past the limit it is killed. What it started elsewhere ends with the hosts."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = None
        return Done(status, self.out, self.err, time.monotonic() - self.began)


class Hosts:
    """Hosts h1 to hN at 10.77.0.1 to 10.77.0.N, and a stranger x on their network.

    Args:
        n: how many.
        folder: an empty one, which all of them see; so they do the repository and this Python.
        kind: bridge, or wire for one that can be slow.
        environ: for ``hosts.sh``, such as ``ETC_HOSTS``.
    """

    def __init__(self, n, folder, kind="bridge", **environ):
        self.names = [f"h{number}" for number in range(1, n + 1)]
        self.folder = folder
        share = {str(ROOT), str(folder), str(Path(sys.prefix)), str(Path(sys.base_prefix)), str(warm.commands())}
        self.environ = {
            "HOSTS_PREFIX": f"sy{os.getpid()}-{next(_numbers)}",
            "HOSTS_RUN": str(folder / "hosts"),
            "HOSTS_SHARE": ":".join(sorted(each for each in share if each.startswith("/tmp/"))),
            "HOSTS_OWNER": str(os.getpid()),
            **environ,
        }
        self._running = []
        self.do("up", n, kind)

    def do(self, *words):
        """Runs ``hosts.sh``, and returns what it prints."""
        done = subprocess.run(
            [SCRIPT, *map(str, words)], env=environment(**self.environ), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"hosts.sh {words}: {done.stderr}"
        return done.stdout

    def start(self, host, *words, cwd=ROOT, **extra):
        """Starts a command on a host, with further variables of the environment."""
        path = f"{extra.pop('PYTHONPATH', ROOT)}"
        env = environment(**self.environ, PYTHONPATH=path, PYTHONUNBUFFERED=1, **extra)
        running = Running([SCRIPT, "in", host, *map(str, words)], self.folder, env, cwd)
        self._running.append(running)
        return running

    def run(self, host, *words, limit=60, **extra):
        """Runs a command on a host to its end; past the limit it is killed."""
        return self.start(host, *words, **extra).done(limit)

    def pids(self, host):
        """What runs on a host."""
        return [int(pid) for pid in self.do("pids", host).split()]

    def clear(self):
        """Ends all that runs on the hosts, and mends their network."""
        for host in self.names:
            for pid in self.pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            self.do("drop", host, "off")
            self.do("cable", host, "in")
        for running in self._running:
            running.done(5)
        self._running.clear()

    def close(self):
        """Ends all that runs on the hosts, and the hosts."""
        self.do("down")
        for running in self._running:
            running.done(5)
