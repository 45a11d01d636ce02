# SPDX-License-Identifier: BSD-3-Clause
"""An all-reduce and a training step over each transport, from what `benchmarks/transports.py --json` prints."""

from __future__ import annotations

from benchmarks.pictures import results
from benchmarks.pictures.svg import SMALL, WIDTH, Canvas, Scale

RANKS = (2, 4)
NAMES = {"shm": ("shared memory", "blue"), "mpi": ("MPI", "green"), "torch": ("gloo", "orange")}
SUMS = {"129 doubles": "1 kB", "513 doubles": "4 kB", "4105 doubles": "33 kB"}
STEPS = {"digits in DDP, a step": "digits in DDP", "53 layers of a ResNet-50": "53 layers"}
LEFT, BAR = 92, 15


def of_sums(theme: str) -> Canvas:
    """Draws microseconds of an all-reduce on a logarithmic scale, by ranks and length."""
    title = "Microseconds of one all-reduce over shared memory, MPI and gloo, for 1, 4 and 33 kB and 2 and 4 ranks."
    return _draw(theme, title, "microseconds of one all-reduce, as a layer makes two of; logarithmic", SUMS, log=True)


def of_steps(theme: str) -> Canvas:
    """Draws milliseconds of a training step, by ranks."""
    title = (
        "Milliseconds of a training step over shared memory, MPI and gloo: a small network in DDP, and 53 batch norms."
    )
    return _draw(theme, title, "milliseconds of a training step", STEPS, log=False)


def _draw(theme: str, title: str, words: str, cases: dict[str, str], *, log: bool) -> Canvas:
    unit = 1.0 if log else 1e3
    measured = {ranks: results.read(f"transports-{ranks}")["us"] for ranks in RANKS}
    most = max(us for rows in measured.values() for case in cases for us in rows[case].values()) / unit
    group = len(NAMES) * BAR + 10
    canvas = Canvas(48 + len(RANKS) * (28 + group * len(cases)), theme, title)
    canvas.text(2, 14, words, size=SMALL, colour="muted")
    canvas.legend(
        LEFT, 38, [(name, colour, room) for (name, colour), room in zip(NAMES.values(), (130, 66, 60), strict=True)]
    )
    top = 48
    for ranks in RANKS:
        canvas.text(2, top + 18, f"{ranks} ranks", bold=True)
        top += 28
        for case, label in cases.items():
            scale = Scale(1, most, LEFT + 20, WIDTH - 62, log=True) if log else Scale(0, most, LEFT, WIDTH - 62)
            canvas.text(LEFT - 8, top + len(NAMES) * BAR / 2 + 4, label, size=SMALL, anchor="end")
            for k, (transport, (_, colour)) in enumerate(NAMES.items()):
                value = measured[ranks][case][transport] / unit
                canvas.box(LEFT, top + BAR * k, max(scale(value) - LEFT, 1), BAR - 2, colour)
                number = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                canvas.text(max(scale(value), LEFT) + 5, top + BAR * k + 11, number, size=12)
            top += group
    return canvas
