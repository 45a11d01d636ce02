# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.pictures`: draws the pictures of the documentation, all or those that are named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pictures import bench, data_flow, digits, gpu, masks, small_batch, svg, transports, variance

ROOT = Path(__file__).parents[2]
PICTURES: dict[str, Callable[[str], svg.Canvas]] = {
    "data_flow": data_flow.draw,
    "small_batch": small_batch.draw,
    "variance": variance.draw,
    "digits": digits.draw,
    "segmentation": masks.draw,
    "bench": bench.of_torch,
    "bench_baseline": bench.of_baseline,
    "gpu": gpu.draw,
    "transports": transports.of_sums,
    "transports_step": transports.of_steps,
}
COMMANDS = {
    "digits": "NPROC=4 launch/mpirun.sh examples/digits.py --json",
    "segmentation": "NPROC=2 launch/mpirun.sh benchmarks/pictures/segment.py",
    "bench-mpirun": "NPROC=2 launch/mpirun.sh -m syncbn bench --json",
    "bench-mpirun-channels_last": "NPROC=2 launch/mpirun.sh -m syncbn bench --json --channels-last",
    "bench-torchrun": "NPROC=2 launch/torchrun.sh -m syncbn bench --json",
    "bench-torchrun-channels_last": "NPROC=2 launch/torchrun.sh -m syncbn bench --json --channels-last",
    "transports-2": "NPROC=2 launch/mpirun.sh benchmarks/transports.py --json",
    "transports-4": "NPROC=4 launch/mpirun.sh benchmarks/transports.py --json",
}
"""What each file in results/ is the output of."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draws. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description="Draw pictures of the docs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures", help="folder (docs/pictures)")
    parser.add_argument("--commands", action="store_true", help="print the commands that measure, and draw nothing")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in PICTURES]:
        parser.error(f"no picture {', '.join(unknown)}; choose from {', '.join(PICTURES)}")
    if args.commands:
        print("\n".join(f"{line} > benchmarks/pictures/results/{name}.json" for name, line in COMMANDS.items()))
        return 0
    for name in args.names or PICTURES:
        for path in svg.write(args.output, name, PICTURES[name]):
            print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
