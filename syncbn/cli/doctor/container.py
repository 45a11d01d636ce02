# SPDX-License-Identifier: BSD-3-Clause
"""The limits that a container has set for this process, from its cgroups of version 1 or 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60
"""Bytes from which on a limit of memory is none."""


def core_limit(root: str = "/") -> float | None:
    """Returns how many cores' worth of time the container of this process may use; None for no limit.

    Args:
        root: where /proc and /sys are.
    """
    limits = []
    for text in _settings("cpu", "cpu.max", root):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    periods = _settings("cpu", "cpu.cfs_period_us", root)
    for quota, period in zip(_settings("cpu", "cpu.cfs_quota_us", root), periods, strict=False):
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: str = "/") -> float | None:
    """Returns the GiB that the container of this process may use; None for no limit. ``root``: see core_limit."""
    texts = [*_settings("memory", "memory.max", root), *_settings("memory", "memory.limit_in_bytes", root)]
    limits = [int(text) for text in texts if text.isdecimal() and int(text) < _UNLIMITED]
    return round(min(limits) / 2**30, 1) if limits else None


def _settings(controller: str, name: str, root: str) -> Iterator[str]:
    """Yields what the groups of this process say in a file, its own one first: cgroup version 2, then 1."""
    for line in read(Path(root, "proc/self/cgroup")).splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            tops = [Path(root, "sys/fs/cgroup"), Path(root, "sys/fs/cgroup/unified")]
        elif controller in controllers.split(","):
            tops = [Path(root, "sys/fs/cgroup", controllers), Path(root, "sys/fs/cgroup", controller)]
        else:
            continue
        for top in dict.fromkeys(tops):
            group = top / path.lstrip("/")
            for each in (group, *group.parents):
                if text := read(each / name):
                    yield text
                if each == top:
                    break


def read(path: Path) -> str:
    """Returns the text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
