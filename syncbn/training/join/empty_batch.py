# SPDX-License-Identifier: BSD-3-Clause
"""The forward on an empty local batch that finished ranks of a `join` run.

N batch.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from syncbn.layer import SyncBatchNorm
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport

Call = tuple[tuple[Any, ...], dict[str, Any]]


def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Returns arguments with an empty local batch: every tensor with dims gets N = 0, everything else stays."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        # A reentrant checkpoint takes part in backward only if its input wants a gradient.
        return value.new_empty(0, *value.shape[1:]).requires_grad_(value.requires_grad)

    cut_args, cut_kwargs = tree_map(cut, (args, kwargs))
    return cut_args, cut_kwargs


def refusal(
    model: nn.Module, call: Call, hooks_disabled: Callable[[], AbstractContextManager[None]]
) -> Exception | None:
    """Runs the model on an empty local batch, without communication. Returns its error, or None.

    Args:
        model: the model, not wrapped. Its synchronised layers are in eval meanwhile.
        call: arguments of an empty local batch.
        hooks_disabled: a context in which the hooks of join do nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, SyncBatchNorm) and m.training]
    args, kwargs = call
    try:
        for layer in layers:
            layer.training = False
        with hooks_disabled(), torch.no_grad(), torch.random.fork_rng(devices=()):
            model(*args, **kwargs)
    except Exception as error:  # whatever a model raises
        return ValueError(
            "syncbn.join needs a model that takes an empty local batch (N = 0), since finished ranks run it on one; "
            f"received {error!r}. Write x.flatten(1), not x.view(x.size(0), -1), or pass empty=."
        )
    finally:
        for layer in layers:
            layer.training = True
    return None


def send(call: Call | None, device: torch.device, transport: AbstractTransport) -> Call:
    """Copies the arguments of an empty local batch to the ranks that have not made them.

    Communication:
        One all-reduce of W values and two broadcasts, by every rank; the arguments travel pickled.
    """
    has = gather.gather(torch.tensor([float(call is not None)], dtype=torch.float64, device="cpu"), transport)
    root = int(has.flatten().argmax())
    host = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, call)
    wire = torch.frombuffer(bytearray(pickle.dumps(host)), dtype=torch.uint8)
    length = transport.broadcast(torch.tensor([float(len(wire))], dtype=torch.float64, device="cpu"), root)
    wire = wire if transport.rank == root else torch.empty(int(length), dtype=torch.uint8, device="cpu")
    transport.broadcast(wire, root)
    if call is not None:
        return call
    args, kwargs = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, pickle.loads(bytes(wire.tolist())))
    return args, kwargs
