# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.scale`: builds the simulation, runs it, and writes CSV files, tables and pictures."""

from __future__ import annotations

import argparse
import platform
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from tqdm import tqdm

from benchmarks.scale import plot, results, simulate, tables, waiting, wires
from benchmarks.scale.results import Check, Results
from syncbn.cli.arguments import at_least

CHECKED = 128
"""The most ranks on which the shortcuts are checked."""
SEEDS = 4


def run(program: Path, found: Results, options: argparse.Namespace) -> None:
    """Simulates what the results lack and draws the waiting, with a bar on standard error."""
    ranks, checked = options.ranks, min(options.ranks, CHECKED)
    known = {(platform, n, algorithm) for platform, n, _, algorithm in found.exchange}
    jobs = [job for job in simulate.jobs(ranks, options.platforms) if astuple(job) not in known]
    counts = [n for n in simulate.RANKS if n <= ranks]
    draws = len(waiting.noises(wires.collectives())) * len(counts)
    with tqdm(total=len(jobs) + draws + 1, unit="job", file=sys.stderr) as bar:
        with ThreadPoolExecutor(options.jobs) as pool:
            for job, rows in zip(jobs, pool.map(lambda job: job.run(program), jobs), strict=True):
                for message, row in rows.items():
                    found.exchange[job.platform, job.ranks, message, job.algorithm] = row
                results.write(found, options.output)  # --extend goes on from here
                bar.set_postfix_str(f"{job.algorithm}, {job.ranks} ranks, {job.platform}", refresh=False)
                bar.update()
        bar.set_postfix_str("waiting")
        for noise, n, row in waiting.table(counts, wires.collectives(), options.samples):
            found.waiting[noise, n] = row
            bar.update()
        bar.set_postfix_str("checks")
        found.checks = [*_of_layers(program, found, checked), *_of_rings(program, found), *_of_waiting(program, found)]
        bar.update()


def _of_layers(program: Path, found: Results, ranks: int) -> list[Check]:
    """Each width timed alone, times its layers, beside a step that does all its all-reduces one after the other."""
    rows = []
    for name in found.platforms():
        for kind, column in (("sum_doubling", "syncbn, recursive doubling"), ("sum_nodes", "syncbn, node by node")):
            whole = simulate.whole_step(program, name, ranks, kind) / 1e3
            rows.append(Check(f"layers added up, {kind}", name, ranks, "ms", found.ms(name, ranks, column), whole))
    return rows


def _of_rings(program: Path, found: Results) -> list[Check]:
    """Some rounds of a ring, scaled, beside all of them."""
    ranks = simulate.WHOLE_RINGS
    lengths = {C: wires.message_bytes(wires.GATHERED, C) for C in wires.widths()}
    rows = []
    for name in found.platforms() if max(found.ranks()) > ranks else []:
        words = ["time", "gather_ring", simulate.PER_NODE, simulate.ROUNDS, *lengths.values()]
        lines = map(float, simulate.replay(program, name, ranks, words))
        us = dict(zip(lengths, lines, strict=True))
        whole = found.exchange[name, ranks, wires.GATHERED, "gather_ring"]
        scaled, all_rounds = (sum(layers * row[C] for C, layers in wires.widths().items()) / 1e3 for row in (us, whole))
        scaled *= (ranks - 1) / simulate.ROUNDS
        rows.append(Check(f"{simulate.ROUNDS} rounds of a ring", name, ranks, "ms", scaled, all_rounds))
    return rows


def _of_waiting(program: Path, found: Results) -> list[Check]:
    """The Monte Carlo beside simulated steps of 100 ms with the same noise."""
    name, noise, sigma, seconds = found.platforms()[0], "5 %, new in each piece", 0.05, 0.1
    rows = []
    for ranks in (n for n in (8, 32, 128) if n <= max(found.ranks())):
        for group in sorted({8, ranks}):
            quiet = simulate.whole_step(program, name, ranks, "sum_doubling", group=group, seconds=seconds)
            noisy = [
                simulate.whole_step(
                    program, name, ranks, "sum_doubling", group=group, seconds=seconds, sigma=sigma, seed=seed
                )
                for seed in range(1, SEEDS + 1)
            ]
            simulated = (sum(noisy) / SEEDS - quiet) / (seconds * 1e6)
            drawn = found.waiting[noise, ranks][group]
            rows.append(Check(f"waiting, groups of {group}", name, ranks, "%", 100 * drawn, 100 * simulated))
    return rows


def notes(command: Sequence[str]) -> list[str]:
    """Returns how the files were made."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in usage)
    largest = max(each.ru_maxrss for each in usage) / 2**20
    return [
        f"python -m benchmarks.scale {' '.join(command)}".strip(),
        f"{simulate.version()}, {_processor()}: {seconds:.0f} s of CPU, at most {largest:.1f} GiB",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; 1 without SimGrid, matplotlib or the files of --read."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description="Simulate what synchronising costs on many ranks."
    )
    parser.add_argument(
        "--ranks", type=int, choices=simulate.RANKS, default=1024, help="the most (default: %(default)s)"
    )
    parser.add_argument("--platforms", nargs="+", choices=simulate.PLATFORMS, default=simulate.PLATFORMS)
    parser.add_argument(
        "--samples", type=at_least(1), default=200, help="steps drawn on the most ranks (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("out/scale"), help="folder (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="a step's other work (default: %(default)s)")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="simulations at a time (default: %(default)s)")
    parser.add_argument("--extend", action="store_true", help="keep what the CSV files in --output have")
    parser.add_argument("--read", action="store_true", help="simulate nothing: take the CSV files in --output")
    parser.add_argument("--docs", type=Path, help="write pictures/ there, and the tables into clusters/scale.md")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    try:
        if args.read:
            found = results.read(args.output)
        else:
            program = simulate.build(args.output)
            found = results.read(args.output) if args.extend else Results()
            run(program, found, args)
            found.notes += notes(words)
            results.write(found, args.output)
            program.unlink()
        for picture in plot.draw(found, args.docs / "pictures" if args.docs else args.output, args.step_ms):
            print(f"wrote {picture}", file=sys.stderr)
        if args.docs:
            tables.update(args.docs / "clusters" / "scale.md", found, args.step_ms)
    except (simulate.MissingError, ValueError, ImportError, OSError) as error:
        print(f"benchmarks.scale: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(tables.blocks(found, args.step_ms).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
