# SPDX-License-Identifier: BSD-3-Clause
"""One forward of a layer and its backward, in eager mode. ``functional.py`` uses every call as it uses this one.

A call knows its kernels, its group, its identity, and what the ranks have agreed on.

N batch, C channels, S product of the spatial dims, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from syncbn import kernels, transports
from syncbn.calls import checkpointing
from syncbn.calls.compiled import DifferentiableCall
from syncbn.calls.operators import ANCHOR
from syncbn.calls.renorm import Renormalize, RenormLimits
from syncbn.calls.sites import Layer, agree_once
from syncbn.checks import inputs, problems
from syncbn.checks.kinds import NAME
from syncbn.kernels.base import NEEDED, PROBLEM, RECORDS
from syncbn.moments import ABSTAINS, BACKWARD, FORWARD, LIMIT, Message, Numbers, Running, record, status_of
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport, MismatchError

Pair = tuple[Tensor | None, Tensor | None]
_status = cache(status_of)
Adjust = Callable[[Tensor, Running | None, float, Tensor | None, Tensor | None], Pair]
"""Takes (wire, running, eps, weight, bias) and returns weight and bias. Runs before the running statistics move."""


def begin(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    layer: Layer,
    device: torch.device,
    error: Exception | None,
) -> Call:
    """Returns the call of a forward.

    Communication:
        One comparison of the settings, the first time that a layer is used in a group.
    """
    site, settings, group, owner = layer
    owner = checkpointing.NOBODY if owner is None else owner
    transport = transports.choose(group, device.type)
    grad_enabled = torch.is_grad_enabled()
    checkpointed = site.replays and checkpointing.concerns(grad_enabled)
    if transport.group_id not in site.orders and not (checkpointed and checkpointing.repeats(owner)):
        agree_once(site, settings, transport, owner)
    needs_grad = x.requires_grad or (weight is not None and weight.requires_grad)
    needs_grad = needs_grad or (bias is not None and bias.requires_grad)
    limits = settings[4]
    adjust = None if limits is None else Renormalize(RenormLimits(*limits))
    call = Call(x, mask, needs_grad, layer, transport, running, error, adjust)
    if checkpointed:
        call.watch(checkpointing.Replay(transport, owner, call.message, error, adjust))
    return call


@final
class Call:
    """One forward and its backward.

    Args:
        x: this rank's batch; without samples where ``error`` is given.
        mask: (N, 1, *spatial) or None.
        needs_grad: whether x, weight or bias requires a gradient.
        layer: the layer that is called.
        transport: the group.
        running: moved in place, or None.
        error: what is wrong with the input of this rank, or None.
        adjust: what adjusts weight and bias, or None.
    """

    traced = False
    __slots__ = (
        "_adjust", "_error", "_grad_enabled", "_mask", "_settings", "_site", "_x", "anchor", "eps", "hidden",
        "joins", "message", "numbers", "running", "status", "steps", "transport",
    )  # fmt: skip

    def __init__(
        self,
        x: Tensor,
        mask: Tensor | None,
        needs_grad: bool,
        layer: Layer,
        transport: AbstractTransport,
        running: Running | None,
        error: Exception | None,
        adjust: Adjust | None,
    ) -> None:
        site, settings, _, _ = layer
        self.steps = (
            kernels.choose(x) if mask is None and x.is_cpu else kernels.for_call(x, mask is not None, transport)
        )
        self.transport, self.running, self.eps = transport, running, settings[1]
        self._site, self._settings, self._error, self._adjust = site, settings, error, adjust
        self._grad_enabled = grad_enabled = torch.is_grad_enabled()
        self.anchor = None if needs_grad else ANCHOR
        self._x: Tensor | None = x  # for errors, as the mask is; dropped once the ranks have agreed
        self._mask = mask
        self.status = _status(error is not None, grad_enabled, needs_grad, x.dtype if x.numel() else None)
        serial = transport.serial
        a, b = site.hash(settings, transport.group_id)
        self.numbers: Numbers = (1, serial % LIMIT, a, b)
        self.message = record(Message, (self.numbers, transport.size, site.label, FORWARD, serial))
        self.joins = True
        self.hidden: AbstractContextManager[Any] | None = None

    def watch(self, replay: checkpointing.Replay) -> None:
        """Lets activation checkpointing repeat this call."""
        self.transport, self._adjust, self.hidden = replay, replay.adjust, checkpointing.unseen()

    def local_moments(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the local moments of x; if they cannot be computed, those of no samples, and the error travels."""
        try:
            return self.steps.local_moments(x, mask, self.numbers, self.status)
        except Exception as error:  # of any kind: a tensor of a kind that no check knows, or no memory left
            received = f"{type(x).__name__}: {type(error).__name__}: {error}"
            self._error = RuntimeError(f"{NAME} needs an input that it can sum; received a {received}")
            self._x, self._mask = torch.empty(0, self._settings[0], device=x.device), None
            self.status = _status(True, self._grad_enabled, False, None)
            return self.steps.local_moments(self._x, None, self.numbers, self.status)

    def all_reduce(self, wire: Tensor) -> Tensor:
        """Sums a forward wire over the ranks. If it shows an error on any rank, all ranks raise it.

        Raises:
            ValueError, TypeError: on every rank of the group; with deferred kernels, at a later call.
        """
        transport, x = self.transport, self._x
        assert x is not None
        try:
            wire = transport.reduce(wire, self.message)
        except MismatchError as error:
            raise gather.calls_differ(self.message, self._notes, transport, str(error)) from error
        if transport.repeated is None:
            transport.serial += 1  # even if this rank raises below: the others may raise later or not at all
        else:
            self.message, self.running = transport.repeated, None
        agreed = self.steps.agreement(wire, self.message)
        if agreed is None:  # the device compares, and its error is deferred
            if self._error is not None:
                raise problems.alone(self._error, transport)
        elif agreed == PROBLEM:
            self._raise(wire, x)
        else:
            # The no_grad first forward could not tell who needs a gradient, so in its repeat every rank joins backward.
            # Ranks whose GPU reads the counters cannot tell either.
            unneeded = not agreed & NEEDED and (agreed & RECORDS or not self._grad_enabled)
            self.joins = not unneeded or (x.is_cuda and problems.is_late(x, transport))
        self._x = self._mask = None
        return wire

    def _raise(self, wire: Tensor, x: Tensor) -> None:
        counters = self.steps.read_counters(wire, self.message)
        assert counters is not None
        problems.raise_problem(
            counters,
            self.message,
            self._notes,
            self.transport,
            x=x,
            error=self._error or inputs.mask_values_error(self._mask),
            grad_enabled=self._grad_enabled,
            late=problems.is_late(x, self.transport),
        )

    def adjust(self, wire: Tensor, weight: Tensor | None, bias: Tensor | None) -> Pair:
        """Returns the weight and bias to normalise with."""
        return (weight, bias) if self._adjust is None else self._adjust(wire, self.running, self.eps, weight, bias)

    def finish(self, wire: Tensor) -> None:
        """Does nothing: the kernels have moved the running statistics."""

    def sums_message(self) -> Message:
        """Returns the identity of the backward."""
        # As in the forward, even if the layer has another group by now. Who abstained there abstains again.
        (speaks, serial, a, b), W, label, _, number = self.message
        numbers = (speaks, serial, (a + BACKWARD) % LIMIT, b) if speaks else ABSTAINS
        return record(Message, (numbers, W, label, BACKWARD, number))

    def all_reduce_sums(self, wire: Tensor, message: Message) -> Tensor:
        """Sums a backward wire over the ranks.

        Raises:
            ValueError: on every rank, if some are in another call; with deferred kernels, at a later call.
        """
        transport = self.transport
        try:
            wire = transport.reduce(wire, message)
        except MismatchError as error:
            raise gather.calls_differ(message, self._notes, transport, str(error)) from error
        if not self.steps.check_sums(wire, message):
            raise gather.calls_differ(message, self._notes, transport)
        return wire

    def differentiable(self, x: Tensor, mask: Tensor | None, wire: Tensor) -> tuple[DifferentiableCall, Tensor]:
        """Returns this call and its statistics in operators that autograd differentiates again (create_graph=True)."""
        call = self.batched()
        return call, call.stats(x, mask, wire, self.eps)

    def batched(self) -> DifferentiableCall:
        """Returns this call in operators that take many gradients at once and send a message for each."""
        return DifferentiableCall(self.transport.sender, self.message, self._site)

    def _notes(self) -> tuple[str, str]:
        return self._site.notes(self._settings, self.transport.group_id)
