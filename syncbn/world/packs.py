# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of a model, packed by dtype for one message each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def sparse_error(parameters: Mapping[str, Tensor]) -> Exception | None:
    """Returns the error for gradients that are not dense, as nn.Embedding(sparse=True) makes them, or None."""
    found = [name for name, p in parameters.items() if p.grad is not None and p.grad.layout is not torch.strided]
    if not found:
        return None
    return ValueError(
        f"World.average_gradients needs dense gradients; received sparse ones of {', '.join(found)}. "
        "Make the embedding with sparse=False."
    )


def wire_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype to sum a tensor in. Half precision is summed in float32; MPI knows no bfloat16."""
    return torch.float64 if tensor.dtype.to_real() == torch.float64 else torch.float32


def real(tensor: Tensor) -> Tensor:
    """Views complex numbers as pairs of real ones; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def by_dtype(tensors: Iterable[T], key: Callable[[T], torch.dtype]) -> list[list[T]]:
    """Groups tensors by a dtype of each, in the order of first use."""
    packs: dict[torch.dtype, list[T]] = {}
    for tensor in tensors:
        packs.setdefault(key(tensor), []).append(tensor)
    return list(packs.values())
