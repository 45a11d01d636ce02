# SPDX-License-Identifier: BSD-3-Clause
"""Whether an all-reduce takes what its transport takes on this layout, and what makes it slow if not.

W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from syncbn.transports.direct import MOST_RANKS

FAR = 5.0
"""Times the expected time from which on an all-reduce is slow."""
BUSY = 0.2
"""The part of its time for which a rank may wait for a core; from there on other programs make it slow."""
AS_EXPECTED, ABOVE, SLOW = "as expected", "above the usual", "slow"


@dataclass(frozen=True)
class Layout:
    """Where the ranks are, as far as it decides how long a sum takes."""

    transport: str
    device: str
    ranks: int
    hosts: int = 1
    crowded: str = ""
    """Which host has more processes than cores, if one has."""
    threads: str = ""
    """Which host has more threads than cores, if one has."""
    waiting: float | None = None
    """The part of the measured time for which a rank waited for a core, on the worst rank."""
    delay_us: float = 0.0
    """The longest one-way delay from host to host; 0 if it was not measured."""
    no_memory: str = ""
    """Why the ranks of one host do not use shared memory."""


@dataclass(frozen=True)
class Verdict:
    """What was measured against what is usual. ``problem`` and ``warning`` hold cause and remedy, or nothing."""

    status: str = "not judged"
    """as expected, above the usual, slow or not judged."""
    measured_us: float = 0.0
    expected_us: float = 0.0
    """What this transport takes at most on such a layout, with a core for each rank."""
    text: str = "not judged"
    warning: tuple[str, str] | None = None
    problem: tuple[str, str] | None = None


def judge(measured_us: float, layout: Layout) -> Verdict:
    """Compares a measured latency of the smallest wire with the usual one."""
    if layout.ranks == 1:
        return Verdict(text="not judged: one process has nothing to send")
    expected, way = usual(layout)
    usually = f"{way} takes up to {shown(expected)} with a core for each rank"
    if measured_us <= FAR * expected:
        status = AS_EXPECTED if measured_us <= expected else ABOVE
        hints = [f"{status}: {usually}", *_hints(layout, above=status == ABOVE)]
        return Verdict(status, measured_us, expected, "; ".join(hints))
    what = f"an all-reduce takes {shown(measured_us)}, and {usually}"
    if layout.crowded or (layout.waiting is None and layout.threads) or (layout.waiting or 0.0) > BUSY:
        why, remedy = _of_cores(layout)
        return Verdict(SLOW, measured_us, expected, f"{SLOW}: {usually}; {why}", warning=(f"{what}: {why}", remedy))
    text = f"{SLOW}: {usually}; see the problems"
    return Verdict(SLOW, measured_us, expected, text, problem=(what, _remedy(layout)))


def _hints(layout: Layout, *, above: bool) -> list[str]:
    """Says what keeps a latency above what it could be, if that is known."""
    if layout.crowded:
        return [f"{layout.crowded}, so ranks take turns"]
    if above and (layout.waiting or 0.0) > BUSY:
        return [_of_cores(layout)[0]]
    if layout.transport == "torch" and layout.hosts == 1 and layout.no_memory:
        return [f"shared memory, at a few us, is not used: {layout.no_memory}"]
    return []


def usual(layout: Layout) -> tuple[float, str]:
    """Returns the longest usual latency in us, and the way that the sum goes. Measured on several machines."""
    W, steps = layout.ranks, math.ceil(math.log2(layout.ranks))
    if layout.transport == "shm":
        return 10.0 + W, "shared memory"
    if layout.device == "cuda" and layout.transport != "nccl" and layout.hosts == 1:
        return (300.0 + 50.0 * steps, "MPI through host memory") if layout.transport == "mpi" else _over_gloo(W)
    if layout.hosts == 1:
        own = {"mpi": (20.0 + 10.0 * steps, "MPI on one host"), "nccl": (150.0, "NCCL on one host")}
        return own.get(layout.transport, _over_gloo(W))
    measured = f"{shown(layout.delay_us)} from host to host" if layout.delay_us else "a network of 100 us"
    delay = layout.delay_us or 100.0
    if layout.transport == "torch":
        hops = 1 if layout.device == "cpu" and W <= MOST_RANKS else 4 * (W - 1)
        return 1000.0 + hops * delay, f"gloo over {measured}"
    name = {"mpi": "MPI", "nccl": "NCCL"}.get(layout.transport, layout.transport)
    return 200.0 + 2 * steps * delay, f"{name} over {measured}"


def _over_gloo(W: int) -> tuple[float, str]:
    return 600.0 + 200.0 * W, "gloo on one host"


def _of_cores(layout: Layout) -> tuple[str, str]:
    """Says why ranks wait for cores. That is no fault of the transport."""
    if layout.crowded:
        remedy = "Start at most one process a core for speed. Results are the same: for a test, nothing is wrong."
        return f"{layout.crowded}, so ranks take turns", remedy
    if layout.threads:
        return f"{layout.threads}, so ranks wait for cores", "Set OMP_NUM_THREADS to cores / processes of a host."
    why = f"a rank waited for a core for {100 * (layout.waiting or 0.0):.0f} % of the time"
    return f"{why}, since other programs use the cores", "`top` shows which; run the doctor again without them."


def _remedy(layout: Layout) -> str:
    """Says where to look if every rank has a core."""
    if layout.hosts > 1:
        return (
            "Look which network is used: the table of hosts names an interface; GLOO_SOCKET_IFNAME (gloo), "
            "NCCL_SOCKET_IFNAME (NCCL) or OMPI_MCA_btl_tcp_if_include (Open MPI) names another. `ping` shows its delay."
        )
    if layout.transport == "torch" and layout.device == "cpu" and layout.no_memory:
        return f"Shared memory takes a few us, and is not used: {layout.no_memory}. MPI takes some tens of us."
    other = "mpi" if layout.transport == "shm" else "shm"
    return (
        "Look for a limit of the container (cpu.max), for several ranks bound to one core (mpirun --report-bindings) "
        f"and for cores that save power. Another transport tells whether it is this one: SYNCBN_TRANSPORT={other}."
    )


def shown(us: float) -> str:
    """Returns a time as a short text."""
    if us < 1000:
        return f"{us:.1f} us" if us < 10 else f"{us:.0f} us"
    return f"{us / 1000:.1f} ms" if us < 10_000 else f"{us / 1000:.0f} ms"
