# SPDX-License-Identifier: BSD-3-Clause
"""What waiting for the slowest rank adds to a step, by Monte Carlo. The exchange itself takes no time here.

A step is cut into equal pieces of work. After each piece the ranks of a group wait for the slowest of them, and after
the last one all ranks wait for each other, as they do to average the gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np


class AbstractNoise(ABC):
    """How much longer than others a piece takes on a rank."""

    @abstractmethod
    def mean(self) -> float:
        """Returns the mean time of a piece, in units of a piece without noise."""

    @abstractmethod
    def draw(self, random: np.random.Generator, ranks: int, pieces: int) -> Any:
        """Returns the times of one step, (ranks, pieces)."""


@final
@dataclass(frozen=True)
class LogNormal(AbstractNoise):
    """Times of mean 1 that differ by so much: the standard deviation of their logarithm is sigma."""

    sigma: float
    stays: float = 0.0
    """The share of the variance that is the rank's own in this step, equal in all its pieces."""

    def mean(self) -> float:
        """See :class:`AbstractNoise`."""
        return 1.0

    def draw(self, random: np.random.Generator, ranks: int, pieces: int) -> Any:
        """See :class:`AbstractNoise`."""
        normal = np.sqrt(1 - self.stays) * random.standard_normal((ranks, pieces)) if self.stays < 1 else 0.0
        normal = normal + np.sqrt(self.stays) * random.standard_normal((ranks, 1))
        times = np.exp(self.sigma * normal - self.sigma**2 / 2)
        return np.broadcast_to(times, (ranks, pieces))


@final
@dataclass(frozen=True)
class Pause(AbstractNoise):
    """A rank stands still now and then, as for garbage collection or a daemon."""

    length: float
    """Of a step."""
    steps: float
    """How many steps of a rank there are for each of its pauses."""
    pieces: int
    """Of a step."""

    def mean(self) -> float:
        """See :class:`AbstractNoise`."""
        return 1.0 + self.length / self.steps

    def draw(self, random: np.random.Generator, ranks: int, pieces: int) -> Any:
        """See :class:`AbstractNoise`."""
        assert pieces == self.pieces
        return 1.0 + self.length * pieces * (random.random((ranks, pieces)) < 1 / (self.steps * pieces))


def noises(pieces: int) -> dict[str, AbstractNoise]:
    """Returns the kinds of noise of the study, for a step of so many pieces."""
    return {
        "5 %, new in each piece": LogNormal(0.05),
        "5 %, half stays with the rank": LogNormal(0.05, 0.5),
        "5 %, all stays with the rank": LogNormal(0.05, 1.0),
        "a pause of 1 %, once in 100 steps": Pause(0.01, 100, pieces),
    }


def added(
    noise: AbstractNoise, ranks: int, groups: Iterable[int], pieces: int, samples: int, seed: int = 1
) -> dict[int, float]:
    """Returns what waiting adds to the work of a step, as a fraction, for groups of several sizes.

    Args:
        noise: how the pieces differ.
        ranks: W.
        groups: numbers of ranks that wait for each other after each piece, divisors of W. 1: only once a step.
        pieces: of a step.
        samples: how many steps are drawn; each is used for every size.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    totals = dict.fromkeys(groups, 0.0)
    for _ in range(samples):
        times = noise.draw(random, ranks, pieces)
        for group in totals:
            slowest = times.reshape(ranks // group, group, pieces).max(1)
            totals[group] += slowest.sum(1).max() / pieces
    return {group: total / samples / noise.mean() - 1 for group, total in totals.items()}


def table(ranks: Sequence[int], pieces: int, samples: int) -> Iterator[tuple[str, int, dict[int, float]]]:
    """Returns :func:`added` of every noise, in groups of 1, 8, 64 and all ranks.

    Args:
        ranks: numbers of ranks, powers of two.
        pieces: of a step.
        samples: steps on the most ranks; smaller jobs get more, up to five times as many.
    """
    for name, noise in noises(pieces).items():
        for n in ranks:
            groups = sorted({1, n, *(g for g in (8, 64) if g < n)})
            yield name, n, added(noise, n, groups, pieces, min(5 * samples, samples * max(ranks) // n))
