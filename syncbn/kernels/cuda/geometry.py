# SPDX-License-Identifier: BSD-3-Clause
"""Launch geometry: how a tensor is divided among the blocks and threads of a GPU. Computes no values.

N batch, C channels, S product of the spatial dims, V elements in 16 bytes. ``walk.cuh`` says what a block and a
thread then own. The geometry depends on shape, strides and dtype alone, not on the GPU. So does the order of the sums,
and with it every bit of the result.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

THREADS = 256
"""The most threads in a block; MAX_THREADS in storage.cuh."""
STEPS, STEPS_ALONE = 4, 8
"""How many packs a thread should have before a channel gets one more block, and how many it may have where one block
can then add up a channel alone."""
MOST = 2**31 - 16
"""The most values in a plane: a thread counts in 32 bits, up to the end of its last pack."""
# 132 multiprocessors hold 4 blocks of sums over planes, and 3 of the others (walk.cuh). Sums get one round, as their
# blocks have a long end. Elementwise blocks form coefficients first: they get more packs before a second round.
ROUND = 396
SHORT = ((2, 132), (4, ROUND), (8, ROUND))
"""(packs a thread, blocks): an elementwise kernel has no more blocks than the first that gives its threads no more
packs than that, else BLOCKS_OF_PLANES or BLOCKS_OF_ROWS."""
BLOCKS_OF_PLANES, BLOCKS_OF_ROWS, BLOCKS_OF_SUMS_OF_PLANES, BLOCKS_OF_SUMS_OF_ROWS = 1584, 792, 528, 396
FILLED = 264
"""From how many blocks on a GPU counts as filled: two a multiprocessor."""
DEPTH, DEPTH_OF_STEPS = 8, 4
"""How many partial sums a thread of the last block of a group may read, as nothing else runs then; more, if that is
less than a DEPTH_OF_STEPS-th of the packs that it has read."""
COLUMNS, COLUMNS_OF_SUMS = 4, 2
"""The fewest threads side by side in rows: 64 and 32 bytes."""


class Geometry(NamedTuple):
    """One launch: the fields of ``Shape`` in ``cuda/walk.cuh``, and the block."""

    layout: str
    """Planes or Rows, the template argument."""
    N: int
    C: int
    S: int
    groups: int
    blocks: int
    """Blocks a group."""
    per_block: int
    """Pieces a block."""
    unit: int
    """Bytes between two places where packs begin anew; their alignment depends on it."""
    block: tuple[int, int]
    """Threads (x, y)."""

    @property
    def grid(self) -> int:
        """How many blocks work on elements."""
        return self.groups * self.blocks


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, threads: int = THREADS, *, sums: bool = True
) -> Geometry | None:
    """Lays out a tensor.

    Args:
        shape: (N, C, *spatial), S at most MOST.
        strides: in elements.
        itemsize: bytes an element.
        threads: the largest block, a power of two.
        sums: whether the blocks of a group add up sums.

    Returns:
        The geometry; None if the tensor is neither contiguous nor channels_last and needs a copy.
    """
    N, C, S = shape[0], shape[1], prod(shape[2:])
    if N * C * S == 0:
        columns, V = min(32, threads), 16 // itemsize
        return Geometry("Rows", N * S, C, 1, max(1, _ceil(C, columns * V)), 1, 1, 16, (columns, 1))
    dims = range(len(shape))
    planes = _is_dense(shape, strides, [*dims])
    if planes and C == 1 and N * S <= MOST:
        return _planes(1, 1, N * S, itemsize, threads, sums)
    if planes and S > 1:
        return _planes(N, C, S, itemsize, threads, sums)
    if _is_dense(shape, strides, [0, *dims[2:], 1]):
        return _rows(N * S, C, itemsize, threads, sums)
    return None


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], order: list[int]) -> bool:
    """Whether the elements follow one another in memory with these dims from the slowest to the fastest."""
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != expected:
            return False
        expected *= shape[d]
    return True


def _planes(N: int, C: int, S: int, itemsize: int, threads: int, sums: bool) -> Geometry:
    V = 16 // itemsize
    pieces = N * _ceil(S, V)
    lanes = min(threads, max(min(32, threads), _power_of_two(_ceil(pieces, STEPS))))
    rows = threads // lanes
    while rows > 1 and _ceil(C, rows) < FILLED:
        rows //= 2
    groups = _ceil(C, rows)
    most = BLOCKS_OF_SUMS_OF_PLANES if sums else BLOCKS_OF_PLANES
    blocks, per_block = _share(pieces, lanes, groups, most, sums)
    return Geometry("Planes", N, C, S, groups, blocks, per_block, S * itemsize, (lanes, rows))


def _rows(N: int, C: int, itemsize: int, threads: int, sums: bool) -> Geometry:
    """Takes as many columns as fill the GPU: a row is then read in long pieces.

    Where a block can add up its channels alone, it does: waiting for other blocks would take longer.
    """
    V = 16 // itemsize
    widest, least = min(32, threads, _power_of_two(_ceil(C, V))), COLUMNS_OF_SUMS if sums else COLUMNS
    widths = [widest >> i for i in range(6) if i == 0 or widest >> i >= least]
    found = [_columns(columns, N, C, itemsize, threads, sums) for columns in widths]
    alone = [each for each in found if sums and each.blocks == 1]
    if alone:
        return next((each for each in alone if each.grid >= FILLED), alone[-1])
    best = found[0]
    for narrow in found[1:]:
        lanes = best.block[1]
        deep = sums and best.blocks * V > max(DEPTH * lanes, best.per_block // DEPTH_OF_STEPS)
        if not deep and (best.grid >= FILLED or narrow.grid < 1.5 * best.grid):
            break
        best = narrow
    return best


def _columns(columns: int, N: int, C: int, itemsize: int, threads: int, sums: bool) -> Geometry:
    V = 16 // itemsize
    lanes = min(threads // columns, _power_of_two(_ceil(N, 2)))
    groups = _ceil(C, columns * V)
    most = BLOCKS_OF_SUMS_OF_ROWS if sums else BLOCKS_OF_ROWS
    blocks, per_block = _share(N, lanes, groups, most, sums)
    return Geometry("Rows", N, C, 1, groups, blocks, per_block, C * itemsize, (columns, lanes))


def _share(pieces: int, lanes: int, groups: int, most: int, sums: bool) -> tuple[int, int]:
    """Returns blocks per group and pieces per block, whole rounds of the lanes."""
    rounds = _ceil(pieces, lanes)
    if sums:
        wanted = 1 if rounds <= STEPS_ALONE else min(most // groups, _ceil(rounds, STEPS))
    else:
        short = next((each for each in SHORT if groups * _ceil(rounds, each[0]) <= each[1]), None)
        steps, most = (STEPS, most) if short is None else (short[0] // 2 + 1, short[1])
        wanted = min(most // groups, _ceil(rounds, steps))
    per_block = _ceil(rounds, max(1, wanted)) * lanes
    return _ceil(pieces, per_block), per_block


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()
