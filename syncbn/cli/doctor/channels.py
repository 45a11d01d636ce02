# SPDX-License-Identifier: BSD-3-Clause
"""How ranks of a job tell each other short texts before they are connected: through what the launcher has connected."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, final

_PAUSE = 0.05


class AbstractChannel(ABC):
    """Where every rank leaves texts for the others. ``place`` says where, for errors."""

    place: str

    @abstractmethod
    def tell(self, key: str, text: str) -> None:
        """Leaves a text of this rank."""

    @abstractmethod
    def hear(self, key: str, ranks: list[int], limit: float) -> dict[int, str]:
        """Returns the texts of these ranks, without those that did not come within the limit, in seconds."""


@final
class StoreChannel(AbstractChannel):
    """The store at which torch.distributed connects the processes."""

    def __init__(self, store: Any, rank: int, place: str) -> None:
        self.store, self.rank, self.place = store, rank, place

    def tell(self, key: str, text: str) -> None:
        """See ``AbstractChannel.tell``."""
        self.store.set(f"doctor/{key}/{self.rank}", text)

    def hear(self, key: str, ranks: list[int], limit: float) -> dict[int, str]:
        """See ``AbstractChannel.hear``."""
        keys = {rank: f"doctor/{key}/{rank}" for rank in ranks}
        try:
            self.store.wait(list(keys.values()), timedelta(seconds=limit))
        except RuntimeError:  # some are missing
            keys = {rank: each for rank, each in keys.items() if self.store.check([each])}
        return {rank: self.store.get(each).decode() for rank, each in keys.items()}


@final
class NameChannel(AbstractChannel):
    """MPI's names, which Open MPI keeps in its daemons: they work even if its processes do not reach each other."""

    place = "Open MPI's daemons"

    def __init__(self, MPI: Any, rank: int) -> None:
        self.MPI, self.rank = MPI, rank

    def tell(self, key: str, text: str) -> None:
        """See ``AbstractChannel.tell``."""
        self.MPI.Publish_name(f"syncbn/doctor/{key}/{self.rank}", text)

    def hear(self, key: str, ranks: list[int], limit: float) -> dict[int, str]:
        """See ``AbstractChannel.hear``."""
        end, found = time.monotonic() + limit, {}
        left = list(ranks)
        while left:
            try:
                found[left[0]] = self.MPI.Lookup_name(f"syncbn/doctor/{key}/{left[0]}")
                left.pop(0)
            except self.MPI.Exception:  # not yet
                if time.monotonic() > end:
                    left.pop(0)
                time.sleep(_PAUSE)
        return {rank: found[rank] for rank in ranks if rank in found}
