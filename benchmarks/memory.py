# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of a training step, as the system counts its pages: ours beside torch's BatchNorm2d."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from syncbn.cli.bench.report import Shape
from syncbn.layer import SyncBatchNorm

LARGE: Shape = (16, 64, 112, 112)
"""49 MiB in float32: the C library returns such a block when it is freed, so no older memory is counted."""


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory that forward and backward add, and the size of one tensor of that shape, in MiB."""

    layer: str
    shape: Shape
    mib: float
    tensor_mib: float


def memory_rows(shape: Shape, dtype: torch.dtype, layout: torch.memory_format) -> list[MemoryRow]:
    """Measures forward and backward of torch's layer and of ours. Both need y and grad_x, two tensors.

    Raises:
        RuntimeError: if /proc does not have the numbers.
    """
    layers = {"torch.nn.BatchNorm2d": nn.BatchNorm2d(shape[1]), "SyncBatchNorm": SyncBatchNorm(shape[1])}
    found = {}
    for _ in range(2):  # the first round includes what is allocated once
        for name, layer in layers.items():
            x, grad_y = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
            x.requires_grad_()
            with _peak() as peak:
                layer(x).backward(grad_y)
            found[name] = MemoryRow(name, shape, peak[0], x.nbytes / 2**20)
    return list(found.values())


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Yields a list that afterwards holds how far the resident memory rose, in MiB."""
    found: list[float] = []
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as refs:
            refs.write("5")  # resets the peak
    except OSError as error:
        raise RuntimeError(f"Peak memory needs Linux's /proc/self/clear_refs; received {error}.") from error
    before = _status_kib("VmRSS")
    yield found
    found.append((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
