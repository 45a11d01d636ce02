# SPDX-License-Identifier: BSD-3-Clause
"""What a training in this job has in common with the same steps in one process, agreed by all ranks.

W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.cli.selftest.training import Trained
from syncbn.transports import AbstractTransport, gather

BOUND = 2e-5
"""The largest difference of float32 values of order 1. Rounding makes some 1e-6; another batch makes 1e-2."""
WHATS = ("parameters", "running statistics", "outputs", "between ranks")


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference on any rank."""

    gradients: str
    """Who averaged the gradients."""
    what: str
    difference: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound. NaN is not."""
        return self.difference <= self.bound


def compare(gradients: str, mine: Trained, one: Trained, rows: slice, transport: AbstractTransport) -> list[Row]:
    """Compares a training with that in one process.

    Args:
        gradients: who averaged the gradients.
        mine: of this rank.
        one: of one process.
        rows: this rank's samples in the global batch.
        transport: all ranks.

    Returns:
        A row for each of ``WHATS``, the same on every rank.

    Communication:
        One broadcast of all parameters and statistics, and one all-reduce of 4 W + 7 float64 values.
    """
    outputs = largest([mine.output, mine.evaluated], [one.output[rows], one.evaluated])
    found = [
        largest(mine.parameters, one.parameters),
        largest(mine.statistics, one.statistics),
        outputs,
        _from_first_rank(mine, transport),
    ]
    table = gather.gather(torch.tensor(found, dtype=torch.float64, device="cpu"), transport)
    worst = [column.max().item() for column in table.T]  # of a NaN and others it is NaN
    bounds = (BOUND, BOUND, BOUND, 0.0)
    return [Row(gradients, *each) for each in zip(WHATS, worst, bounds, strict=True)]


def largest(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Returns the largest difference of two lists of tensors; infinity where one is not finite."""
    found = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if a.numel():
            difference = (a.double() - b.double()).abs().max().item()
            found = max(found, difference if difference < torch.inf else torch.inf)
    return found


def _from_first_rank(mine: Trained, transport: AbstractTransport) -> float:
    """Returns by how much this rank's parameters and statistics differ from those of rank 0."""
    own = torch.cat([t.double().reshape(-1) for t in (*mine.parameters, *mine.statistics)])
    return largest([own], [transport.broadcast(own.clone())])
