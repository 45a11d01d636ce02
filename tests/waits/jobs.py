# SPDX-License-Identifier: BSD-3-Clause
"""Runs ``fault_program.py`` on several ranks and says how and when each of them ended."""

import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil

from tests import warm
from tests.processes import descendants, kill, start, survivors

PROGRAM = ("-m", "tests.waits.fault_program")
END = "All ranks end now, with status"
"""In every report."""
GIVEN_UP = "not ended"


@dataclass
class Outcome:
    """What a job did."""

    statuses: list
    """Of every rank; of the launcher alone if there is one."""
    seconds: float
    """From the fault to the end of the last rank."""
    out: str
    err: str
    report: dict | None
    """The JSON."""
    left: list = field(default_factory=list)
    """Processes that still run."""

    def __str__(self):
        return (
            f"statuses {self.statuses} {self.seconds:.1f} s after the fault, left {self.left}\n{self.out}\n{self.err}\n"
            f"{json.dumps(self.report)}"
        )


def environ(folder, limit):
    return {"SYNCBN_TIMEOUT": str(limit), "SYNCBN_REPORT": str(folder / "report.json"), "PYTHONUNBUFFERED": "1"}


def outcome(folder, statuses, ended, out, err, left):
    """Reads what a job has left in its folder."""
    begun = [float(seconds) for seconds in re.findall(r"fault at ([\d.]+)", out)]
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else None
    return Outcome(statuses, ended - max(begun, default=0.0), out, err, report, left)


def left_by(job):
    """What still listens of a job over gloo: on its port, or a process of it."""
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [f"{each}" for each in listening if each.laddr.port == job["port"] or each.pid in job["pids"]]


class Nest:
    """Jobs over gloo, see ``nest.py``. Any thread may run one."""

    def __init__(self):
        self._process = start(sys.executable, "-m", "tests.waits.nest", stdin=subprocess.PIPE)
        self._said = {}
        self._numbers, self._lock = itertools.count(), threading.Lock()
        assert "ready" in self._process.stdout.readline(), self._process.stderr.read()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            said = json.loads(line)
            self._said[said["id"]].put(said)

    def run(self, folder, ranks, words, *, limit, patience, then=None, **extra):
        """Runs a job.

        Args:
            folder: an empty one.
            ranks: how many.
            words: the arguments of the program.
            limit: ``SYNCBN_TIMEOUT``.
            patience: seconds after which it is killed.
            then: is called with the processes of the ranks as soon as they are there.
        """
        number = next(self._numbers)
        said = self._said[number] = queue.Queue()
        job = {"id": number, "folder": str(folder), "ranks": ranks, "words": words}
        job["environ"] = {**environ(folder, limit), **extra}
        with self._lock:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        begun = said.get(timeout=60)
        pids = begun["pids"]
        if then is not None:
            then(folder, pids)
        deadline, ends, given_up = time.monotonic() + patience, {}, []
        while len(ends) < ranks:
            try:
                end = said.get(timeout=max(0.0, deadline - time.monotonic()) if not given_up else 10)
                ends[end["rank"]] = end
            except queue.Empty:
                given_up = [rank for rank in range(ranks) if rank not in ends]
                for rank in given_up:
                    os.kill(pids[rank], signal.SIGKILL)
        statuses = [GIVEN_UP if rank in given_up else ends[rank]["status"] for rank in range(ranks)]
        out, err = (
            "".join((folder / f"{name}.{rank}").read_text() for rank in range(ranks)) for name in ("out", "err")
        )
        return outcome(folder, statuses, max(end["time"] for end in ends.values()), out, err, left_by(begun))

    def close(self):
        self._process.stdin.close()
        self._process.wait(20)
        kill(self._process)
        self._process.stdout.close()
        self._process.stderr.close()


def launched(launcher, folder, ranks, words, *, limit, patience, then=None, **extra):
    """Runs a job under launch/mpirun.sh or launch/torchrun.sh.

    Args:
        launcher: mpirun or torchrun.
        then: is called with the launcher's process as soon as the fault has begun.
    """
    script = f"launch/{launcher}.sh"
    variables = {"NPROC": ranks, "PYTHON": sys.executable, **environ(folder, limit), **extra}
    process = start(script, *PROGRAM, *words, **variables)
    watch = threading.Timer(patience, kill, [process])
    family, said = [], {"stdout": [], "stderr": []}

    def read(name):
        for line in getattr(process, name):
            said[name].append(line)
            found = descendants(process)
            family[:] = [*found, *warm.forks_of(found)] or family
            if then is not None and line.startswith("fault at ") and not done:
                done.append(True)
                then(process)

    done = []
    readers = [threading.Thread(target=read, args=(name,)) for name in said]
    for thread in (watch, *readers):
        thread.start()
    status = process.wait()
    ended = time.time()
    given_up = not watch.is_alive()
    watch.cancel()
    left = survivors(family, 5)
    for each in left:
        each.kill()
    for thread in readers:
        thread.join()
    out, err = ("".join(lines) for lines in said.values())
    process.stdout.close()
    process.stderr.close()
    return outcome(folder, [GIVEN_UP if given_up else status], ended, out, err, left)
