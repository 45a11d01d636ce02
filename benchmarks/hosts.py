# SPDX-License-Identifier: BSD-3-Clause
"""Times sums over several hosts, made of network namespaces on this machine, with a delay and a rate between them.

    $ python benchmarks/hosts.py --hosts 2 4 --ranks 8
    $ python benchmarks/hosts.py --hosts 2 --ways direct nodes --shapes 1000:1000 --json

Needs root, iproute2, gcc and /dev/net/tun, see ``tests/hosts``. The ways: gloo's all-reduce, the direct exchange over
gloo, node by node (shared memory inside each host, the exchange between the first ranks), and Open MPI with some
algorithms of its own. Milliseconds of one sum, in the best of four series of up to 20.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.hosts import jobs, network

SHAPES = [f"{delay}:{mbit}" for mbit in (1000, 100) for delay in (0, 1000, 20000)]
MPI = {"mpi": "", "mpi 3 recursive doubling": "3", "mpi 4 ring": "4", "mpi 6 Rabenseifner": "6"}
TORCH = ["gloo", "direct", "nodes"]
PROGRAM = Path(__file__).parent / "hosts_program.py"


def job(hosts, way, per_host, words, **environ):
    """Runs the program on the hosts and returns its rows."""
    jobs.PROGRAM = PROGRAM
    made = jobs.Job(hosts, way, per_host, hosts.folder / "hosts/wire.ctl", *words, **environ)
    statuses = made.statuses(limit=280)
    hosts.clear()
    rows = [json.loads(line) for line in made.out.splitlines() if line.startswith("{")]
    if any(statuses):
        print(f"{way} {environ}: {statuses}\n{made.err[-3000:]}", file=sys.stderr)
    return rows


def measure(n, options):
    """All rows for a number of hosts."""
    per_host, rows = options.ranks // n, []
    with tempfile.TemporaryDirectory() as folder:
        hosts = network.Hosts(n, Path(folder), "wire")
        try:
            torch_ways = [way for way in options.ways if way in TORCH]
            if torch_ways:
                rows += job(hosts, "plain", per_host, [*options.shapes, *torch_ways], SYNCBN_TRANSPORT="auto")
            for way in options.ways:
                if way in MPI:
                    chosen = {
                        "OMPI_MCA_coll_tuned_use_dynamic_rules": 1,
                        "OMPI_MCA_coll_tuned_allreduce_algorithm": MPI[way],
                    }
                    environ = {"LABEL": way.replace(" ", "_"), **(chosen if MPI[way] else {})}
                    rows += job(hosts, "mpirun", per_host, [*options.shapes, "mpi"], **environ)
        finally:
            hosts.close()
    return [{"hosts": n, "ranks": options.ranks, **row} for row in rows]


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ranks", type=int, default=8, help="of all hosts together")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="DELAY_US:MBIT, one way between two hosts")
    parser.add_argument("--ways", nargs="+", default=[*TORCH, *MPI], choices=[*TORCH, *MPI])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for n in options.hosts for row in measure(n, options)]
    if options.json:
        print("\n".join(map(json.dumps, rows)))
        return
    cases = list(dict.fromkeys((r["hosts"], r["mbit"], r["delay_ms"], r["doubles"]) for r in rows))
    ways = list(dict.fromkeys(r["way"] for r in rows))
    found = {(r["hosts"], r["mbit"], r["delay_ms"], r["doubles"], r["way"]): r["ms"] for r in rows}
    table = [[*case, *(f"{found[*case, way]:.2f}" if (*case, way) in found else "" for way in ways)] for case in cases]
    print(tabulate(table, ["hosts", "Mbit/s", "delay ms", "doubles", *ways], disable_numparse=True))


if __name__ == "__main__":
    main()
