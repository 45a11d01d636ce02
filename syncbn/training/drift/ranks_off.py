# SPDX-License-Identifier: BSD-3-Clause
"""Whether the data of one rank is off, or ranks see different data at every step.

M channels that are measured, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from syncbn.training.drift.sums import Sums

if TYPE_CHECKING:
    from syncbn.training.drift.report import Row

FAR = 4.0
"""How many times the spread of the others a rank must be away from them."""
LEAST = 0.1
"""Standard deviations that do no harm, however steady."""


def find(sums: Sums, ranks: tuple[int, ...]) -> int | None:
    """Returns the rank whose mean is far outside the others' in a layer, or None.

    Each rank's shift is averaged over the calls. The distance of a rank to the mean of the others, rms over the
    channels, is compared with the spread of these others and with what the noise of the calls leaves in it. Two ranks
    are as far from each other: of those none is off.
    """
    shift, noise2 = sums.steady()
    W = len(shift)
    if W < 3 or sums.calls < 2:
        return None
    others = (shift.sum(0) - shift) / (W - 1)
    distance2 = (shift - others).square().mean(1)
    rank = int(distance2.argmax())
    rest = shift[[r for r in range(W) if r != rank]]
    spread2 = max(float(rest.var(0).mean()), noise2) * W / (W - 1)
    distance = float(distance2[rank]) ** 0.5
    return ranks[rank] if distance > max(FAR * spread2**0.5, LEAST) else None


def warnings(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence for each rank that is off, and one if ranks differ without one that does."""
    found = []
    for rank in sorted({row.rank_off for row in rows if row.rank_off is not None}):
        where = [row for row in rows if row.rank_off == rank]
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        found.append(
            f"Rank {rank}'s data is off: its mean is far outside the other ranks' in {where[0].name!r}{more}, at every "
            "step. Look at how its data is read and scaled."
        )
    differing = [row for row in rows if row.steady is not None and row.steady > max(LEAST, 2 * row.mean_expected)]
    if differing and not found:
        worst = max(differing, key=lambda row: row.steady or 0.0)
        found.append(
            f"Ranks see different data: {worst.steady:.2f} standard deviations of the drift of {worst.name!r} are the "
            f"same at every step, and {len(differing)} layers have such a part. Shuffle over all ranks."
        )
    return found
