# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of a model, packed by dtype for one message each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport

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


def layout(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the numbers by which ranks compare their models."""
    # torch.compile adds _orig_mod to the names; a compiled model is the same model.
    text = repr([(name.replace("_orig_mod.", ""), tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    return {
        "number of tensors": len(tensors),
        "number of values": sum(t.numel() for t in tensors.values()),
        "checksum of names, shapes and dtypes": zlib.crc32(text.encode("utf-8", "surrogatepass")),
    }


def require_same_layout(
    tensors: Mapping[str, Tensor],
    transport: AbstractTransport,
    what: str,
    error: Exception | None,
    numbers: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Raises on every rank unless all have the same tensors, the same ``numbers``, and no error.

    Communication:
        One all-reduce of W * (4 + len(numbers)) + 7 float64 values.
    """
    remedy = "Build the same model on every rank."
    gather.require_equal({**numbers, **layout(tensors)}, transport, what, remedy, error)
