# SPDX-License-Identifier: BSD-3-Clause
"""Programs in subprocesses, always with a time limit, and nothing left running after it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
STARTUP = Path(__file__).parent / "startup"
"""What makes ``import torch`` shorter, see there."""
LAUNCHER_NAMES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYD", "SLURM_", "TORCHELASTIC", "SYNCBN_")
LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MPIRUN", "NPROC"}


def environment(**extra):
    """This environment without what a launcher left in it, with this Python's own commands first on the PATH."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_NAMES) and name not in LAUNCHER_VARIABLES
    }
    kept["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept["PYTHONPATH"] = ":".join([str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in extra.items()}}


def start(*command, cwd=ROOT, stdin=subprocess.DEVNULL, **extra):
    """Starts a command in a session of its own, so that all its processes can be found and ended."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**extra),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_prepare,  # noqa: PLW1509 - it takes no lock
    )


def _prepare():
    """A background job of a shell, as CI may be, ignores Ctrl-C, and so would all that it starts.

    Linux gives each session as much of the cores as another one, unless told that it is as nice as its processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if nice := os.nice(0):
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
            file.write(str(nice))


def patience(seconds):
    """Seconds to wait for what takes some: ten times as many where others go first, as tests/run.sh has it of some."""
    return seconds * (10 if os.nice(0) > 0 else 1)


def run(*command, limit=100, cwd=ROOT, **extra):
    """Runs a command to its end; past the limit it is killed, with every process it started, and the test fails.

    The limit is for a process that has the cores, see ``patience``.
    """
    process, limit = start(*command, cwd=cwd, **extra), patience(limit)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"{command} did not end within {limit} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def descendants(process):
    """All living processes that a command has started."""
    try:
        return [p for p in psutil.Process(process.pid).children(recursive=True) if p.is_running()]
    except psutil.NoSuchProcess:
        return []


def running(pids):
    """The processes of these numbers that run."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def survivors(family, seconds=10):
    """Those that still run some seconds later: a launcher may end a moment before the last process it ended."""
    deadline = time.monotonic() + seconds
    while (alive := [p for p in family if is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def is_alive(process):
    """Whether a process runs; one that has ended and waits for its parent, a zombie, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process):
    for each in [*descendants(process), process]:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def mpirun(n, *words, **options):
    """Runs a Python program on n processes through the project's own launch script."""
    return run("launch/mpirun.sh", *words, NPROC=n, PYTHON=sys.executable, **options)


def torchrun(n, *words, **options):
    """Runs a Python program on n processes under torchrun through the project's own launch script."""
    return run("launch/torchrun.sh", *words, NPROC=n, PYTHON=sys.executable, **options)


def python(*words, **options):
    """Runs a Python program in one process."""
    return run(sys.executable, *words, **options)


def many(launcher, n, cases, folder, *, limit=300, **extra):
    """Runs many programs in the same n processes, see ``many.py``.

    Args:
        launcher: mpirun, torchrun or python, of this module or of ``warm``.
        n: how many processes; 1 for python.
        cases: words of each command, by name. Those with a "=" before the program are its environment.
        folder: an empty one, for what they say.
        limit: seconds for all of them.
        extra: environment of the processes.

    Returns:
        What each did, by name, as of one process: ``returncode`` of all ranks, or a list where they differ.
    """
    texts = {name: [str(word) for word in words] for name, words in cases.items()}
    split = {name: next(i for i, word in enumerate(words) if "=" not in word) for name, words in texts.items()}
    written = [
        {"environ": dict(word.split("=", 1) for word in words[: split[name]]), "words": words[split[name] :]}
        for name, words in texts.items()
    ]
    (folder / "cases.json").write_text(json.dumps(written))
    done = launcher(*[n] * (launcher.__name__ != "python"), "-m", "tests.many", folder, limit=limit, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: _of_all_ranks(texts[name], folder, number, n) for number, name in enumerate(cases)}


def _of_all_ranks(words, folder, number, n):
    said = [json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in range(n)]
    statuses, outs, errs = zip(*said, strict=True)
    status = statuses[0] if len(set(statuses)) == 1 else list(statuses)
    return subprocess.CompletedProcess(words, status, "".join(outs), "".join(errs))
