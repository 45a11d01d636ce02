# SPDX-License-Identifier: BSD-3-Clause
"""Whether all ranks train one model: the same parameters and buffers, bit for bit, and the same synchronised layers.

T tensors, W ranks.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from syncbn.convert import summary
from syncbn.convert.summary import Row
from syncbn.layer import SyncBatchNorm
from syncbn.transports import announcing, gather
from syncbn.transports.base import AbstractTransport
from syncbn.world import arguments

T = TypeVar("T")

CHECK = "World.check"
AVERAGE = "World.average_gradients"
_NAMED = 3
"""How many tensors an error names."""
_BYTES = 6
"""Of a digest: as a number it is exact in float64."""
_NONE = -1.0
"""Stands for the digest of a gradient that is not there."""


class _Model(NamedTuple):
    """What a rank says of its model."""

    tensors: Mapping[str, Tensor]
    """The parameters and buffers that must agree."""
    digests: list[float]
    rows: Sequence[Row]


def require_same_model(module: object, transport: AbstractTransport) -> list[str]:
    """Does ``World.check``. Returns the remarks, the same on every rank; the first rank warns of them."""
    if announcing.is_open():
        raise RuntimeError(
            f"{CHECK} needs every rank, and ranks that have finished in syncbn.join do not follow it; received a call "
            "inside syncbn.join. Call it before or after the join."
        )
    model, error = _read(module, transport)
    local, synchronised = sum(row.local for row in model.rows), sum(row.synchronised for row in model.rows)
    layers = [(row.name, row.kind, row.synchronised, row.local) for row in model.rows]
    row = [float(synchronised), float(local), _text_digest(layers)]
    row += [_text_digest(_layout(model.tensors)), float(len(model.tensors)), _digest_of(model.digests)]
    table = _gather([*row, float(error is not None)], transport, CHECK)
    if any(each[-1] for each in table):
        gather.raise_gathered(error, transport)
    if len({tuple(each[:3]) for each in table}) > 1:
        raise ValueError(_other_layers(table, transport))
    if len({tuple(each[3:5]) for each in table}) > 1:
        received = _by_rank([f"{each[4]:g} tensors, checksum {each[3]:.0f}" for each in table], transport)
        raise ValueError(
            f"{CHECK} needs parameters and buffers of the same names, shapes and dtypes on every rank; received "
            f"{received}. Build the same model on every rank."
        )
    if len({each[5] for each in table}) > 1:
        raise _values_error(model.tensors, model.digests, transport, CHECK)
    remarks = list(_remarks(model.rows, type(module).__name__))
    if transport.rank == 0:  # every rank has the same
        for remark in remarks:
            warnings.warn(remark, UserWarning, stacklevel=3)
    return remarks


_compared: WeakSet[AbstractTransport] = WeakSet()
"""Groups whose ranks have compared the parameters of the first model that they average: the same on every rank."""


def require_same_parameters_once(
    parameters: Mapping[str, Tensor], error: Exception | None, transport: AbstractTransport
) -> Exception | None:
    """Compares the parameters at the first ``World.average_gradients`` of a group.

    Args:
        parameters: those that require a gradient.
        error: what is wrong with them; then, as if layouts differ, nothing is compared, and the caller will raise.
        transport: the group.

    Communication:
        At the first call: one all-reduce of 3 W + 7 float64 values; one of 2 T W + 7 more if the parameters differ.

    Raises:
        ValueError: on every rank, if the parameters differ.
    """
    if transport in _compared:
        return error
    digests: list[float] = []
    if error is None:
        digests, error = _guarded(lambda: [_digest(t) for t in parameters.values()], digests, AVERAGE)
    row = [_text_digest(_layout(parameters)), _digest_of(digests), float(error is not None)]
    table = _gather(row, transport, AVERAGE)
    if any(each[2] for each in table) or len({each[0] for each in table}) > 1:
        return error
    _compared.add(transport)
    if len({each[1] for each in table}) > 1:
        raise _values_error(parameters, digests, transport, AVERAGE)
    return error


def _read(module: object, transport: AbstractTransport) -> tuple[_Model, Exception | None]:
    tensors, error = arguments.tensors_of(module, CHECK, buffers=True)
    if error is not None or not isinstance(module, nn.Module):
        return _Model({}, [], []), error

    def read() -> _Model:
        rows = summary.summary(module).rows
        own = _of_fewer_ranks(module, rows, transport)
        kept = {name.replace("_orig_mod.", ""): t for name, t in tensors.items() if id(t) not in own}
        return _Model(kept, [_digest(t) for t in kept.values()], rows)

    return _guarded(read, _Model({}, [], []))


def _guarded(read: Callable[[], T], nothing: T, what: str = CHECK) -> tuple[T, Exception | None]:
    """Returns what a function reads, or ``nothing`` and the error that it raised."""
    try:
        return read(), None
    except Exception as error:  # of any kind: raised on this rank alone, it would leave the others waiting
        text = f"{type(error).__name__}: {error}"
        return nothing, ValueError(
            f"{what} needs a model whose tensors can be read; received one that raised {text:.300}. Pass the model "
            "as it was before a wrapper that shards it."
        )


def _of_fewer_ranks(model: nn.Module, rows: Sequence[Row], transport: AbstractTransport) -> set[int]:
    """Returns the buffers that may differ: of layers with the statistics of the local batch, or of another group."""
    local = {row.name for row in rows if row.local}
    found = set()
    for name, module in model.named_modules():
        plain = name.replace("_orig_mod.", "").removesuffix("_orig_mod")
        apart = isinstance(module, SyncBatchNorm) and module.process_group not in (None, transport.spec)
        if apart or plain in local:
            found |= {id(t) for t in module.buffers(recurse=False)}
    return found


def _digest(t: Tensor) -> float:
    """Hashes the bits of a tensor: NaN is equal to itself, and 0 is not -0."""
    if type(t).__name__ == "DTensor":
        raise TypeError("a DTensor, of which each rank holds a part")
    t = t.detach()
    t = (t.to_dense() if t.layout is not torch.strided else t).resolve_conj().resolve_neg()
    flat = t.cpu().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return _number(flat.view(torch.uint8).numpy())


def _number(data: object) -> float:
    return float(int.from_bytes(hashlib.blake2b(data, digest_size=_BYTES).digest()))  # type: ignore[arg-type]


def _digest_of(digests: list[float]) -> float:
    return _number(repr(digests).encode())


def _layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name.replace("_orig_mod.", ""), tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]


def _text_digest(values: object) -> float:
    return float(zlib.crc32(repr(values).encode("utf-8", "surrogatepass")))


def _gather(row: list[float], transport: AbstractTransport, what: str) -> list[list[float]]:
    table: list[list[float]] = gather.gather(
        torch.tensor(row, dtype=torch.float64, device="cpu"), transport, what
    ).tolist()
    return table


def _by_rank(notes: list[str], transport: AbstractTransport) -> str:
    return gather.by_rank(notes, transport.ranks)


def _values_error(
    tensors: Mapping[str, Tensor], digests: list[float], transport: AbstractTransport, what: str
) -> ValueError:
    """Returns the error for tensors that differ. Called by every rank: it compares them one by one."""
    grads, wrong = _guarded(
        lambda: [_NONE if t.grad is None else _digest(t.grad) for t in tensors.values()], [_NONE] * len(digests)
    )
    del wrong  # then nothing is said of gradients
    table = torch.tensor(_gather([*digests, *grads], transport, what), dtype=torch.float64, device="cpu")
    values, gradients = table.chunk(2, dim=1)
    differ = [name for name, column in zip(tensors, values.T.tolist(), strict=True) if len(set(column)) > 1]
    first = values[:, list(tensors).index(differ[0])].tolist()
    kinds = {value: f"version {i + 1}" for i, value in enumerate(dict.fromkeys(first))}
    received = _by_rank([kinds[value] for value in first], transport)
    if len(kinds) > _NAMED:
        received = f"in {len(kinds)} versions on {len(first)} ranks"
    names = ", ".join(differ[:_NAMED]) + (f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else "")
    compared = "parameters" if what == AVERAGE else "parameters and buffers"
    return ValueError(
        f"{what} needs the same {compared} on every rank, bit for bit; received other values of {names} "
        f"({len(differ)} of {len(digests)} tensors): {differ[0]} is {received}. {_cause(gradients, what)}"
    )


def _cause(gradients: Tensor, what: str) -> str:
    """Returns what may have happened, from the gradients of the last step, (W, T)."""
    start = (
        "Call World.broadcast(model) once before training, since ranks start from another seed or checkpoint; or wrap "
        "the model in DistributedDataParallel, which does so too."
    )
    if what == AVERAGE:
        return start
    step = "Call World.average_gradients(model) after each backward, or use DistributedDataParallel"
    there = (gradients != _NONE).any(0)
    if (gradients[:, there] != gradients[:1, there]).any():
        return f"The gradients differ too, so nothing has averaged those of the last step. {step}. {start}"
    return f"{start} If they were the same at the start, a step went without averaging. {step}."


def _other_layers(table: list[list[float]], transport: AbstractTransport) -> str:
    notes = [f"{s:g} synchronised and {n:g} local, checksum {c:.0f}" for s, n, c, *_ in table]
    return (
        f"{CHECK} needs the same synchronised layers on every rank; received {_by_rank(notes, transport)}. Convert and "
        "freeze alike on every rank; syncbn.summary(model) lists the layers."
    )


def _remarks(rows: Sequence[Row], model: str) -> list[str]:
    if not rows:
        return [
            f"{CHECK} found no batch norm in {model}: no statistic is synchronised, and none needs to be. If there "
            "should be some, pass the whole model."
        ]
    local = [row for row in rows if row.local]
    if not local:
        return []
    names = ", ".join(row.name or "(the model)" for row in local[:_NAMED])
    names += f" and {len(local) - _NAMED} more" if len(local) > _NAMED else ""
    return [
        f"{CHECK} found {len(local)} of {len(rows)} normalising modules that use the local batch alone: {names}. Call "
        "syncbn.convert_sync_batchnorm(model), unless you left them out on purpose; syncbn.summary(model) says why."
    ]
