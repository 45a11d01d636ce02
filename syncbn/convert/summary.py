# SPDX-License-Identifier: BSD-3-Clause
"""Which modules of a model normalise over the batch, which of them are synchronised, and why the others are not.

``bytecode.py`` reads which functions a forward calls, ``unregistered.py`` finds modules outside of torch's registry.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

from tabulate import tabulate
from torch import nn

from syncbn.convert import standing, unregistered
from syncbn.convert.selection import require_module
from syncbn.layer import SyncBatchNorm

_NAMED = 10
"""How many modules a warning names."""


class Row(NamedTuple):
    """What a summary says of one module."""

    name: str
    """Its qualified name in the model; empty for the model itself."""
    kind: str
    """Its class."""
    channels: int | None
    """C, if known. A lazy layer has none before its first input."""
    synchronised: bool
    """Whether its training uses the batch of more than this process, if there are more."""
    local: bool
    """Whether its training uses the local batch alone. A frozen layer is neither synchronised nor local."""
    reason: str
    """Why."""


@final
class Summary:
    """The rows of a model. ``str`` makes a table of them.

    Args:
        rows: a row for each module.
        model: the class of the model.
    """

    def __init__(self, rows: Sequence[Row], model: str) -> None:
        self.rows = list(rows)
        self._model = model

    @property
    def unsynchronised(self) -> list[Row]:
        """The rows of modules whose training uses the local batch alone."""
        return [row for row in self.rows if row.local]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns the rows as dictionaries."""
        return [row._asdict() for row in self.rows]

    def to_json(self) -> str:
        """Returns the rows as one JSON document, a list of objects."""
        return json.dumps(self.to_dicts(), indent=2)

    def __str__(self) -> str:
        if not self.rows:
            return f"No module of {self._model} normalises over the batch or holds running statistics."
        cells = [
            (
                row.name or "(the model)",
                row.kind,
                "?" if row.channels is None else row.channels,
                "yes" if row.synchronised else "NO" if row.local else "-",
                row.reason,
            )
            for row in self.rows
        ]
        synchronised = sum(row.synchronised for row in self.rows)
        table = tabulate(cells, ["name", "class", "C", "synchronised", "why"], disable_numparse=True)
        return f"{table}\n{len(cells)} in all: {synchronised} synchronised, {len(self.unsynchronised)} not."

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """Lists every module that normalises over the batch or holds running statistics, and whether it is synchronised.

    Beside batch norms these are: classes of other libraries with running statistics, modules whose forward calls
    ``F.batch_norm``, graphs of torch.export and torch.fx that do, and batch norms in a Python list or dict.
    Layer norm, group norm and instance norm without running statistics are not listed.

    Args:
        model: a model, or one layer; converted or not, wrapped or not, on any device.

    Returns:
        A ``syncbn.convert.summary.Summary``: ``print`` it, or use its ``rows``, ``unsynchronised``, ``to_dicts()``
        and ``to_json()``.

    Communication:
        None.
    """
    require_module(model, "summary")
    return Summary([row for row, _ in _rows(model)], type(model).__name__)


def warn_of_local(model: nn.Module, ignore: Iterable[nn.Module] = ()) -> None:
    """Warns, once, if modules of a converted model use the local batch alone.

    Args:
        model: the model.
        ignore: modules that were left out on purpose.
    """
    wanted = {id(module) for module in ignore}
    found = ((row, module) for row, module in _rows(model) if row.local and id(module) not in wanted)
    local = [row for row, module in found if not isinstance(module, SyncBatchNorm)]  # those are local as asked for
    if not local:
        return
    lines = [f"  {row.name or '(the model)'} ({row.kind}): {row.reason}" for row in local[:_NAMED]]
    if len(local) > _NAMED:
        lines.append(f"  and {len(local) - _NAMED} more")
    who = "1 module that uses" if len(local) == 1 else f"{len(local)} modules that use"
    text = "\n".join([f"convert_sync_batchnorm left {who} the local batch alone:", *lines])
    warnings.warn(f"{text}\nsyncbn.summary(model) lists all.", UserWarning, stacklevel=3)


def _rows(model: nn.Module) -> Iterator[tuple[Row, nn.Module]]:
    for name, module in model.named_modules():
        found = standing.of(module, model_trains=model.training)
        if found is not None:
            yield _row(name, module, found), module
    for name, module, where in unregistered.find(model):
        found = standing.of(module, model_trains=model.training)
        if found is None:
            continue
        local, reason = found.local, f"{found.reason}; not registered ({where}), so no optimizer sees it"
        if local and not module.training:  # model.train() does not reach it: it stays in eval
            local, reason = False, f"in eval: uses its running statistics; not registered ({where})"
        elif local:
            reason = (
                f"not registered ({where}), so neither conversion nor an optimizer sees it; use torch.nn.ModuleList"
            )
        yield _row(name, module, found._replace(local=local, reason=reason)), module


def _row(name: str, module: nn.Module, found: standing.Standing) -> Row:
    name = name.replace("_orig_mod.", "").removesuffix("_orig_mod")  # of torch.compile, see name_layers
    return Row(name, found.kind, standing.channels(module), found.synchronised, found.local, found.reason)
