# SPDX-License-Identifier: BSD-3-Clause
"""A file in memory, without a name, that several processes of one user map. Linux only, see docs/decisions/0010."""

from __future__ import annotations

import errno
import fcntl
import os

SLOT, LEAST_SLOT, TOTAL, PAGE = 2**18, 2**16, 2**25, 2**12
"""Bytes of a slot; the least; of all slots of a group, unless that makes them smaller still; and what divides them."""
NAME = "syncbn"
"""What /proc/PID/maps shows."""


def slot_bytes(ranks: int) -> int:
    """Returns the bytes of a slot, whole pages."""
    return max(LEAST_SLOT, min(SLOT, TOTAL // (2 * ranks) // PAGE * PAGE))


def create(size: int) -> int:
    """Makes a memory file. Its pages are there at once: for one that comes later and does not fit, a process dies."""
    file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(file, 0o600)
        os.posix_fallocate(file, 0, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(file)
        raise
    return file


def open_of(pid: int, number: int, size: int) -> int:
    """Opens a memory file of another process of this user."""
    path = f"/proc/{pid}/fd/{number}"
    if not os.readlink(path).startswith(f"/memfd:{NAME}"):
        raise FileNotFoundError(errno.ENOENT, "it is another file", path)
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.fstat(file).st_size != size:
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "it has another size", path)
    return file
