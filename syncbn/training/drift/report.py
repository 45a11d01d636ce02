# SPDX-License-Identifier: BSD-3-Clause
"""The report of drift(): a row for each layer, what to synchronise, and what is wrong with a rank's data.

C channels, W ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

from tabulate import tabulate

from syncbn.training.drift import noise, ranks_off
from syncbn.training.drift.sums import Sums

HARMLESS = 32
"""Samples per channel from which the noise of independent samples does no harm.

Source: Wu and He 2018 (arXiv 1803.08494), figure 1: the error of batch norm grows where a GPU has fewer images.
"""


class Row(NamedTuple):
    """What was measured at one layer. Equal on all ranks; None where nothing could be measured."""

    name: str
    """Its name in the model, in DistributedDataParallel that of the model inside."""
    kind: str
    """Its class."""
    C: int
    """Its channels."""
    synchronised: bool
    """Whether it normalises by the statistics of several ranks."""
    calls: int
    """How many calls were measured."""
    count_local: float
    """Samples per channel of a rank: the mean over ranks and calls."""
    count_global: float
    """Samples per channel of all ranks: the mean over calls."""
    mean_drift: float
    """Root mean square, over calls, ranks and channels, of (mean_rank - mean_global) / std_global."""
    mean_expected: float
    """What mean_drift is for independent samples: the root of the mean of 1 / count_rank - 1 / count_global."""
    var_drift: float | None
    """Root mean square of log(var_rank / var_global). Both variances are the unbiased ones."""
    var_expected: float | None
    """What var_drift is for independent samples with the tails that they have."""
    steady: float | None
    """The part of mean_drift that is the same at every call: ranks whose data differ. None after one call."""
    count_effective: float
    """Independent samples per channel of a rank that have this mean_drift."""
    running: float
    """How far the ranks' running statistics move an output apart, in standard deviations, before the last call."""
    constant: float
    """Channels that were left out of a call, on average: those with one value, or one that is not finite."""
    excess: float
    """Mean square by which outputs are off, beyond the noise of independent samples, see ``Report.recommend``."""
    seconds: float | None
    """Host time of a call in the layer's collectives, forward and backward, mean over ranks; of synchronised layers."""
    rank_off: int | None
    """The rank whose mean is far outside the others', or None."""

    @property
    def mean_ratio(self) -> float | None:
        """mean_drift / mean_expected."""
        return self.mean_drift / self.mean_expected if self.mean_expected > 0 else None

    @property
    def var_ratio(self) -> float | None:
        """var_drift / var_expected."""
        return None if self.var_drift is None or not self.var_expected else self.var_drift / self.var_expected


class Writer(Protocol):
    """A summary writer, such as torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Writes a number."""


@final
class Report:
    """What ``syncbn.drift`` has measured so far. It holds numbers only, and can be pickled.

    ``print`` shows a table on rank 0 and nothing on the others; ``table`` returns it on every rank.

    Args:
        rank: of this process among the measured ranks.
        ranks: the measured ranks, as numbered in the job.
    """

    def __init__(self, rank: int, ranks: tuple[int, ...]) -> None:
        self._rank, self._ranks = rank, ranks
        self.sums: dict[str, Sums] = {}
        """By layer, in the order of their first calls."""

    @property
    def rows(self) -> list[Row]:
        """A row for each layer that was called in training mode, in the order of the first calls."""
        return [_row(sums, self._ranks) for sums in self.sums.values() if sums.calls]

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the data of ranks: one that is far from the others, or ranks that differ at every step."""
        return ranks_off.warnings(self.rows)

    def recommend(self, share: float = 0.9) -> list[str]:
        """Returns the fewest layers that hold ``share`` of the excess drift, as ``only=`` of a conversion takes them.

        The excess of a layer is mean_drift^2 + (var_drift / 2)^2, the mean square by which its output is off, minus the
        same of the expected values, term by term and not below 0. If a rank has fewer than 32 samples per channel, the
        noise of 32 is subtracted instead: that of fewer does harm.

        Args:
            share: above 0, at most 1.

        Returns:
            Their names, largest excess first; none if no layer drifts more than independent samples do.

        Communication:
            None.
        """
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"recommend needs a share above 0 and at most 1; received {share!r}. 0.9 is usual.")
        rows = sorted((row for row in self.rows if row.excess > 0), key=lambda row: -row.excess)
        wanted, names, held = share * math.fsum(row.excess for row in rows), [], 0.0
        for row in rows:
            if held >= wanted * (1.0 - 1e-12):
                break
            names.append(row.name)
            held += row.excess
        return names

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns the rows as dictionaries."""
        return [row._asdict() for row in self.rows]

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns ranks, rows and warnings as one JSON document. With a path, rank 0 writes it there, too."""
        text = json.dumps({"ranks": self._ranks, "rows": self.to_dicts(), "warnings": self.warnings}, indent=2)
        if path is not None and self._rank == 0:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def write(self, writer: Writer | None, step: int | None = None) -> None:
        """Writes the numbers of each layer to a summary writer, on rank 0. Others may pass None.

        Args:
            writer: what has ``add_scalar(tag, value, step)``.
            step: the step of training.
        """
        if self._rank > 0 or writer is None:
            return
        for row in self.rows:
            for field in ("mean_drift", "mean_expected", "var_drift", "var_expected", "running", "seconds"):
                value = getattr(row, field)
                if value is not None:
                    writer.add_scalar(f"drift/{field}/{row.name or 'model'}", value, step)

    def figure(self, path: str | Path, *, dark: bool = False) -> None:
        """Draws drift by depth, local against expected, with the time of collectives beside it, on rank 0.

        Args:
            path: a name that ends in .png, .svg or .pdf.
            dark: whether to draw for a dark background.

        Raises:
            ModuleNotFoundError: on every rank, if matplotlib is missing.
        """
        from syncbn.training.drift import figure

        figure.require_matplotlib()
        if self._rank == 0:
            figure.draw(self.rows, Path(path), ranks=len(self._ranks), dark=dark)

    def table(self) -> str:
        """Returns the table on any rank."""
        rows = self.rows
        if not rows:
            return "syncbn.drift measured nothing: no batch norm was called in training mode inside the block."
        cells = [_cells(row) for row in rows]
        lines = [
            tabulate(cells, _HEADERS, tablefmt="simple", disable_numparse=True, colalign=_ALIGN),
            f"{len(rows)} layers, {max(row.calls for row in rows)} calls of each, {_ranks(len(self._ranks))}. "
            "Drift in standard deviations; x: how many times what independent samples have.",
            self._advice(rows),
        ]
        if len(self._ranks) > 1 and not all(row.synchronised for row in rows):
            lines.append(
                "A layer that is not synchronised evens out the ranks' inputs of later ones, which then seem to drift "
                "little.\nTo choose layers, measure a copy that syncbn.convert_sync_batchnorm has converted."
            )
        return "\n".join([*lines, *(f"WARNING: {text}" for text in self.warnings)])

    def _advice(self, rows: Sequence[Row]) -> str:
        names = set(self.recommend(0.9))
        if not names:
            return "recommend(0.9): none. No layer drifts more than independent samples do."
        text = f"recommend(0.9): {len(names)} of {len(rows)} layers hold 90 % of the excess drift"
        left = max((row.excess for row in rows if row.name not in names), default=0.0)
        return (
            f"{text}; it leaves outputs of others off by {math.sqrt(left):.2f} at most, beyond noise."
            if left
            else f"{text}."
        )

    def __str__(self) -> str:
        return self.table() if self._rank == 0 else ""


_ROUNDING = 1e-20
_HEADERS = ("layer", "class", "C", "samples", "of", "mean drift", "x", "var drift", "x", "steady", "running", "ms")
_ALIGN = ("left", "left", *("right",) * 10)


def _cells(row: Row) -> Sequence[str]:
    return (
        row.name or "(the model)",
        row.kind,
        str(row.C),
        f"{row.count_local:.4g}",
        f"{row.count_global:.4g}",
        f"{row.mean_drift:.3f}",
        _text(row.mean_ratio, ".1f"),
        _text(row.var_drift, ".3f"),
        _text(row.var_ratio, ".1f"),
        _text(row.steady, ".3f"),
        f"{row.running:.3f}",
        _text(None if row.seconds is None else 1e3 * row.seconds, ".3f"),
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ranks(W: int) -> str:
    return "1 rank" if W == 1 else f"{W} ranks"


def _row(sums: Sums, ranks: tuple[int, ...]) -> Row:
    calls, layer = sums.calls, sums.layer
    count_local, count_global = sums.count_local / calls, sums.count_global / calls
    mean2, mean_noise = (value / max(sums.pairs, 1.0) for value in (sums.mean, sums.mean_noise))
    var2, var_noise = (value / max(sums.var_pairs, 1.0) for value in (sums.var, sums.var_noise))
    shift, noise2 = sums.steady()
    k = noise.samples_per_unit(mean2 / mean_noise, count_global) if mean_noise > 0 else 1.0
    allowed = min(1.0, count_local / HARMLESS)
    excess = max(mean2 - allowed * mean_noise, 0.0) + max(var2 - allowed * var_noise, 0.0) / 4.0
    timed = layer.synchronised and sums.seconds > 0 and calls > 1
    return Row(
        layer.name,
        layer.kind,
        layer.C,
        layer.synchronised,
        calls,
        count_local,
        count_global,
        math.sqrt(mean2),
        math.sqrt(mean_noise),
        math.sqrt(var2) if sums.var_pairs else None,
        math.sqrt(var_noise) if sums.var_pairs else None,
        None if math.isinf(noise2) else math.sqrt(max(float(shift.square().mean()) - noise2, 0.0)),
        count_local / k if k > 0 else count_local,
        sums.running,
        sums.constant / calls,
        excess if excess > _ROUNDING else 0.0,
        sums.seconds / (calls - 1) if timed else None,
        ranks_off.find(sums, ranks),
    )
