# SPDX-License-Identifier: BSD-3-Clause
"""A forward on no samples, for the ranks of a `join` that have finished.

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
from syncbn.transports import agreement
from syncbn.transports.base import AbstractTransport

Call = tuple[tuple[Any, ...], dict[str, Any]]


def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Makes the arguments of an empty share: every tensor with dims loses its entries, everything else stays."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        # A reentrant checkpoint takes part in backward only if its input wants a gradient.
        return value.new_empty(0, *value.shape[1:]).requires_grad_(value.requires_grad)

    cut_args, cut_kwargs = tree_map(cut, (args, kwargs))
    return cut_args, cut_kwargs


def refusal(model: nn.Module, call: Call, hush: Callable[[], AbstractContextManager[None]]) -> Exception | None:
    """Runs the model on an empty share without communication, and returns what is wrong with that, or None.

    Args:
        model: the model, not wrapped. Its synchronised layers are put in eval for the moment.
        call: arguments of an empty share.
        hush: keeps the hooks of join silent.
    """
    layers = [m for m in model.modules() if isinstance(m, SyncBatchNorm) and m.training]
    args, kwargs = call
    try:
        for layer in layers:
            layer.training = False
        with hush(), torch.no_grad(), torch.random.fork_rng(devices=()):
            model(*args, **kwargs)
    except Exception as error:  # whatever a model raises
        return ValueError(
            "syncbn.join needs a model that takes an empty share, N = 0, for the ranks that finish first; received "
            f"{error!r}. Write x.flatten(1), not x.view(x.size(0), -1), or pass empty=."
        )
    finally:
        for layer in layers:
            layer.training = True
    return None


def send(call: Call | None, device: torch.device, transport: AbstractTransport) -> Call:
    """Copies the arguments of an empty share to the ranks that have none.

    Communication:
        One all-reduce of W values and two broadcasts, by every rank; the arguments travel pickled.
    """
    has = agreement.gather(torch.tensor([float(call is not None)], dtype=torch.float64, device="cpu"), transport)
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
