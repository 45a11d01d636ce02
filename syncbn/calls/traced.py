# SPDX-License-Identifier: BSD-3-Clause
"""A layer in a graph of torch.fx: one node, in training and in eval, as for torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Tensor, "Tensor | None"], Tensor]


def is_proxy(x: object) -> bool:
    """Whether x stands for a tensor in torch.fx."""
    return isinstance(x, torch.fx.Proxy)


def is_leaf(layer: nn.Module, forward: object) -> bool:
    """Whether the graph can call the layer as a whole, whose class has this forward.

    It cannot if torch.fx records into the graph what the layer would then do again: its hooks, or what the forward of
    a subclass adds.
    """
    return type(layer).forward is forward and not (layer._forward_hooks or layer._forward_pre_hooks)


def call(layer: nn.Module, x: Any, mask: Any) -> Any:
    """Records a call of a layer.

    Args:
        layer: a module of the model that is traced.
        x: a torch.fx.Proxy.
        mask: a torch.fx.Proxy, a tensor, or None.

    Returns:
        The torch.fx.Proxy of the output.
    """
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), _options(mask))


def call_inner(forward: Forward, layer: nn.Module, x: Any, mask: Any) -> Any:
    """Records a call of ``forward(layer, x, mask=mask)``, for a layer whose hooks or own forward are in the graph.

    Args:
        forward: a function of a module, so that the graph can name it.
        layer: a module of the model that is traced.
        x: a torch.fx.Proxy.
        mask: a torch.fx.Proxy, a tensor, or None.

    Returns:
        The torch.fx.Proxy of the output.
    """
    module = x.tracer.create_proxy("get_attr", x.tracer.path_of_module(layer), (), {})
    return x.tracer.create_proxy("call_function", forward, (module, x), _options(mask))


def _options(mask: Any) -> dict[str, Any]:
    return {} if mask is None else {"mask": mask}
