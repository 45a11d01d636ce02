# SPDX-License-Identifier: BSD-3-Clause
"""Whether the sums of a transport are right, and how long they take: for `syncbn doctor`.

C channels, W ranks.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from syncbn import moments
from syncbn.cli.doctor import system
from syncbn.transports import AbstractTransport, gather

CHANNELS = (64, 512, 2048)
LEAST_REPEATS, REPEATS = 5, 200
SECONDS = 1.0
"""The longest time for each C, unless the least number of repeats takes longer."""


class Times(NamedTuple):
    """How long all-reduces took, on the slowest rank of the job."""

    median_us: dict[str, float]
    """By C."""
    waiting: float | None
    """The part of the time for which a rank waited for a core; None where a system does not count it."""


def measure(transport: AbstractTransport, everyone: AbstractTransport, device: torch.device) -> Times:
    """Times the all-reduce of the forward wire for some C.

    Args:
        transport: what is timed.
        everyone: all ranks of the job.
        device: of the wire.
    """
    first = gather.gather(_row([latency(transport, CHANNELS[-1], device, 3)]), everyone).max().item()
    repeats = max(LEAST_REPEATS, min(REPEATS, int(SECONDS * 1e6 / (first + 1))))  # hosts may be far from each other
    waited, began = system.waited_ns(), time.perf_counter_ns()
    medians = [latency(transport, C, device, repeats) for C in CHANNELS]
    end, wall = system.waited_ns(), time.perf_counter_ns() - began
    waiting = -1.0 if end is None or waited is None else (end - waited) / wall
    *slowest, waiting = gather.gather(_row([*medians, waiting]), everyone).amax(0).tolist()
    by_channels = {str(C): round(us, 2) for C, us in zip(CHANNELS, slowest, strict=True)}
    return Times(by_channels, None if waiting < 0 else round(min(waiting, 1.0), 3))


def _row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def sums_are_right(transport: AbstractTransport, device: torch.device) -> bool:
    """Compares one all-reduce with its known answer: (rank + 1) * k sums to W (W + 1) / 2 * k, exactly."""
    k = torch.arange(1, moments.wire_length(CHANNELS[0]) + 1, dtype=torch.float64, device=device)
    total = transport.size * (transport.size + 1) // 2
    return bool((transport.all_reduce(k * (transport.rank + 1)) == k * total).all())


def latency(transport: AbstractTransport, C: int, device: torch.device, repeats: int) -> float:
    """Returns this rank's median microseconds of an all-reduce of the forward wire."""
    wire = torch.zeros(moments.wire_length(C), dtype=torch.float64, device=device)
    times = []
    for _ in range(repeats + repeats // 10):
        start = time.perf_counter_ns()
        transport.all_reduce(wire)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times[repeats // 10 :])
