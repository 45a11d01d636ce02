# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a report: drift by depth, what independent samples have, and the time of collectives."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.training.drift.report import Row

MEASURED, EXPECTED, COST = "#d55e00", "#8a8a8a", "#0072b2"
MEASURED_DARK, COST_DARK = "#ff8c42", "#56b4e9"
NAMED = 40
"""How many layers are named at the axis."""


def require_matplotlib() -> None:
    """Raises unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            'A figure of syncbn.drift needs matplotlib, which is not installed. `pip install "syncbn[examples]"` '
            "brings it; report.to_json() needs nothing."
        )


def draw(rows: Sequence[Row], path: Path, *, ranks: int, dark: bool = False) -> None:
    """Draws mean_drift and var_drift of each layer beside their expected values, and the milliseconds of a call."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which may look for a display
    from matplotlib.ticker import LogLocator, NullFormatter

    ink = "#d8d8d8" if dark else "#333333"
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {**dict.fromkeys(names, ink), "svg.hashsalt": "syncbn", "svg.fonttype": "none", "font.size": 11}
    timed = any(row.seconds is not None for row in rows)
    with rc_context(style):
        height = 6.2 if timed else 4.6
        figure = Figure(figsize=(max(7.0, 1.5 + 0.3 * min(len(rows), NAMED)), height), dpi=100, layout="constrained")
        panels = figure.subplots(2 + timed, 1, sharex=True, height_ratios=[3, 3, 2][: 2 + timed])
        at = range(len(rows))
        for axes, measured, expected, label in (
            (panels[0], "mean_drift", "mean_expected", "of the mean"),
            (panels[1], "var_drift", "var_expected", "of the variance"),
        ):
            colour = MEASURED_DARK if dark else MEASURED
            axes.plot(
                at, [getattr(r, expected) or None for r in rows], "--", color=EXPECTED, label="independent samples"
            )
            axes.plot(at, [getattr(r, measured) or None for r in rows], "o-", color=colour, label="measured")
            axes.set_yscale("log")
            axes.set_ylim(*_limits([value for r in rows for value in (getattr(r, measured), getattr(r, expected))]))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(f"drift {label}")
        if timed:
            seconds = [1e3 * (row.seconds or 0.0) for row in rows]
            panels[2].bar(at, seconds, color=COST_DARK if dark else COST)
            panels[2].set_ylabel("collectives, ms")
        for axes in panels:
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.patch.set_alpha(0.0)
        panels[0].legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
        panels[0].set_title(f"Drift by depth, {ranks} ranks", loc="left", fontsize=12)
        if len(rows) <= NAMED:
            panels[-1].set_xticks(at, [row.name or "(the model)" for row in rows], rotation=60, ha="right", fontsize=9)
        else:
            panels[-1].set_xlabel("batch norm, in the order of the forward")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path, transparent=path.suffix != ".png", metadata={"Date": None} if path.suffix == ".svg" else {}
        )


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    """Returns the limits of a logarithmic axis, at least a decade."""
    known = [value for value in values if value] or [1.0]
    low, high = 0.7 * min(known), 1.4 * max(known)
    room = max(1.0, 10.0 * low / high) ** 0.5
    return low / room, high * room
