# SPDX-License-Identifier: BSD-3-Clause
"""Whether one module normalises over the batch, and over whose: by its class, buffers, graph and bytecode.

Classes of other libraries are recognised by their names and buffers, so that none is imported.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from syncbn.calls.sites import site_of
from syncbn.convert import bytecode, known, obstacles
from syncbn.layer import SyncBatchNorm
from syncbn.transports import groups

NOT_YET = "not converted yet: call syncbn.convert_sync_batchnorm"
_RUNNING = re.compile(r"(running|moving)_(mean|var|variance|std)")
_NO_STATS_VARIANT = re.compile(r"no_training|no_update|elemt")
"""Operators that normalise by given statistics."""


class Standing(NamedTuple):
    """What is to say of a module."""

    kind: str
    synchronised: bool
    local: bool
    reason: str


def of(module: nn.Module, *, model_trains: bool) -> Standing | None:
    """Judges one module, without its submodules. None if it neither normalises over the batch nor keeps statistics.

    Args:
        module: the module.
        model_trains: whether the model that it is in is in training mode.
    """
    kind = type(module).__name__
    if isinstance(module, SyncBatchNorm):
        return Standing(kind, *_of_ours(module, model_trains))
    if is_batch_norm(module):
        scripted = isinstance(module, torch.jit.ScriptModule)
        return Standing(str(module.original_name) if scripted else kind, *_of_batch_norm(module))
    if isinstance(module, _InstanceNorm):
        reason = "instance norm: each sample for itself; its running statistics, for eval, are of this rank's batches"
        return Standing(kind, False, False, reason) if module.track_running_stats else None
    graph = _graph(module)
    found = _of_unknown(module) if graph is None else _of_graph(graph)
    return None if found is None else Standing(kind, *found)


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether a module is a batch norm of torch, a subclass of one, or a scripted one."""
    scripted = isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in str(layer.original_name)
    return isinstance(layer, _BatchNorm) or scripted


def channels(module: nn.Module) -> int | None:
    """Returns C, or None if it is not known."""
    stated = getattr(module, "num_features", None)
    if isinstance(stated, int) and stated > 0:
        return stated
    known = [buffer for buffer in _running(module) if buffer is not None and not is_lazy(buffer) and buffer.ndim]
    return int(known[0].shape[-1]) if known else None


def _of_ours(layer: SyncBatchNorm, model_trains: bool) -> tuple[bool, bool, str]:
    if obstacle := obstacles.to_ours(layer, known.table()):
        return False, True, obstacle
    if site_of(layer).frozen:
        return False, False, "frozen by syncbn.freeze: uses its running statistics"
    group = layer.process_group
    if group == groups.ALONE:
        return False, True, "uses the local batch alone: inside syncbn.no_sync"
    if group is not None and (group.size == 1 or len(group.ranks) == 1):
        return False, True, f"uses the local batch alone: {group}"
    over = f"synchronised over {'all ranks' if group is None else group}"
    return True, False, over if layer.training or not model_trains else f"{over} in training; it is in eval"


def _of_batch_norm(layer: nn.Module) -> tuple[bool, bool, str]:
    if type(layer) is nn.SyncBatchNorm:
        return True, False, "synchronised by torch, on GPUs only; syncbn.convert_sync_batchnorm converts it"
    obstacle = obstacles.to_ours(layer, known.table())
    if not obstacle:
        return False, True, NOT_YET
    return _by_its_name(layer) or (False, True, f"cannot be converted: {obstacle}")


def _by_its_name(module: nn.Module) -> tuple[bool, bool, str] | None:
    """Recognises frozen batch norms, and those that synchronise in a way of their own."""
    name = type(module).__name__.lower()
    if "frozen" in name:
        return False, False, "frozen: its class uses no batch statistics"
    if "sync" in name and ("norm" in name or "abn" in name):
        return False, False, "its class synchronises in its own way, not by syncbn"
    return None


def _of_unknown(module: nn.Module) -> tuple[bool, bool, str] | None:
    if isinstance(module, torch.jit.ScriptModule):
        return _of_script(module)
    forward = getattr(type(module), "forward", None)
    if forward is nn.Module.forward and "forward" not in vars(module):
        return None  # a container
    buffers = _running(module)
    if buffers and (known := _by_its_name(module)):
        return known
    calls = sorted(bytecode.batch_norm_calls(module))
    if calls == [bytecode.OURS]:
        return True, False, f"synchronised: its forward calls {bytecode.OURS}"
    theirs = ", ".join(name for name in calls if name != bytecode.OURS)
    if buffers:
        how = f"; its forward calls {theirs}" if theirs else ""
        return False, True, f"its class is unknown to syncbn{how}; pass replace= to syncbn.convert_sync_batchnorm"
    if theirs:
        return False, True, f"its forward calls {theirs}; use a layer, or {bytecode.OURS}"
    return None


def _of_script(module: torch.jit.ScriptModule) -> tuple[bool, bool, str] | None:
    if not getattr(module, "training", False) or not hasattr(module, "forward"):
        return None
    calls = re.search(r'aten::batch_norm\(|prim::Constant\[name="batch_norm"\]', str(module.graph))
    return (False, True, "its compiled graph calls batch_norm; convert before torch.jit.script") if calls else None


def _graph(module: nn.Module) -> fx.Graph | None:
    found = vars(module).get("_graph", vars(module).get("graph"))  # of a GraphModule, or of an unflattened one
    return found if isinstance(found, fx.Graph) else None


def _of_graph(graph: fx.Graph) -> tuple[bool, bool, str] | None:
    """Counts the batch norms among the nodes of a graph, by operator."""
    trains: dict[str, int] = {}
    in_eval = 0
    for node in graph.nodes:
        name = bytecode.op_name(node.target) if node.op == "call_function" else ""
        if not name or _NO_STATS_VARIANT.search(name):
            in_eval += bool(name)
        elif _argument_training(node, name):
            operator = name.removesuffix(".default")
            trains[operator] = trains.get(operator, 0) + 1
        else:
            in_eval += 1
    if trains:
        times = ", ".join(f"{name} {count} time{'s' if count > 1 else ''}" for name, count in trains.items())
        return False, True, f"graph of torch.export or torch.fx: calls {times}; convert before the export"
    if in_eval:
        return False, False, "graph of torch.export or torch.fx, in eval: uses its running statistics"
    return None


def _argument_training(node: fx.Node, name: str) -> bool:
    """Whether a node normalises by batch statistics. One that the graph computes counts."""
    if "with_update" in name or "stats" in name.removesuffix("no_stats"):
        return True
    at = 3 if name.endswith("no_stats") else bytecode.TRAINING_AT
    given: Any = node.kwargs.get("training", node.args[at] if len(node.args) > at else False)
    return given is not False


def _running(module: nn.Module) -> list[torch.Tensor | None]:
    """Returns the buffers of running statistics; None for one that is registered and switched off."""
    return [buffer for name, buffer in module._buffers.items() if _RUNNING.fullmatch(name)]
