# SPDX-License-Identifier: BSD-3-Clause
"""A transport that measures how long the collectives of a layer take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor

from syncbn import transports
from syncbn.calls.sites import agree_once, site_of
from syncbn.layer import SyncBatchNorm
from syncbn.moments import Message
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.wrapper import AbstractWrapper


@final
class Timer(AbstractWrapper):
    """Wraps a layer's transport and adds up the seconds of its all-reduces.

    A second derivative sends through the inner transport, and is not measured.

    Args:
        inner: the layer's transport.
        label: a name that no other timer has.
    """

    name = "timer"

    def __init__(self, inner: AbstractTransport, label: str) -> None:
        super().__init__(inner)
        self.spec = GroupSpec(self.name, inner.ranks, label)
        self.seconds = 0.0

    @property
    def sender(self) -> AbstractTransport:
        """See ``AbstractTransport.sender``."""
        return self.inner.sender

    @property
    def serial(self) -> int:
        """See ``AbstractTransport.serial``."""
        return self.inner.serial

    @serial.setter
    def serial(self, serial: int) -> None:
        self.inner.serial = serial

    def reduce(self, wire: Tensor, message: Message) -> Tensor:
        """Sums a wire over the ranks, and measures it."""
        began = time.perf_counter()
        try:
            return self.inner.reduce(wire, message)
        finally:
            self.seconds += time.perf_counter() - began


_numbers = itertools.count()
"""Reports of one model may be open inside each other."""


@contextmanager
def timed(layers: dict[str, SyncBatchNorm], device_type: str) -> Iterator[dict[str, Timer]]:
    """Measures the collectives of these layers. A forward inside is measured with its backward, wherever that is."""
    timers: dict[str, Timer] = {}
    try:
        for name, layer in layers.items():
            site = site_of(layer)
            transport = transports.choose(layer.process_group, device_type)
            agree_once(site, layer.settings(), transport, layer)
            timers[name] = Timer(transport, f"{name} {id(layer)} {next(_numbers)}")
            site.enter(transports.adopt(timers[name], device_type))
        yield timers
    finally:
        for name, timer in timers.items():
            transports.discard(timer, device_type)
            site_of(layers[name]).leave()
