# SPDX-License-Identifier: BSD-3-Clause
"""What one training step of ResNet-50 sends in batch norm: the messages of the real code, recorded while it runs."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.modules import _functions

import syncbn
from benchmarks.transports import resnet50_shapes
from syncbn.transports.single import SingleTransport

MESSAGES = ("syncbn forward", "syncbn backward", "torch forward", "torch backward")
GATHERED = "torch forward"
"""The one message that is gathered; the others are summed."""
GATHERS = ("all_gather_single", "all_gather_into_tensor", "all_gather")
"""The name of the collective in torch 2.13, its name before, and the one for gloo."""
_RECORDING = threading.Lock()
"""What a recording replaces is replaced for every thread."""


def widths() -> dict[int, int]:
    """Returns the number of batch norms of each width C of ResNet-50."""
    return dict(sorted(Counter(C for C, _ in resnet50_shapes()).items()))


def collectives() -> int:
    """Returns how often a training step waits for the other ranks: once forward and once backward a layer."""
    return 2 * sum(widths().values())


@cache
def message_bytes(message: str, C: int) -> int:
    """Returns the bytes that each rank puts into a message of MESSAGES, for a layer of width C."""
    ours = message.startswith("syncbn")
    with _RECORDING:
        sent = _sent_by_syncbn(C) if ours else _sent_by_torch(C)
    assert [kind for kind, _ in sent] == (["sum", "sum"] if ours else ["gather", "sum"]), sent
    return sent[message.endswith("backward")][1]


def received(message: str, ranks: int) -> int:
    """Returns the least bytes that a rank receives in a step: W - 1 blocks of a gather, 2 (W - 1) / W of a sum."""
    total = sum(layers * message_bytes(message, C) for C, layers in widths().items())
    return total * (ranks - 1) if message == GATHERED else round(total * 2 * (ranks - 1) / ranks)


def _sent_by_syncbn(C: int) -> list[tuple[str, int]]:
    sent = []

    def all_reduce(self: SingleTransport, wire: Tensor) -> Tensor:
        del self
        sent.append(("sum", wire.nbytes))
        return wire

    with torch.device("cpu"), mock.patch.object(SingleTransport, "all_reduce", all_reduce):
        layer = syncbn.SyncBatchNorm(C)
        layer(torch.randn(2, C, 2, 2, requires_grad=True)).sum().backward()
    return sent


def _sent_by_torch(C: int) -> list[tuple[str, int]]:
    """Runs torch's autograd function without its CUDA kernels, whose results are of the shape and dtype of theirs."""
    sent: list[tuple[str, int]] = []
    group = types.SimpleNamespace(_get_backend_name=lambda: "nccl")
    with torch.device("cpu"), _torch_without_kernels(C, sent):
        x = torch.zeros(2, C, 2, 2, requires_grad=True)
        weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
        buffers = torch.zeros(C), torch.ones(C)
        _functions.SyncBatchNorm.apply(x, weight, bias, *buffers, 1e-5, 0.1, group, 2).sum().backward()
    return sent


@contextmanager
def _torch_without_kernels(C: int, sent: list[tuple[str, int]]) -> Iterator[None]:
    def zeros(n: int) -> Any:
        return lambda *_: tuple(torch.zeros(C) for _ in range(n))

    kernels = {
        "batch_norm_stats": zeros(2),
        "batch_norm_gather_stats_with_counts": zeros(2),
        "batch_norm_elemt": lambda x, *_: torch.zeros_like(x),
        "batch_norm_backward_reduce": zeros(4),
        "batch_norm_backward_elemt": lambda grad, *_: torch.zeros_like(grad),
    }

    def gather(out: Any, tensor: Tensor, *_: Any, **__: Any) -> None:
        sent.append(("gather", tensor.nbytes))

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
        sent.append(("sum", tensor.nbytes))

    with ExitStack() as stack:
        for name, stand_in in kernels.items():
            stack.enter_context(mock.patch.object(torch, name, stand_in))
        for name in GATHERS:
            if hasattr(torch.distributed, name):
                stack.enter_context(mock.patch.object(torch.distributed, name, gather))
        stack.enter_context(mock.patch.object(torch.distributed, "all_reduce", all_reduce))
        yield
