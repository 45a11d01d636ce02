# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu.plot bench.json picture.svg`: draws what `python -m benchmarks.gpu` has measured.

Left, torch's time over ours at 2 images, eager and as a CUDA graph. Right, the share of the copy's bandwidth at large
shapes. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.methods import OURS
from benchmarks.gpu.targets import LARGE, TWO_IMAGES

COLOURS = {"float32": "#4269d0", "bfloat16": "#efb118", "float16": "#ff725c"}
MARKS = {"contiguous": "o", "channels_last": "s"}
LEAST = 16
"""Megabytes of x from which bandwidth is drawn: smaller ones are bound by launches."""
TICKS = (32, 64, 128, 256, 512)


def draw(document: dict[str, Any], path: Path) -> None:
    """Draws the rows of a JSON document of the benchmark into an SVG, PNG or PDF file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "syncbn", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    ratios, bandwidth = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = [row for row in document["rows"] if row["method"] in OURS]
    ratios_at_2_images(ratios, [row for row in rows if tuple(row["shape"]) in TWO_IMAGES])
    bandwidth_of_large(bandwidth, rows)
    machine = document["machine"]
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}, CuPy {machine['cupy']}: a training step")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def ratios_at_2_images(axes: Any, rows: list[dict[str, Any]]) -> None:
    groups = [(kind, method) for kind in ("eager_ratio", "graph_ratio") for method in OURS]
    for i, (kind, method) in enumerate(groups):
        mine = [row for row in rows if row["method"] == method and row[kind] is not None]
        for j, row in enumerate(mine):
            shift = 0.7 * (j / max(1, len(mine) - 1) - 0.5)
            axes.plot(i + shift, row[kind], MARKS[row["layout"]], ms=4, color=COLOURS[row["dtype"]], alpha=0.8)
    for i, target in enumerate((3.0, 3.0, 1.5, 1.5)):
        axes.plot([i - 0.45, i + 0.45], [target, target], color="black", lw=1)
    names = [
        f"{'eager' if kind == 'eager_ratio' else 'CUDA graph'}\n{method.split(', ')[1]}" for kind, method in groups
    ]
    axes.set_xticks(range(len(groups)), names)
    axes.axhline(1, color="grey", lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time of torch.nn.SyncBatchNorm / ours")
    axes.set_title("2 images of a ResNet-50 (line: target)")


def bandwidth_of_large(axes: Any, rows: list[dict[str, Any]]) -> None:
    seen = set()
    for row in rows:
        size = math.prod(row["shape"]) * row["itemsize"] / 1e6
        if row["of_copy"] is None or size < LEAST or row["method"] != rows[-1]["method"]:
            continue
        kind = row["dtype"], row["layout"]
        label = None if kind in seen else f"{kind[0]}, {kind[1]}"
        seen.add(kind)
        axes.plot(size, row["of_copy"], MARKS[kind[1]], ms=5, color=COLOURS[kind[0]], alpha=0.8, label=label)
    axes.plot([LARGE / 1e6, 700], [0.85, 0.85], color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, map(str, TICKS))
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("megabytes of x")
    axes.set_ylabel("share of the copy's bandwidth")
    axes.set_title("what must move, over the time of a replay")
    axes.legend(fontsize=8, loc="lower right")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; 1 if a file cannot be read or written, or matplotlib is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.plot", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("document", type=Path, help="the JSON of python -m benchmarks.gpu --output")
    parser.add_argument("picture", type=Path, help="an SVG, PNG or PDF file to write")
    args = parser.parse_args(argv)
    try:
        draw(json.loads(args.document.read_text(encoding="utf-8")), args.picture)
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(
            f"benchmarks.gpu.plot: it needs the benchmark's JSON and matplotlib; received {error!r}.", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
