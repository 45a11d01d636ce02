# SPDX-License-Identifier: BSD-3-Clause
"""Groups whose specification names no ranks: each rank finds its own part of the job, by number or by host.

W ranks.
"""

from __future__ import annotations

import socket
from collections import Counter

import torch

from syncbn.transports import gather, groups
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import NODE, GroupSpec
from syncbn.waits import processes
from syncbn.waits.ranks import named

_WHAT = "SyncBatchNorm"


def connect_part(spec: GroupSpec, everyone: AbstractTransport) -> AbstractTransport:
    """Makes this rank's group of ``spec.size`` consecutive ranks, or of the ranks of its host.

    Communication:
        One all-reduce of 2 W + 7 float64 values over every rank of the job, then one communicator for each group; for
        the error of unequal hosts, one more of texts.

    Raises:
        ValueError: on every rank, if ranks ask for different parts, a size does not divide the number of ranks, or
            hosts have different numbers of ranks.
    """
    if everyone.size == 1:
        return everyone
    row = [0.0 if spec.kind == NODE else float(spec.size), float(processes.own().host)]
    table = gather.gather(torch.tensor(row, dtype=torch.float64, device="cpu"), everyone, _WHAT)
    sizes, hosts = table.T.tolist()
    if len(set(sizes)) > 1:
        received = gather.by_rank([f"{size:.0f}" if size else f"'{NODE}'" for size in sizes], everyone.ranks)
        raise ValueError(
            f"{_WHAT} needs the same group_size on every rank; received {received}. Build the same model on every rank."
        )
    if spec.kind != NODE:
        groups.require_divisor(spec.size, everyone.size, "group_size")
        return everyone.split(everyone.rank // spec.size)
    numbers = list(dict.fromkeys(hosts))  # in the order of their first ranks
    if len({hosts.count(host) for host in numbers}) > 1:
        names = gather.gather_notes(socket.gethostname(), everyone)
        raise ValueError(_unequal(hosts, names, everyone.ranks))
    return everyone.split(numbers.index(hosts[everyone.rank]))


def ranks_of_hosts(everyone: AbstractTransport) -> list[int]:
    """Counts the ranks of each host, in the order of their first ranks.

    Communication:
        One all-reduce of W + 7 float64 values.
    """
    row = torch.tensor([float(processes.own().host)], dtype=torch.float64, device="cpu")
    return list(Counter(gather.gather(row, everyone)[:, 0].tolist()).values())


def _unequal(hosts: list[float], names: list[str], ranks: tuple[int, ...]) -> str:
    members: dict[float, list[int]] = {}
    for i, host in enumerate(hosts):
        members.setdefault(host, []).append(i)
    received = ", ".join(f"{len(m)} on {names[m[0]]} ({named([ranks[i] for i in m])})" for m in members.values())
    return (
        f"group_size='{NODE}' needs the same number of ranks on every host; received {received}. Start as many on each "
        "host, or pass a number of ranks."
    )
