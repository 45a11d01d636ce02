# SPDX-License-Identifier: BSD-3-Clause
"""Several hosts, node by node: shared memory inside each host, and a direct exchange between their first ranks.

A wire crosses the network once for each pair of hosts, not for each pair of ranks. The ranks of a host are added in
their order, then the hosts in the order of their first ranks, so all ranks get the same bits.

W ranks.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport, MismatchError
from syncbn.transports.direct import MOST_RANKS
from syncbn.transports.shared_memory import on_one_host
from syncbn.transports.single import SingleTransport
from syncbn.transports.torch_dist import TorchTransport, groups_known
from syncbn.waits import processes

_SUMMED, _DIFFER, _FAILED = 0.0, 1.0, 2.0
_WHAT = "the choice of nodes"


@final
class NodesTransport(AbstractTransport):
    """The ranks of several hosts.

    Args:
        host: all ranks, over gloo. It serves what is rare.
        inside: the ranks of this host.
        between: on the first rank of every host these ranks; on the others, those others, who only close it.
        first: whether this is the first rank of its host.
        unused: the group of a rank that is alone on its host. It stays open, since all ranks must have as many groups.
    """

    name = "torch"

    def __init__(
        self,
        host: TorchTransport,
        inside: AbstractTransport,
        between: TorchTransport,
        *,
        first: bool,
        unused: AbstractTransport | None = None,
    ) -> None:
        self.host, self.inside, self.between, self._first, self._unused = host, inside, between, first, unused
        self.rank, self.size, self.ranks = host.rank, host.size, host.ranks
        self.group_id, self.spec = host.group_id, host.spec

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``. A host whose ranks are in different calls tells the other hosts."""
        numbers = moments.ABSTAINS if self.current is None else self.current.numbers
        error: MismatchError | None = None
        verdict = torch.zeros(1, dtype=torch.float64, device="cpu")
        self.inside.current = self.current  # for the texts of its errors
        try:
            try:
                self.inside.all_reduce(wire)
            except MismatchError as mismatch:
                error = mismatch
            if self._first:
                try:
                    self.between.sum_of_call(wire, numbers, sound=error is None)
                except MismatchError as mismatch:
                    error = mismatch
                verdict.fill_(_SUMMED if error is None else _FAILED if str(error) else _DIFFER)
            self.inside.current = None  # a copy is no call of its own
            if self.inside.broadcast(verdict).item() != _SUMMED:
                failed = verdict.item() == _FAILED and not str(error or "")
                raise MismatchError(
                    "gloo failed on the first rank of this host" if failed else str(error or "")
                ) from error
            self.inside.broadcast(wire)
        finally:
            self.inside.current = None
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self.host.exchange_notes(note)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        return self.host.broadcast(tensor, root)

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        made = self.host.split(color)
        assert isinstance(made, TorchTransport)
        return by_nodes(made, "auto")

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        self.host.barrier()

    def close(self) -> None:
        """See ``AbstractTransport.close``."""
        for part in (self.between, self._unused or self.inside, self.host):
            part.close()


def by_nodes(host: TorchTransport, override: str) -> AbstractTransport:
    """Connects a group through shared memory on one host, node by node on several; else returns it as it is.

    Args:
        host: the group over gloo.
        override: as ``SYNCBN_TRANSPORT`` says. The same on every rank.

    Communication:
        That of ``on_one_host``; on several hosts one more all-reduce of 2 W + 7 float64 values, a group for each
        host and one of their first ranks.
    """
    made = on_one_host(host, override)
    if made is not host or host.size == 1 or override != "auto":
        return made
    # torch names a group of some ranks by the number of groups that a process has: see torch_dist.group_of
    row = torch.tensor([float(processes.own().host), float(groups_known())], dtype=torch.float64, device="cpu")
    homes, known = gather.gather(row, host, _WHAT).T.tolist()
    hosts = list(dict.fromkeys(homes))
    if len(hosts) in (1, host.size) or len(hosts) > MOST_RANKS or len(set(known)) > 1 or not host.is_direct:
        return host
    home = homes[host.rank]
    inside, first = host.split(hosts.index(home)), homes.index(home) == host.rank
    between = host.split(int(first))
    assert isinstance(between, TorchTransport)
    alone = SingleTransport(host.ranks[host.rank]) if inside.size == 1 else None
    if alone is not None:
        return NodesTransport(host, alone, between, first=first, unused=inside)
    return NodesTransport(host, on_one_host(inside, override), between, first=first)
