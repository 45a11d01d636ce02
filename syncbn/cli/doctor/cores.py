# SPDX-License-Identifier: BSD-3-Clause
"""Whether the processes of a host, and their threads, have a core each."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.cli.doctor.report import Place


def crowded(places: Sequence[Place]) -> str:
    """Names the host that has more processes than cores, by most; returns nothing if there is none."""
    found = [
        (len(mine) / cores, f"host {host} has {len(mine)} processes on {shown(cores)}")
        for host, mine in by_host(places).items()
        if 0 < (cores := cores_of(mine)) < len(mine)
    ]
    return max(found)[1] if found else ""


def too_many_threads(places: Sequence[Place]) -> str:
    """Names the host whose processes have more threads than cores, by most, if some have several threads."""
    found = []
    for host, mine in by_host(places).items():
        cores, threads = cores_of(mine), [place.threads for place in mine]
        if max(threads) > 1 and 0 < cores < sum(threads):
            each = f"{len(mine)} process{'es' * (len(mine) > 1)} of {max(threads)} threads"
            found.append((sum(threads) / cores, f"host {host} has {each} on {shown(cores)}"))
    return max(found)[1] if found else ""


def by_host(places: Sequence[Place]) -> dict[str, list[Place]]:
    """Groups places by their host, in the order of the ranks."""
    hosts: dict[str, list[Place]] = {}
    for place in places:
        hosts.setdefault(place.host, []).append(place)
    return hosts


def cores_of(places: Sequence[Place]) -> float:
    """Returns how many cores the processes of a host have together; 0 if that is unknown."""
    together = set[int]().union(*(read(place.cores) for place in places))
    return min([float(len(together)), *(place.core_limit for place in places if place.core_limit)])


def read(text: str) -> set[int]:
    """Reads ranges of numbers, such as 0-3, 8."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.strip().partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def shown(cores: float) -> str:
    """Returns a number of cores as text."""
    return f"{cores:g} core{'s' * (cores != 1)}"
