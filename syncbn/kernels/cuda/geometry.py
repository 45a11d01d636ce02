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
STEPS = 4
"""How many packs a thread should have before a channel gets one more block."""
MOST = 2**31 - 16
"""The most values in a plane: a thread counts in 32 bits, up to the end of its last pack."""
# 132 multiprocessors hold 4 blocks of planes each, or 3 of rows (walk.cuh). Planes get two rounds of blocks, rows one:
# more blocks would spend more time on their starts and ends. Not tuned on a GPU yet.
BLOCKS_OF_PLANES = 1056
BLOCKS_OF_ROWS = 396
FILLED = 264
ROUNDS = 3
"""The most rounds in which the last block of a group of rows reads the partial sums; nothing else runs then."""


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
        sums: whether the blocks of a group add up sums. If not, blocks of rows may be wide.

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
        return _planes(1, 1, N * S, itemsize, threads)
    if planes and S > 1:
        return _planes(N, C, S, itemsize, threads)
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


def _planes(N: int, C: int, S: int, itemsize: int, threads: int) -> Geometry:
    V = 16 // itemsize
    pieces = N * _ceil(S, V)
    lanes = min(threads, max(min(32, threads), _power_of_two(_ceil(pieces, STEPS))))
    rows = threads // lanes
    while rows > 1 and _ceil(C, rows) < FILLED:
        rows //= 2
    groups = _ceil(C, rows)
    blocks, per_block = _share(pieces, lanes, groups, BLOCKS_OF_PLANES)
    return Geometry("Planes", N, C, S, groups, blocks, per_block, S * itemsize, (lanes, rows))


def _rows(N: int, C: int, itemsize: int, threads: int, sums: bool) -> Geometry:
    V = 16 // itemsize
    columns = min(32, threads, _power_of_two(_ceil(C, V)))
    while True:
        lanes = min(threads // columns, _power_of_two(_ceil(N, STEPS)))
        groups = _ceil(C, columns * V)
        blocks, per_block = _share(N, lanes, groups, BLOCKS_OF_ROWS)
        fills = groups * blocks >= FILLED
        if columns <= 4 or (fills and (blocks <= ROUNDS * lanes or not sums)):  # 4 columns: 64 bytes
            return Geometry("Rows", N, C, 1, groups, blocks, per_block, C * itemsize, (columns, lanes))
        columns //= 2


def _share(pieces: int, lanes: int, groups: int, most: int) -> tuple[int, int]:
    """Returns blocks per group and pieces per block: whole rounds of the lanes, at least STEPS of them if possible."""
    wanted = max(1, min(most // groups, _ceil(pieces, lanes * STEPS)))
    per_block = _ceil(_ceil(pieces, wanted), lanes) * lanes
    return _ceil(pieces, per_block), per_block


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()
