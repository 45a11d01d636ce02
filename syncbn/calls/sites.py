# SPDX-License-Identifier: BSD-3-Clause
"""What a layer keeps for its calls: its name, its group, and in which groups its settings have been compared.

Every message carries three integers below ``moments.LIMIT``: the serial of the forward in its group, and a 36-bit hash
of layer, settings and direction. If they are equal on all ranks, all ranks are in one call. See docs/decisions/0007.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch

from syncbn import moments
from syncbn.checks import inputs
from syncbn.transports import gather
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.waits import status

Settings = tuple[int, float, float | None, bool, "tuple[float, float] | None"]
"""What must be equal on every rank, in the order of ``SETTINGS``. A compiled graph holds it as ``as_floats``."""
SETTINGS = ("num_features", "eps", "momentum (-1 is None)", "track_running_stats", "r_max", "d_max")
NO_RENORM = (1.0, 0.0)

_KEPT = ("kind", "group", "compares", "replays", "name", "frozen", "renorm", "converted_from")
_numbers = itertools.count(1)
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


@final
class Site:
    """What a layer keeps beside its parameters and buffers.

    Args:
        kind: the class, by which errors call a layer without a name.
        group: the ranks to synchronise over.
        compares: whether the ranks compare name and settings at the first call in a group.
        replays: True if a forward inside backward is one that activation checkpointing repeats.
    """

    def __init__(
        self, kind: str, group: GroupSpec | None = None, *, compares: bool = True, replays: bool = True
    ) -> None:
        self.kind, self.group, self.compares, self.replays = kind, group, compares, replays
        self.name = ""
        """The qualified name in the model, see ``syncbn.name_layers``."""
        self.frozen = False
        """Whether the layer stays in eval after ``train()``, see ``syncbn.freeze``."""
        self.renorm: tuple[float, float] | None = None
        self.converted_from: type | None = None
        self._own_groups: list[GroupSpec | None] = []
        self._begin()

    def _begin(self) -> None:
        self.orders: dict[int, int] = {0: 0}
        """The order of first use in each group that has compared the settings, by the group_id of the group."""
        self.label = self.kind
        """How errors call the layer; set by ``hash``."""
        self._seen: tuple[object, ...] = ()
        self._hash = (0, 0)
        self.module: weakref.ref[torch.nn.Module] | None = None
        """The layer, once it has been in a call: the watchdog asks whether it is in eval mode."""
        number = next(_numbers)
        self.number = torch.tensor(number, dtype=torch.int64, device="cpu")
        """int64 (), unique in this process. A compiled graph holds it in place of the site."""
        _sites[number] = self  # last, since the watchdog's thread may read it from now on

    def state(self) -> dict[str, Any]:
        """Returns the layer's description as plain values, for copies and pickles. These compare settings anew."""
        own = self._own_groups[0] if self._own_groups else self.group
        return {**{name: self.__dict__[name] for name in _KEPT}, "group": own}

    def enter(self, group: GroupSpec | None) -> None:
        """Uses another group until ``leave``. A copy keeps the layer's own group."""
        self._own_groups.append(self.group)
        self.group = group

    def leave(self) -> None:
        """Undoes ``enter``."""
        self.group = self._own_groups.pop()

    @staticmethod
    def of_state(state: dict[str, Any]) -> Site:
        """Makes an equal site, whose settings are compared again at its first use."""
        site = Site(state["kind"])
        site.__dict__.update(state)
        return site

    def hash(self, settings: Settings, group_id: int) -> tuple[int, int]:
        """Returns a 36-bit hash of name, settings and order of first use."""
        order = self.orders.get(group_id, 0)
        seen = settings, order, self.name
        if seen != self._seen:
            self._hash = moments.text_hash(f"{self.name or self.kind}|{order}|{as_floats(settings)}")
            self._seen, self.label = seen, f"'{self.name}'" if self.name else f"{self.kind}({settings[0]})"
        return self._hash

    def notes(self, settings: Settings, group_id: int) -> tuple[str, str]:
        """Returns two texts for errors: which layer of the group this is, and its settings."""
        order = self.orders.get(group_id, 0)
        values = zip(SETTINGS, as_floats(settings), strict=True)
        return f"layer {order} of the group", ", ".join(f"{name}={value:g}" for name, value in values)


class Layer(NamedTuple):
    """What a call needs to know of its layer."""

    site: Site
    settings: Settings
    group: GroupSpec | None
    """The ranks to synchronise over."""
    owner: Any = None
    """The layer, or a tensor of it, under which first calls are kept for activation checkpointing; or None."""


def as_floats(settings: Settings) -> tuple[float, ...]:
    """Returns the settings as numbers, in the order of ``SETTINGS``."""
    C, eps, momentum, tracks, renorm = settings
    return float(C), float(eps), -1.0 if momentum is None else float(momentum), float(tracks), *(renorm or NO_RENORM)


def plain(settings: Settings) -> Settings:
    """Returns settings whose eps and momentum are floats, whatever was assigned. NaN stands for what is no number."""
    C, eps, momentum, tracks, renorm = settings
    return C, inputs.number(eps), None if momentum is None else inputs.number(momentum), tracks, renorm


def of_floats(values: Sequence[float]) -> Settings:
    """Undoes ``as_floats``."""
    C, eps, momentum, tracks, *renorm = values
    limits = None if tuple(renorm) == NO_RENORM else (renorm[0], renorm[1])
    return int(C), eps, None if momentum == -1.0 else momentum, bool(tracks), limits


def agree_once(site: Site, settings: Settings, transport: AbstractTransport, module: Any = None) -> None:
    """Compares name and settings of a layer over the ranks, if this is its first training step in the group.

    Args:
        site: the layer.
        settings: its settings on this rank.
        transport: the group.
        module: the layer, or None.

    Communication:
        One all-reduce of 7 W + 7 float64 values, by every rank of the group; one more of texts if names differ.

    Raises:
        ValueError: on every rank, with the values that differ and the ranks that hold them.
    """
    if transport.group_id in site.orders or not site.compares:
        return
    name, values = f"'{site.name}'" if site.name else site.kind, as_floats(settings)
    remedy = "Build the same model on every rank."
    row = torch.tensor([float(moments.text_hash(name)[0]), *values], dtype=torch.float64, device="cpu")
    table = gather.gather(row, transport, f"the first forward of a {site.kind}")
    if table[:, 0].min() < table[:, 0].max():
        received = gather.by_rank(gather.gather_notes(name, transport), transport.ranks)
        raise ValueError(
            f"All ranks must be in one call; received the first forward of {received}. Ranks took different branches, "
            f"or their models differ. {remedy}"
        )
    what = f"{site.kind} {name}" if site.name else site.kind
    gather.raise_unless_equal(table[:, 1:], SETTINGS, transport, what, remedy)
    site.orders[transport.group_id] = next_order(transport)
    if isinstance(module, torch.nn.Module):
        site.module = weakref.ref(module)


def in_eval_mode() -> list[str]:
    """Returns the names of layers that have been in a call and are in eval mode now."""
    sites = [site for ref in _sites.valuerefs() if (site := ref()) is not None]  # at once: another thread may add one
    modules = [(site.label, site.module()) for site in sites if site.module is not None]
    return [label for label, module in modules if module is not None and not module.training]


status.describers.append(in_eval_mode)


def site_of(layer: Any) -> Site:
    """Returns the site of a SyncBatchNorm."""
    site: Site = layer._site
    return site


def of_number(number: int) -> Site | None:
    """Returns the site with this number, or None if the layer is gone."""
    return _sites.get(number)


def next_order(transport: AbstractTransport) -> int:
    """Returns the order of first use for the next layer of a group."""
    transport.layers += 1
    return transport.layers
