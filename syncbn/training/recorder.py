# SPDX-License-Identifier: BSD-3-Clause
"""A transport that records the moments of every input of a layer, merged without cancellation.

C channels, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from syncbn import moments, transports
from syncbn.calls import keys
from syncbn.calls.sites import Site, agree_once, site_of
from syncbn.layer import SyncBatchNorm
from syncbn.moments import Message
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.wrapper import AbstractWrapper


@final
class Recorder(AbstractWrapper):
    """Wraps a layer's transport and keeps the moments of what its rank sends.

    count = count_a + count_b;  delta = mean_b - mean_a
    mean = mean_a + delta * count_b / count;  m2 = m2_a + m2_b + delta^2 * count_a * count_b / count

    Args:
        inner: the layer's transport.
        C: the number of channels of the layer.
        label: a name that no other recorder has.
        device: the device of the wires.

    Source:
        Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances
        (STAN-CS-79-773).
    """

    name = "recorder"

    def __init__(self, inner: AbstractTransport, C: int, label: str, device: torch.device) -> None:
        super().__init__(inner)
        self.C, self.spec = C, GroupSpec(self.name, inner.ranks, label)
        self.counts = True
        """Whether the local batch is part of the data. If not, the rank joins without samples."""
        self.calls = 0
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(C, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(C, dtype=torch.float64, device=device)

    def reduce(self, wire: Tensor, message: Message) -> Tensor:
        """Merges a forward wire into the moments, then sums it over the ranks."""
        if wire.numel() == moments.wire_length(self.C):
            if not self.counts:
                moments.count(wire).zero_()
                moments.sums(wire).zero_()
            self._merge(wire)
        return self.inner.reduce(wire, message)

    def _merge(self, wire: Tensor) -> None:
        count_b = moments.count(wire).clone()
        mean_b, var_b, _ = moments.finalize(wire, 1.0)
        count = self.count + count_b
        share = count_b / count.clamp(min=1.0)
        delta = mean_b - self.mean
        self.m2 = self.m2 + var_b * count_b + delta.square() * (self.count * share)
        self.mean = self.mean + delta * share
        self.count, self.calls = count, self.calls + 1


@contextmanager
def recording(layers: list[SyncBatchNorm]) -> Iterator[list[Recorder]]:
    """Makes layers normalise as in training and record the moments of their inputs, without moving statistics."""
    recorders: list[Recorder] = []
    before = [(layer, layer.training, layer.track_running_stats) for layer in layers]
    entered: list[Site] = []
    try:
        for i, layer in enumerate(layers):
            assert layer.running_mean is not None
            device = layer.running_mean.device
            transport = transports.choose(layer.process_group, device.type)
            agree_once(site_of(layer), layer.settings(), transport)
            recorders.append(Recorder(transport, layer.num_features, str(i), device))
            site_of(layer).enter(transports.adopt(recorders[-1], device.type))
            entered.append(site_of(layer))
            layer.training, layer.track_running_stats = True, False  # this turns renormalization off, too
        yield recorders
    finally:
        for recorder in recorders:
            transports.discard(recorder, recorder.mean.device.type)
            keys.forget(recorder)
        for site in entered:
            site.leave()
        for layer, training, tracks in before:
            layer.training, layer.track_running_stats = training, tracks


def merge_ranks(recorders: list[Recorder], world: AbstractTransport, device: torch.device) -> None:
    """Merges the moments of every recorder over the ranks.

    mean = sum_W(count * mean) / sum_W(count);  m2 = sum_W(m2 + count * (mean_of_the_rank - mean)^2)

    Communication:
        Two all-reduces, of C + 1 and of C values for each recorder.
    """
    sums = torch.cat([torch.cat((r.count.view(1), r.count * r.mean)).to(device) for r in recorders])
    world.all_reduce(sums)
    parts = torch.split(sums, [r.C + 1 for r in recorders])
    spread = []
    for recorder, part in zip(recorders, parts, strict=True):
        count, sum_x = torch.split(part.to(recorder.mean.device), [1, recorder.C])
        mean = sum_x / count.clamp(min=1.0)
        spread.append((recorder.m2 + recorder.count * (recorder.mean - mean).square()).to(device))
        recorder.count, recorder.mean = count, mean
    total = world.all_reduce(torch.cat(spread))
    for recorder, m2 in zip(recorders, torch.split(total, [r.C for r in recorders]), strict=True):
        recorder.m2 = m2.to(recorder.mean.device)
