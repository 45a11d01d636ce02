# SPDX-License-Identifier: BSD-3-Clause
"""drift(): opens a report and hangs a hook before every batch norm of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from syncbn import transports
from syncbn.calls.checkpointing import unseen
from syncbn.calls.sites import site_of
from syncbn.convert.selection import require_module
from syncbn.layer import SyncBatchNorm
from syncbn.training.drift import local
from syncbn.training.drift.report import Report
from syncbn.training.drift.sums import Layer, Sums
from syncbn.training.drift.timing import Timer, timed
from syncbn.transports import announcing, gather
from syncbn.transports.base import AbstractTransport
from syncbn.transports.specify import specify

NAME = "syncbn.drift"
_in_backward = torch._C._current_graph_task_id


@contextmanager
def drift(model: nn.Module, process_group: Any = None) -> Iterator[Report]:
    """Measures, for each batch norm, how far local statistics are from those of the global batch.

    Put it around some training steps, on every rank. Each call of a batch norm in training mode is measured: torch's,
    those of its subclasses, and SyncBatchNorm, which shows what it would drift without synchronisation. The model,
    its statistics, gradients and random state stay as they are without the report, bit for bit. A forward that
    activation checkpointing repeats in backward is not measured again.

    Args:
        model: the model, plain or in DistributedDataParallel, with equal layers on every rank.
        process_group: the ranks that share a batch; None for every rank. As for ``SyncBatchNorm``.

    Yields:
        A ``syncbn.training.drift.report.Report``, which grows with every step and can be read after the block.

    Communication:
        Entering: one comparison of the layers; for a SyncBatchNorm that has not trained yet, that of its settings.
        Inside: one all-reduce of W * (4C + 3) + 7 float64 values for each call of a layer, by every rank, also with an
        empty local batch. Where W * C exceeds 32768, evenly spaced channels are measured, so that it stays at 1 MB.
        Leaving: none, and none afterwards.

    Raises:
        ValueError: on every rank, if the model has no batch norm, a lazy one, or other layers on another rank; inside,
            if ranks call their layers in different order or number.
        RuntimeError: on every rank, if the model is compiled, or inside ``syncbn.join``.
    """
    require_module(model, NAME)
    if announcing.is_open():
        raise RuntimeError(
            f"{NAME} needs every rank when it opens, and ranks that have finished in syncbn.join do not follow it; "
            "received a call inside syncbn.join. Open it around the join."
        )
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    layers = {name: layer for name, layer in inner.named_modules() if isinstance(layer, _BatchNorm)}
    tensors = (t for part in (*layers.values(), inner) for t in (*part.parameters(), *part.buffers()))
    device_type = next((t.device.type for t in tensors), "cpu")
    world = transports.choose(specify(process_group), device_type)
    widths = {"number of batch norms": len(layers), "number of their channels": _channels(layers)}
    gather.require_equal(widths, world, NAME, "Build the same model on every rank.", _refusal(inner, layers))
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, SyncBatchNorm)}
    report = Report(world.rank, world.ranks)
    with timed(ours, device_type) as timers:
        hooks = []
        try:
            for name, layer in layers.items():
                meter = Meter(name, layer, world, report, timers.get(name))
                hooks.append(layer.register_forward_pre_hook(_Hook(meter.before), with_kwargs=True))
            yield report
        finally:
            for hook in hooks:
                hook.remove()


@final
class Meter:
    """Measures the calls of one layer.

    Args:
        name: its name in the model.
        layer: the layer.
        world: the ranks.
        report: takes the sums at the first call, so that its rows are in the order of the calls.
        timer: what measures its collectives, or None.
    """

    def __init__(
        self, name: str, layer: _BatchNorm, world: AbstractTransport, report: Report, timer: Timer | None
    ) -> None:
        C, W = layer.num_features, world.size
        self._name, self._world, self._report, self._timer = name, world, report, timer
        self._chosen, self._calls = local.channels(C, W), 0
        self._replays = not isinstance(layer, SyncBatchNorm) or site_of(layer).replays
        synchronised = isinstance(layer, nn.SyncBatchNorm) or (timer is not None and timer.size > 1)
        tracks = layer.running_mean is not None and layer.running_var is not None
        about = Layer(name, type(layer).__name__, C, synchronised, tracks)
        self._sums = Sums(about, C if self._chosen is None else len(self._chosen), W)

    def before(self, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sends this rank's statistics of a call and adds those of all ranks. Runs before the layer's forward."""
        if not layer.training or (self._replays and _in_backward() != -1):
            return
        self._calls += 1
        ours = isinstance(layer, SyncBatchNorm)
        x: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
        mask = (args[1] if len(args) > 1 else kwargs.get("mask")) if ours else None
        seconds = 0.0 if self._timer is None else self._timer.seconds
        with torch.no_grad(), unseen():
            row = local.row(layer, x, mask, self._chosen, seconds)
            what = f"{NAME} before the forward of '{self._name}', call {self._calls} of it"
            self._sums.add(gather.gather(row, self._world, what))
        self._report.sums.setdefault(self._name, self._sums)


@final
class _Hook:
    """A forward pre-hook. In a copy of the model or a saved one it does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        if (
            method is not None and "torch._dynamo" in sys.modules
        ):  # it communicates: a compiled function must not trace it
            method = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        """Pickles without the report, whose transport is live."""
        return _Hook, ()


def _channels(layers: dict[str, _BatchNorm]) -> int:
    return sum(layer.num_features for layer in layers.values())


def _refusal(model: nn.Module, layers: dict[str, _BatchNorm]) -> Exception | None:
    """Returns why a model cannot be measured, or None."""
    if any(_is_compiled(module) for module in model.modules()):
        return RuntimeError(
            f"{NAME} needs a model that is not compiled, since compiled code runs without its hooks and has other bits "
            "than the model; received a compiled one. Open the report on the model before torch.compile."
        )
    lazy = [name for name, layer in layers.items() if layer.num_features == 0 or _is_lazy(layer)]
    if not layers or lazy:
        received = f"lazy ones: {', '.join(map(repr, lazy))}. Run one batch through the model first" if lazy else "none"
        return ValueError(f"{NAME} needs a model with batch norms that have seen an input; received {received}.")
    return None


def _is_lazy(layer: _BatchNorm) -> bool:
    return any(t is not None and is_lazy(t) for t in (layer.weight, layer.running_mean))


def _is_compiled(module: nn.Module) -> bool:
    wrapped = type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")
    return wrapped or isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None
