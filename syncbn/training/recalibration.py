# SPDX-License-Identifier: BSD-3-Clause
"""recalibrate(): compute the running statistics anew from given data, exactly.

C channels, W ranks. Each rank keeps the moments of its local batches, see ``recorder.py``. It merges them batch by
batch; the ranks merge theirs once at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from syncbn import transports
from syncbn.calls.sites import site_of
from syncbn.layer import SyncBatchNorm
from syncbn.training.modes import layers_of
from syncbn.training.recorder import Recorder, merge_ranks, recording
from syncbn.transports import announcing, gather
from syncbn.transports.base import AbstractTransport
from syncbn.waits.limits import shown

NAME = "syncbn.recalibrate"


def recalibrate(
    model: nn.Module, batches: Iterable[Any], num_batches: int | None = None, progress: bool = False
) -> None:
    """Computes the running statistics of every SyncBatchNorm anew, from its inputs over all the given data.

    Layers normalise by the statistics of each global batch, as in training, so that later layers get the inputs that
    they get there. running_mean becomes the mean and running_var the unbiased variance over every sample of every
    batch and rank, num_batches_tracked the number of calls. Nothing changes before all data has been seen: after
    an exception or Ctrl-C the model is as before. Parameters and the mode of every module stay as they are; call
    ``model.eval()`` first to turn dropout off. Frozen layers, layers without running statistics and layers that no
    batch reaches are left alone.

    Args:
        model: the model, with or without DistributedDataParallel around it. Its layers are equal on every rank.
        batches: this rank's batches. Each is a tensor, a tuple or list whose first element is the input, or a
            dict of keyword arguments. Ranks may have different numbers of them, but at least one each.
        num_batches: the maximum number of batches on this rank; None takes all.
        progress: whether rank 0 shows a progress bar.

    Communication:
        By every rank: one comparison of the layers, one all-reduce of 9 values before each batch, which says who
        has one, one of 2C + 15 for each layer and batch, and at the end one of C + 1 and one of C values a layer.
        A rank that has no batch left repeats its last one with weight zero, until no rank has a batch left.

    Raises:
        ValueError, TypeError, RuntimeError: on every rank alike, if an argument of any is wrong, the model has no such
            layer, the layers differ, a rank has no batch at all, or a loader or a batch fails on some rank.
    """
    if announcing.is_open():
        raise RuntimeError(
            f"{NAME} needs every rank, and ranks that have finished in syncbn.join do not follow it; received a call "
            "inside syncbn.join. Call it after the join."
        )
    error = _arguments_error(model, batches, num_batches)
    model = model if isinstance(model, nn.Module) else nn.Module()
    layers = [layer for layer in layers_of(model) if layer.track_running_stats and not site_of(layer).frozen]
    means = (layer.running_mean for layer in layers)
    somewhere = next((t for t in (*means, *model.parameters(), *model.buffers()) if t is not None), None)
    device = torch.device("cpu") if somewhere is None else somewhere.device  # even without a layer
    world = transports.choose(None, device.type)
    _require_layers(layers, world, error)
    bar = _bar(batches, num_batches, progress and world.rank == 0)
    with bar, torch.no_grad(), _eager(), recording(layers) as recorders:
        for batch, counts in _rounds(_inputs(batches, num_batches), world, device):
            for recorder in recorders:
                recorder.counts = counts
            model(*batch.args, **batch.kwargs)
            bar.update()
        merge_ranks(recorders, world, device)
    _commit(layers, recorders)


def _arguments_error(model: object, batches: object, num_batches: object) -> Exception | None:
    """Returns what is wrong with the arguments on this rank, or None."""
    if not isinstance(model, nn.Module):
        return TypeError(f"{NAME} needs a torch.nn.Module; received {type(model).__name__}. Pass the model.")
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str, bytes)):
        return TypeError(
            f"{NAME} needs an iterable of batches; received {type(batches).__name__} {shown(batches, 60)}. Pass a "
            "DataLoader or a list of batches; one batch as [batch]."
        )
    if num_batches is not None and (not isinstance(num_batches, int) or isinstance(num_batches, bool)):
        return TypeError(
            f"{NAME} needs an integer as num_batches, or None; received {shown(num_batches)}. None takes every batch."
        )
    if num_batches is not None and num_batches < 1:
        return ValueError(f"{NAME} needs num_batches >= 1; received {num_batches}. None takes every batch.")
    return None


class _Input(NamedTuple):
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _inputs(batches: Iterable[Any], num_batches: int | None) -> Iterator[_Input]:
    """Yields the arguments of the model."""
    for batch in islice(batches, num_batches):
        if isinstance(batch, Tensor):
            yield _Input((batch,), {})
        elif isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch):
            yield _Input((), batch)
        elif isinstance(batch, tuple | list) and batch:
            yield _Input((batch[0],), {})
        else:
            raise TypeError(
                f"{NAME} needs batches that are a tensor, a tuple or list that starts with the input, or a dict of "
                f"keyword arguments; received {type(batch).__name__}. Make a generator that yields one of these."
            )


def _rounds(inputs: Iterator[_Input], world: AbstractTransport, device: torch.device) -> Iterator[tuple[_Input, bool]]:
    """Yields inputs, and whether they count, until no rank has an input left."""
    last: _Input | None = None
    while True:
        mine, error = _next(inputs)
        flags = torch.tensor((mine is not None, error is not None), dtype=torch.float64, device=device)
        having, failed = gather.exchange(flags, world, NAME).tolist()
        if failed:
            gather.raise_gathered(error, world)
        if last is None and having < world.size:
            notes = gather.gather_notes("no batch" if mine is None else "some", world)
            raise ValueError(
                f"{NAME} needs at least one batch on every rank; received {gather.by_rank(notes, world.ranks)}. "
                "Give a rank without data a batch without samples, x[:0]."
            )
        if not having:
            return
        last = mine or last
        assert last is not None
        yield last, mine is not None


def _next(inputs: Iterator[_Input]) -> tuple[_Input | None, Exception | None]:
    """Returns the next input, or the error of the loader."""
    try:
        return next(inputs, None), None
    except Exception as error:  # any error: the other ranks must hear of it
        return None, error


def _commit(layers: list[SyncBatchNorm], recorders: list[Recorder]) -> None:
    """Writes the new statistics of all layers, or of none if one fails."""
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            write(layer, recorder)
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)
        raise


def write(layer: SyncBatchNorm, recorder: Recorder) -> None:
    """Writes what a recorder has summed into the running statistics of its layer."""
    if recorder.count <= 1:  # no batch reached the layer; with masks the count is a sum of weights
        return
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(recorder.mean)
    layer.running_var.copy_(recorder.m2 / (recorder.count - 1.0))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(recorder.calls)


def _require_layers(layers: list[SyncBatchNorm], world: AbstractTransport, error: Exception | None) -> None:
    """Raises on every rank unless all have the same layers, at least one, none of them lazy, and no error."""
    lazy = sum(layer.running_mean is not None and is_lazy(layer.running_mean) for layer in layers)
    counts = {
        "number of layers": len(layers),
        "number of channels": sum(layer.num_features for layer in layers),
        "number of lazy layers": lazy,
    }
    gather.require_equal(counts, world, NAME, "Build the same model on every rank.", error)
    if not layers or lazy:
        raise ValueError(
            f"{NAME} needs SyncBatchNorm layers that track running statistics, are not frozen and have seen an "
            f"input; received {len(layers)}, {lazy} of them lazy. Convert the model with "
            "syncbn.convert_sync_batchnorm, and run one batch through a lazy one."
        )


def _eager() -> AbstractContextManager[Any]:
    """Turns torch.compile off: its code was compiled for other modes of the layers."""
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def _bar(batches: Iterable[Any], num_batches: int | None, shown: bool) -> tqdm[Any]:
    length: int | None = None
    with suppress(Exception):  # of any kind, as of an IterableDataset: on this rank alone, the others would wait
        length = len(batches) if isinstance(batches, Sized) else None
    lengths = [n for n in (num_batches, length) if n is not None]
    return tqdm(desc="recalibrate", total=min(lengths, default=None), unit="batch", disable=not shown)
