# SPDX-License-Identifier: BSD-3-Clause
"""The calls of torch.compile and of second derivatives: the steps in torch operators, around registered all-reduces.

N batch, C channels, S product of the spatial dims, W ranks.

The wires are those of ``eager.py``, so a compiled rank and an eager rank can take part in one call.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.calls import keys, operators, renorm, sites
from syncbn.calls.operators import ANCHOR
from syncbn.calls.sites import Layer, Settings, Site
from syncbn.checks import problems
from syncbn.kernels.torch_ops import TorchKernels, local_sums
from syncbn.moments import ABSTAINS, BACKWARD, Message, Running, status_of
from syncbn.transports.base import AbstractTransport

STEPS = TorchKernels()
UNKNOWN = Message(ABSTAINS, 0, "", 0, 0)
"""Stands for an identity that an operator fills in when it runs."""


def begin(
    x: Tensor, mask: Tensor | None, running: Running | None, layer: Layer, device: torch.device, error: Exception | None
) -> CompiledCall:
    """Returns the call of a forward inside torch.compile. See ``syncbn.calls.eager.begin``."""
    number = layer.site.number if layer.site.compares else None
    key = keys.key_of_spec(layer.group, device.type)
    return CompiledCall(x, mask, number, layer.settings, key, running, error)


class _Operators:
    """What both calls have in common."""

    steps = STEPS
    _identity: Tensor
    _group: int

    def sums_message(self) -> Message:
        """See ``syncbn.calls.eager.Call.sums_message``."""
        return UNKNOWN

    def all_reduce_sums(self, wire: Tensor, message: Message) -> Tensor:
        """Sums a backward wire over the ranks. Its derivative makes two more sums of 2C + 7 values, and so on."""
        del message
        return operators.all_reduce(wire, ANCHOR, self._identity, self._group, BACKWARD)


@final
class CompiledCall(_Operators):
    """One forward of a compiled layer and its backward.

    Args:
        x: this rank's batch; without samples where ``error`` is given.
        mask: (N, 1, *spatial) or None.
        site: the number of the layer's site, int64 (), or None.
        settings: the layer's.
        group: the number of its group, see ``operators.py``.
        running: moved in place, or None.
        error: what is wrong with the input of this rank, or None.
    """

    traced = True
    numbers, message = UNKNOWN.numbers, UNKNOWN
    running = None
    """None, so that the kernels do not move the running statistics: ``finish`` does, in the graph."""
    hidden = None
    joins = True
    """Always True: while a graph is traced, no rank knows which ranks need a gradient."""

    def __init__(
        self,
        x: Tensor,
        mask: Tensor | None,
        site: Tensor | None,
        settings: Settings,
        group: int,
        running: Running | None,
        error: Exception | None,
    ) -> None:
        self._mask, self._site, self._settings, self._group = mask, site, settings, group
        self._running, self._fault, self.eps = running, problems.describe(error), settings[1]
        grad_enabled = torch.is_grad_enabled()
        self.status = status_of(error is not None, grad_enabled, True, x.dtype if x.numel() else None)
        self.anchor = ANCHOR if grad_enabled else None

    def local_moments(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See ``syncbn.calls.eager.Call.local_moments``."""
        return self.steps.local_moments(x, mask, self.numbers, self.status)

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``syncbn.calls.eager.Call.all_reduce``."""
        wire, self._identity, self._moves = operators.all_reduce_moments(
            wire, self._site, self._mask, self._group, self._fault, list(sites.as_floats(self._settings))
        )
        return wire

    def adjust(self, wire: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """See ``syncbn.calls.eager.Call.adjust``."""
        running, limits = self._running, self._settings[4]
        if limits is None or running is None:
            return weight, bias
        r, d = operators.renorm_correction(wire, running.mean, running.var, self.eps, *limits)
        return renorm.corrected(r, d, weight, bias)

    def finish(self, wire: Tensor) -> None:
        """Moves the running statistics."""
        if self._running is not None:
            with torch.no_grad():
                moments.update_running(self._running, wire, self._moves)


@final
class DifferentiableCall(_Operators):
    """The backward of an eager forward, in operators that autograd can differentiate again.

    Args:
        transport: the group.
        message: the identity of the forward.
        site: the layer.
    """

    def __init__(self, transport: AbstractTransport, message: Message, site: Site) -> None:
        speaks, _, *hash = message.numbers  # of direction 0
        self._identity = operators.pack_identity(int(site.number), speaks, message.serial, (hash[0], hash[1]))
        self._group = keys.key_of_transport(transport)

    def stats(self, x: Tensor, mask: Tensor | None, wire: Tensor, eps: float) -> Tensor:
        """Returns mean, invstd and count as functions of x, so that autograd can differentiate them.

        Args:
            x: (N, C, *spatial).
            mask: (N, 1, *spatial) or None.
            wire: float64 (2C + 15,), summed over the ranks by forward.
            eps: added to the variance.
        """
        sums = operators.replayed_all_reduce(local_sums(x, mask), moments.sums(wire), self._identity, self._group)
        count = moments.count(wire)
        mean, _, invstd = moments.finalize_sums(count, sums, eps)
        return torch.cat((mean, invstd, count.view(1)))
