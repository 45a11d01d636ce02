# SPDX-License-Identifier: BSD-3-Clause
"""Python programs start in a tenth of a second: each is a fork of one process that has imported torch.

``import torch`` takes 2 s of CPU, and 4 s with what DDP and optimizers import besides. Here ``python train.py`` starts
``stub.py``, which asks ``server.py`` for a fork and lends it arguments, environment, folder and open files. Signals
reach the fork, its end is that of the stub, and where the stub is killed, so is the fork. Launchers start their ranks
the same way. A stub on a host of tests/hosts gets a fork in the namespaces of that host. A program finds torch and
syncbn imported; it shares nothing else with the others.

Not for tests of how processes start and end: a fork is no child of its launcher.
"""

import atexit
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from tests import processes

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
COMMANDS = {
    "torchrun": "-m torch.distributed.run",  # in the environment of tests/zoo there is no file of it
    "syncbn": BIN / "syncbn",
    "accelerate": BIN / "accelerate",
}
"""Commands that are Python programs."""


@cache
def commands(path="", many=False):
    """A folder with python and the commands above; the process that forks starts with it and ends with this one.

    Args:
        path: folders for the PYTHONPATH of that process, where syncbn is to come from another place than this clone.
        many: whether it is to import what only some programs need, too.
    """
    if not path and (shared := os.environ.get("SYNCBN_TEST_WARM")):
        return Path(shared)
    folder = Path(tempfile.mkdtemp(prefix="syncbn-warm-"))
    address = folder / "socket"
    stub = f"#!{sys.executable} -IS\n{(HERE / 'stub.py').read_text()}"
    _write(folder / "python", stub.replace("REAL", sys.executable).replace("ADDRESS", str(address)))
    for name, words in COMMANDS.items():
        _write(folder / name, f'#!/bin/sh\nexec {folder}/python {words} "$@"\n')
    program = f"from tests.warm import server; server.main({str(address)!r}, many={many})"
    words = [sys.executable, "-c", program]
    options = {"cwd": processes.ROOT, "env": _environment(path), "process_group": 0}  # out of reach of Ctrl-C
    server = subprocess.Popen(words, stdin=subprocess.PIPE, **options)
    while not address.exists():
        assert server.poll() is None, "the process that forks did not start"
        time.sleep(0.02)
    atexit.register(_end, server, folder)
    return folder


def environment(path=""):
    """The variables with which shells, launchers and launch/*.sh start forks; path as in ``commands``."""
    folder = commands(path)
    found = f"{folder}:{BIN}:{os.environ['PATH']}"
    return {"PATH": found, "PYTHON": folder / "python", "PYTHON_EXEC": folder / "python"}


def forks_of(family):
    """The forks that some processes stand for."""
    found = [commands() / f"fork-{each.pid}" for each in family]
    return processes.running([int(path.read_text()) for path in found if path.exists()])


def run(*command, **options):
    """``processes.run`` with the commands above first on the PATH."""
    return processes.run(*command, **{**environment(), **options})


def python(*words, **options):
    """``processes.python`` in a fork."""
    return run(commands() / "python", *words, **options)


def mpirun(n, *words, **options):
    """``processes.mpirun`` with forks as ranks."""
    return run("launch/mpirun.sh", *words, NPROC=n, **options)


def torchrun(n, *words, **options):
    """``processes.torchrun`` with forks as ranks and as torchrun itself."""
    return run("launch/torchrun.sh", *words, NPROC=n, **options)


def _write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def _environment(path):
    """One thread of each library: a process with several cannot be forked. glibc reads its settings once, here.

    Unbuffered, which Python reads once too: each fork collects as much of stdout as it is told to, see ``become``.
    """
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    kept = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "2000000000"}  # as launch/*.sh sets them
    searched = ":".join(filter(None, [path, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **threads, **kept, "PYTHONPATH": searched, "PYTHONUNBUFFERED": "1"}


def _end(server, folder):
    server.stdin.close()  # it ends with its stdin, and kills what it has forked
    server.wait()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
