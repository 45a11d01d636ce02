# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of docs/clusters/scale.md, each for light and for dark pages. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pictures import svg
from benchmarks.scale.results import THRESHOLD, Results
from benchmarks.scale.tables import TITLES

COLOURS = {
    "syncbn, node by node": "#4c7df0",
    "syncbn, recursive doubling": "#6cc5b0",
    "torch, ring": "#ff725c",
    "torch, best": "#efb118",
}
GROUP_COLOURS = ("#6cc5b0", "#4c7df0", "#efb118", "#ff725c")
THEMES = {"light": ("#222222", "#cccccc"), "dark": ("#e2e4e9", "#4a4e58")}
"""Text and lines of the grid. The ground is transparent."""
WIDTH = 5.6
"""Inches, so that text of 10 points can be read on a phone."""


def draw(results: Results, folder: Path, step_ms: float, form: str = "svg") -> Iterator[Path]:
    """Draws scale_exchange and scale_waiting into a folder, for both themes, and returns the files.

    Args:
        results: of a run, or read from its files.
        folder: where to write.
        step_ms: a step's other work.
        form: svg, or png to look at.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for theme, (text, grid) in THEMES.items():
        style = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), text),
            **{"grid.color": grid, "legend.edgecolor": grid, "font.size": 10, "axes.grid": True, "grid.linewidth": 0.6},
            **{"svg.hashsalt": "syncbn", "svg.fonttype": "none", "axes.titlesize": 10, "legend.fontsize": 9},
        }
        with matplotlib.rc_context(style):
            for name, height, fill in (("exchange", 8.4, of_exchange), ("waiting", 6.6, of_waiting)):
                figure = Figure(figsize=(WIDTH, height), layout="constrained")
                fill(figure, results, step_ms)
                path = folder / f"scale_{name}-{theme}.{form}"
                figure.savefig(path, metadata={"Date": None} if form == "svg" else None)
                if form == "svg":
                    path.write_text(svg.shrunk(path.read_text(encoding="utf-8")), encoding="utf-8")
                yield path


def of_exchange(figure: Any, results: Results, step_ms: float) -> None:
    """Milliseconds of a step's exchange over the ranks, a panel for each platform."""
    panels = figure.subplots(len(results.platforms()), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, platform in zip(panels, results.platforms(), strict=True):
        for column, colour in COLOURS.items():
            ms = [results.ms(platform, ranks, column) for ranks in results.ranks()]
            axes.plot(results.ranks(), ms, "o-", ms=3, color=colour, label=column)
        axes.axhline(THRESHOLD * step_ms, lw=1, ls=":", color="grey")
        axes.set_yscale("log")
        axes.set_title(TITLES[platform])
        _over_ranks(axes, results.ranks(), named=axes is panels[-1])
    panels[len(panels) // 2].set_ylabel("ms a step in the exchange, simulated")
    line = f"\ndotted: {100 * THRESHOLD:.0f} % of {step_ms:g} ms"
    panels[0].legend(title="53 batch norms of ResNet-50" + line, title_fontsize=9, loc="upper left")


def of_waiting(figure: Any, results: Results, step_ms: float) -> None:
    """Above what waiting adds, by size of group; below what groups of 8 save, by platform."""
    added, saved = figure.subplots(2, 1)
    noise = next(iter(results.waiting))[0]
    rows = {ranks: row for (name, ranks), row in results.waiting.items() if name == noise}
    for group, colour in zip((1, 8, 64, None), GROUP_COLOURS, strict=True):
        points = [(n, 100 * row[group or n]) for n, row in rows.items() if (group or n) in row]
        label = {1: "once a step", None: "all ranks, after each piece"}.get(group, f"groups of {group}")
        added.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=label)
    added.set_title(f"waiting for the slowest: noise of {noise}")
    added.set_ylabel("% added to a step, drawn")
    for platform, colour in zip(results.platforms(), GROUP_COLOURS, strict=False):
        larger = [n for n in rows if n > 8]
        share = [100 * results.saved(platform, noise, n, 8, step_ms) for n in larger]
        saved.plot(larger, share, "o-", ms=3, color=colour, label=TITLES[platform])
    saved.axhline(100 * THRESHOLD, lw=1, ls=":", color="grey")
    saved.set_title(f"what groups of 8 save of a step of {step_ms:g} ms")
    saved.set_ylabel("% of a step, sending and waiting")
    for axes in (added, saved):
        axes.set_ylim(bottom=0)
        axes.legend()
        _over_ranks(axes, list(rows))


def _over_ranks(axes: Any, ranks: list[int], *, named: bool = True) -> None:
    shown = ranks if len(ranks) < 7 else ranks[::2] if len(ranks) % 2 else ranks[1::2]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{n:,}" for n in shown])
    axes.minorticks_off()
    if named:
        axes.set_xlabel("ranks")
