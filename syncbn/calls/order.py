# SPDX-License-Identifier: BSD-3-Clause
"""One order of the collectives of a compiled graph: each depends, by data, on the one before it.

A compiler may exchange operators that do not depend on each other, by size for example, and sizes differ between
ranks. An ordered effect does not keep inductor from it. So each collective takes the identity that the one before it
returned. The chain is made while AOTAutograd records a graph, forward and backward in the order of the program, and
ends with the graph: nothing of a step is kept for the next one. Where no graph is recorded the program is the order.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_last: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


def before() -> Tensor | None:
    """Returns what the last collective of the graph that is being recorded returned, if there is one."""
    mode = get_proxy_mode()
    return None if mode is None else _last.get(mode.tracer)


def after(identity: Tensor) -> None:
    """Makes the next collective of the graph depend on this one."""
    mode = get_proxy_mode()
    if mode is not None:
        _last[mode.tracer] = identity.detach()


def keep(operator: Any) -> None:
    """Makes compilers run an operator once, in forward, also where nothing uses its result.

    The interface is torch's, but not public yet.
    """
    from torch._higher_order_ops import effects

    effects._register_effectful_op(operator, effects._EffectType.ORDERED)
