# SPDX-License-Identifier: BSD-3-Clause
"""Whether the process of another rank of this host runs. Linux tells; elsewhere only "gone" is seen."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple

RUNS, STOPPED, GONE, UNREACHABLE = "runs", "stopped", "gone", "unreachable"
"""The last one: its host does not answer."""
_DAEMON = "prted"
"""Open MPI's, on each host but that of mpirun. It starts the ranks there."""


class Process(NamedTuple):
    """A process, in a form that is never another one's."""

    host: int
    """52 bits of a hash of the host and of its process namespace."""
    pid: int
    began: int
    """When it began, in ticks of the host's clock: a number of a process is used again. 0 if the host does not say."""


def own() -> Process:
    """Returns this process."""
    pid = os.getpid()
    return Process(_host(), pid, _stat(pid)[1])


def state(process: Process) -> str:
    """Returns whether a process of this host runs, is stopped, or is gone."""
    letter, began = _stat(process.pid)
    if letter == "?":
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return GONE
        except PermissionError:
            return RUNS
        return RUNS
    if letter in "ZXx" or began != process.began:
        return GONE
    return STOPPED if letter == "T" else RUNS


def kill_stopped(process: Process) -> None:
    """Ends a process of this host if it is stopped."""
    if state(process) == STOPPED:
        os.kill(process.pid, signal.SIGKILL)


def end_daemon() -> None:
    """Ends the daemon of mpirun that has started this process: no order of mpirun reaches it any more."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        return
    if name == _DAEMON:
        os.kill(parent, signal.SIGTERM)


def _host() -> int:
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    name = f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"
    if space.is_symlink():  # a container has processes of its own
        name += os.readlink(space)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 12


def _stat(pid: int) -> tuple[str, int]:
    """Returns the letter of a process's state and when it began; "X" if there is none, "?" without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ("X" if Path("/proc/self/stat").exists() else "?"), 0
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return fields[0], int(fields[19])
