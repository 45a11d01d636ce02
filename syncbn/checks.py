# SPDX-License-Identifier: BSD-3-Clause
"""Every user-facing check of the layer and its message.

*The requirement. What was received, with values and rank. What to do.* A check whose outcome can differ
between ranks returns its error instead of raising it: the verdict travels with the data, see ``functional.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.agreement import by_rank, gather_notes, raise_gathered
from syncbn.moments import DTYPES, Status
from syncbn.transports.base import AbstractTransport

NAME = "SyncBatchNorm"


def input_error(x: object, num_features: int | None) -> Exception | None:
    """Returns what is wrong with an input of a layer of ``num_features`` channels (None: of any), or None."""
    if not isinstance(x, Tensor):
        return TypeError(f"{NAME} needs a torch.Tensor; received {type(x).__name__}. Convert the input.")
    if x.dtype not in DTYPES:
        names = ", ".join(_name(d) for d in DTYPES)
        return TypeError(
            f"{NAME} needs a floating-point input ({names}); received {_name(x.dtype)}. Call x.float() first."
        )
    if x.dim() < 2:
        return ValueError(
            f"{NAME} needs input.dim() >= 2, (N, C, *spatial); received shape {tuple(x.shape)}. "
            "Add a batch dimension with x.unsqueeze(0), or a channel dimension with x.unsqueeze(1)."
        )
    if num_features is not None and x.size(1) != num_features:
        return ValueError(
            f"{NAME} needs input.size(1) == num_features; received {x.size(1)} channels, shape {tuple(x.shape)}, "
            f"for num_features={num_features}. Channels come second, also in channels_last memory format."
        )
    return None


def device_type(x: object) -> str:
    """Returns where an input lives; what is no tensor is refused later, together with the other ranks."""
    return x.device.type if isinstance(x, Tensor) and not x.is_cpu else "cpu"


def raise_if_disagreed(
    count_global: float,
    status: Status,
    transport: AbstractTransport,
    *,
    x: Tensor,
    error: Exception | None,
    grad_enabled: bool,
) -> None:
    """Raises, alike on every rank, what the all-reduced counters of a forward call reveal.

    Args:
        count_global: samples per channel in the global batch.
        status: counters summed over the ranks.
        transport: the group.
        x: this rank's input.
        error: what is wrong with it, or None.
        grad_enabled: whether autograd records on this rank.

    Communication:
        None if all is well. One all-reduce of texts if not, on every rank, since all read the same counters.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    if status.faults:
        raise_gathered(error, transport)
    if status.dtypes > 1:
        notes = gather_notes(_name(x.dtype) if x.numel() else "an empty share", transport)
        raise TypeError(
            f"{NAME} needs input of one dtype on every rank; received {by_rank(notes, transport.ranks)}. "
            "Cast the input, or use the same autocast settings on every rank."
        )
    if 0 < status.grad_enabled < transport.size:
        notes = gather_notes(f"{grad_enabled}", transport)
        raise ValueError(
            f"{NAME} needs torch.is_grad_enabled() to be equal on every rank, or backward would wait forever; "
            f"received {by_rank(notes, transport.ranks)}. Use torch.no_grad() on all ranks or on none, or model.eval()."
        )
    if count_global == 1:
        shapes = by_rank(gather_notes(f"shape {tuple(x.shape)}", transport), transport.ranks)
        raise ValueError(
            f"{NAME} needs at least 2 values per channel in the group to estimate a variance; received 1 over "
            f"{transport.size} rank{'s' if transport.size > 1 else ''}: {shapes}. "
            "Give each rank more samples or call model.eval()."
        )
    if error is not None:  # a GPU tells the others later, see kernels/cuda_verdict.py
        raise error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
