# SPDX-License-Identifier: BSD-3-Clause
"""One order of the collectives of a compiled graph: each depends, by data, on the one before it.

A compiler may reorder operators that do not depend on each other, for example by size, and sizes differ between ranks.
An ordered effect does not stop inductor from doing so. So each collective takes the identity that the one before it
returned. The chain is built while AOTAutograd records a graph, for forward and for backward in the order of the
program. It ends with the graph, so no step keeps another step's graph alive. Without a graph, the program is the order.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_last: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()


def before() -> Tensor | None:
    """Returns the identity from the last collective of the graph being recorded, or None."""
    mode = get_proxy_mode()
    return None if mode is None else _last.get(mode.tracer)


def after(identity: Tensor) -> None:
    """Makes the next collective of the graph depend on this one."""
    mode = get_proxy_mode()
    if mode is not None:
        _last[mode.tracer] = identity.detach()


def keep(operator: Any) -> None:
    """Makes compilers run an operator exactly once, in forward, even if nothing uses its result.

    torch has no public interface for this yet.
    """
    from torch._higher_order_ops import effects

    effects._register_effectful_op(operator, effects._EffectType.ORDERED)
