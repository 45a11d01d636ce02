# SPDX-License-Identifier: BSD-3-Clause
"""How `syncbn doctor` connects the processes, and what it finds out about the network before that."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import syncbn
from syncbn import transports
from syncbn.cli.doctor import mpi_job, named_hosts, network
from syncbn.cli.doctor.channels import AbstractChannel, NameChannel, StoreChannel
from syncbn.cli.doctor.report import Problem, Report
from syncbn.transports import AbstractTransport, mpi_probe, shared_memory
from syncbn.transports.choices import OVERRIDE
from syncbn.transports.launchers import Launch
from syncbn.transports.mpi_probe import MPIFacts
from syncbn.world import rendezvous


def find_mpi(report: Report, launch: Launch) -> bool:
    """Joins the MPI job if there is one, else examines MPI in another process. False if a job cannot use MPI."""
    report.step = "start MPI"
    if not launch.speaks_mpi:
        report.mpi = mpi_probe.beside() if launch.rank == 0 else MPIFacts()
        return True
    report.mpi = mpi_probe.identify()
    foreign = launch.size > 1 and mpi_job.is_foreign(launch.name, report.mpi)
    if not report.mpi.error and not foreign:
        report.mpi = mpi_probe.join()
    if launch.size in (1, report.mpi.size):
        return True
    found = mpi_job.unusable if report.mpi.error else mpi_job.not_joined
    report.complain(*found(launch, report.mpi))
    return False


def look_at_network(report: Report, launch: Launch, limit: float) -> bool:
    """Reports which addresses the hosts offer and who reaches whom. False if the processes cannot connect."""
    report.step = "connect the processes"
    if launch.local_size == launch.size:
        named = named_hosts.count() if launch.size > 1 else 0
        if named > 1:
            here = f"all {launch.size} ranks are on host {socket.gethostname()}"
            remedy = "With Open MPI, map them by slots: --map-by slot:oversubscribe; see the slots of the hostfile."
            report.warn(f"{here}, of {named} hosts that the launcher knows", remedy)
        return True
    report.network = network.look(launch.rank, launch.size, None, limit, launch.name)
    channel = _channel(report, launch, limit)
    if channel is not None:
        report.network = network.look(launch.rank, launch.size, channel, limit, launch.name)
    report.warnings += [Problem(*each) for each in report.network.warnings]
    report.problems += [Problem(*each) for each in report.network.problems]
    return not report.network.problems


def _channel(report: Report, launch: Launch, limit: float) -> AbstractChannel | None:
    """Returns what connects the ranks already, or can connect them without their own addresses."""
    if not launch.speaks_mpi:
        place = f"rank 0 at {os.environ.get('MASTER_ADDR', 'its address')} port {os.environ.get('MASTER_PORT', '')}"
        return StoreChannel(rendezvous.meet(launch, timedelta(seconds=limit)), launch.rank, place.strip())
    if report.mpi.name != "Open MPI":
        return None
    from mpi4py import MPI

    return NameChannel(MPI, launch.rank)


def connect(report: Report, launch: Launch) -> AbstractTransport | None:
    """Connects all processes, on the CPU, which does not depend on the GPUs that a rank sees."""
    report.step = "connect the processes"
    torch_distributed = True if os.environ.get(OVERRIDE) == "torch" else None
    world = syncbn.init(device="cpu", torch_distributed=torch_distributed)
    report.transport, report.reason, *_ = transports.explain()
    if world.size == launch.size:
        if world.size > 1:
            report.transport = world.transport.name
            report.reason += f"; {_of_shared_memory(world.transport)}"
        return world.transport
    connects = f"the {report.transport} transport connects {world.size}"
    report.complain(
        f"NOT synchronised: {mpi_job.started(launch)}, and {connects}",
        f"Unset {OVERRIDE}, or use the launcher that goes with the transport.",
    )
    return None


def _of_shared_memory(transport: AbstractTransport) -> str:
    if transport.name == "shm":
        return "the ranks share this host's memory"
    if _is_of_nodes(transport):
        return "shared memory inside each host, gloo between their first ranks"
    why = why_not_shared(transport)
    return "shared memory is not asked for" if why.startswith(OVERRIDE) else f"no shared memory: {why}"


def why_not_shared(transport: AbstractTransport) -> str:
    """Says why the ranks of a host do not use shared memory. Empty if they do, or if there is one rank."""
    if transport.size == 1 or transport.name == "shm" or _is_of_nodes(transport):
        return ""
    override = os.environ.get(OVERRIDE, "auto")
    if override != "auto":
        return f"{OVERRIDE}={override}"
    return shared_memory.problem() or "the ranks are on several hosts, or cannot open the same"


def _is_of_nodes(transport: AbstractTransport) -> bool:
    if transport.name != "torch":
        return False
    from syncbn.transports.nodes import NodesTransport

    return isinstance(transport, NodesTransport)
