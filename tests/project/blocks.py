# SPDX-License-Identifier: BSD-3-Clause
"""Runs the commands of a page where nothing is but the files of that page and an installed syncbn."""

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from tests import processes
from tests.project import pages

PLAIN = os.environ.get("SYNCBN_TEST_BLOCKS") == "plain"
"""Start each command by a shell instead: slower, and nothing is shared."""
LIMIT, START = 60, 120
"""Seconds for a command, and for N processes to import torch where other tests run."""
PYTHON = re.compile(r"python (?P<file>[\w.]+\.py)(?P<rest>.*)")
TORCHRUN = re.compile(r"torchrun --nproc[-_]per[-_]node[ =](?P<n>\d+) (?P<file>[\w.]+\.py)(?P<rest>.*)")
SHELL = re.compile(r"[|&;<>$`*?~(]")
# What a container needs whose user is root and which has fewer cores than a command has ranks.
HERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": 1,
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1,
    "OMPI_MCA_rmaps_base_oversubscribe": 1,
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
}


class Runner:
    """Starts warm processes when a command needs some, and ends them all at the end."""

    def __init__(self, folder, startup=processes.STARTUP):
        self.folder, self.startup, self.warm = folder, startup, {}
        self.installed = folder / "installed"
        self.installed.mkdir()
        (self.installed / "syncbn").symlink_to(processes.ROOT / "syncbn")
        torchrun = (
            folder / "bin" / "torchrun"
        )  # an environment that adds to another one, as that of tests/zoo, has none
        torchrun.parent.mkdir()
        torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
        torchrun.chmod(0o755)
        self.path = f"{torchrun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def environment(self):
        """No folder of a clone is on the path, as after ``pip install``."""
        python = f"{self.startup}:{self.installed}"
        return {**HERE, "PATH": self.path, "PYTHONPATH": python, "PET_MASTER_PORT": _free_port()}

    def page(self, page, folder):
        """Runs the commands of a page in one new folder; returns what is wrong, as texts."""
        for name in page.files:
            shutil.copy(pages.CODE / name, folder / name)
        return [wrong for run in page.runs for wrong in self._compare(page, run, folder)]

    def _compare(self, page, run, folder):
        printed = []
        for command in run.commands:
            done = self.command(command, folder)
            said = f"{page.name}, line {run.line}: {command}\nstatus {done.returncode}\n"
            said += f"--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
            if done.returncode != 0:
                yield said
            printed.append(_lines(done.stdout))
        if run.promised is not None and not _agrees(printed, _lines(run.promised)):
            yield f"{said}--- the page says\n{run.promised}"

    def command(self, command, folder):
        """Runs a command as it stands."""
        file = PYTHON.fullmatch(command) or TORCHRUN.fullmatch(command)
        if PLAIN or SHELL.search(command) or not file:
            return processes.run("bash", "-c", command, cwd=folder, limit=LIMIT, **self.environment())
        n = int(file.groupdict().get("n", 0))
        if n not in self.warm:
            self.warm[n] = Warm(self.folder / f"warm{n}", n, self.environment())
        return self.warm[n].run([file["file"], *shlex.split(file["rest"], comments=True)], folder)

    def close(self):
        """Ends all processes."""
        for warm in self.warm.values():
            processes.kill(warm.process)
            warm.process.communicate()


class Warm:
    """Processes that have imported torch: one, or those of a torchrun."""

    def __init__(self, folder, n, environ):
        folder.mkdir()
        self.folder, self.under_torchrun, self.ranks, self.number = folder, n > 0, max(n, 1), 0
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", n) if n else ()
        program = Path(__file__).with_name("forking.py")
        words = (sys.executable, *launcher, program, folder, os.getpid())
        self.process = processes.start(*words, cwd=folder, **environ)
        self._wait([folder / f"ready.{rank}" for rank in range(self.ranks)], START)

    def run(self, words, folder):
        """Lets each process run a program; returns what they did, as of one command."""
        # torchrun makes a store for each round of processes; in its only one programs would find each other's names.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)} if self.under_torchrun else {}
        order = {"number": self.number, "words": words, "cwd": str(folder), "environ": environ, "limit": LIMIT}
        part = self.folder / "part"
        part.write_text(json.dumps(order))
        part.rename(self.folder / f"{self.number}.json")
        names = [f"{self.number}.{rank}" for rank in range(self.ranks)]
        self._wait([self.folder / f"{name}.status" for name in names], LIMIT + 10)
        self.number += 1
        status, out, err = (
            [(self.folder / f"{name}.{kind}").read_text() for name in names] for kind in ("status", "out", "err")
        )
        worst = max(map(int, status), key=abs)
        return subprocess.CompletedProcess(words, worst, "".join(out), "".join(err))

    def _wait(self, files, limit):
        deadline = time.monotonic() + limit
        while not all(file.exists() for file in files):
            if self.process.poll() is not None or time.monotonic() > deadline:
                processes.kill(self.process)
                raise AssertionError(f"the warm processes ended\n{self.process.communicate()}")
            time.sleep(0.01)


def _agrees(printed, promised):
    """Whether a page shows what its commands print: one after the other, or once what all print alike."""
    return promised == list(itertools.chain(*printed)) or all(lines == promised for lines in printed)


def _lines(text):
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
