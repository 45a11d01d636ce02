# SPDX-License-Identifier: BSD-3-Clause
"""What `syncbn doctor --model` finds: a model built by a function of the user, and what conversion would do to it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from syncbn.convert import known, obstacles, standing
from syncbn.convert.summary import Row, Summary, summary
from syncbn.transports import AbstractTransport, gather
from syncbn.waits.ranks import named

_SHOWN = 10
"""How many modules a problem names."""


@dataclass(frozen=True)
class ModelReport:
    """What one rank found. Problems are pairs of what is wrong and what to do."""

    factory: str
    kind: str = ""
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why conversion refuses, by layer. It changes nothing then."""
    error: str = ""
    """Why there is no model."""

    def table(self) -> str:
        """Renders the rows, and what conversion would do, for a person."""
        if self.error:
            return f"model {self.factory}: not built"
        return f"model {self.factory}\n{Summary(self.rows, self.kind)}\n{self._outlook()}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values."""
        rows = [row._asdict() for row in self.rows]
        converts = not self.error and not self.refused
        return {
            "factory": self.factory,
            "class": self.kind,
            "converts": converts,
            "refused": self.refused,
            "rows": rows,
            "error": self.error,
        }

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields what is wrong, with a remedy."""
        if self.error:
            yield (
                f"--model {self.factory}: {self.error}",
                "Pass package.module:function; it is called without arguments.",
            )
        if self.refused:
            reasons = [f"{name or '(the model)'}: {reason}" for name, reason in self.refused.items()]
            yield (
                f"syncbn.convert_sync_batchnorm would refuse {_counted(reasons)}",
                "Do what the reasons say; conversion changes nothing before.",
            )
        if left := [f"{row.name or '(the model)'} ({row.kind}): {row.reason}" for row in self._left()]:
            yield (
                f"syncbn.convert_sync_batchnorm would leave {_counted(left)}",
                "They train on the local batch alone. Change the model, or accept it.",
            )

    def _left(self) -> list[Row]:
        """Returns the rows that conversion neither converts nor refuses."""
        waiting = self.refused.keys() | {row.name for row in self.rows if row.reason == standing.NOT_YET}
        return [row for row in self.rows if row.local and row.name not in waiting]

    def _outlook(self) -> str:
        if not self.rows:
            return "There is nothing to convert."
        if self.refused:
            return f"Conversion would refuse {_plural(len(self.refused), 'layer')} and change nothing."
        waiting = sum(row.reason == standing.NOT_YET for row in self.rows)
        left = len(self._left())
        if not waiting and not left:
            return "Nothing is left to convert."
        return f"Conversion would succeed for {_plural(waiting, 'layer')}" + (f", and leave {left}." if left else ".")


def look(factory: str, transport: AbstractTransport | None) -> ModelReport:
    """Builds the model on this rank and lists its layers. All ranks return the same error if one has one.

    Args:
        factory: ``package.module:function``.
        transport: all ranks, or None if they are not connected.

    Communication:
        One exchange of short texts, if the ranks are connected.
    """
    report = _built(factory)
    if transport is None or transport.size == 1:
        return report
    digest = hashlib.sha256(repr((report.kind, report.rows, report.refused)).encode()).hexdigest()
    notes = gather.gather_notes(f"E{report.error}" if report.error else f"D{digest}", transport)
    errors = [note[1:] if note.startswith("E") else "" for note in notes]
    if any(errors):
        return ModelReport(factory, error=gather.by_rank(errors, transport.ranks, skip_empty=True, joint=" | "))
    if len(set(notes)) > 1:
        others = [rank for rank, note in zip(transport.ranks, notes, strict=True) if note != notes[0]]
        error = f"ranks build different models: that of {named(others)} differs from that of rank 0"
        return ModelReport(factory, error=error)
    return report


def _built(factory: str) -> ModelReport:
    try:
        with _here_importable(), contextlib.redirect_stdout(sys.stderr):  # stdout is the report's
            model = _build(factory)
    except _Wrong as error:
        return ModelReport(factory, error=str(error))
    layers = {name: layer for name, layer in model.named_modules() if standing.is_batch_norm(layer)}
    skipped, becomes = obstacles.skipped(model), known.table()
    reasons = {name: skipped.get(layer) or obstacles.to_ours(layer, becomes) for name, layer in layers.items()}
    refused = {name: reason for name, reason in reasons.items() if reason}
    return ModelReport(factory, type(model).__name__, summary(model).rows, refused)


class _Wrong(Exception):  # noqa: N818 - it never leaves this file
    """Why there is no model, as a sentence."""


def _build(factory: str) -> nn.Module:
    module_name, _, path = factory.partition(":")
    found: Any = _imported(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            raise _Wrong(f"{module_name} has no {path}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise _Wrong(f"{path} must be a function; received {found!r:.100}")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise _Wrong(f"{path}() raised {_line(error)}") from error
    if not isinstance(found, nn.Module):
        raise _Wrong(f"{path}() must return a torch.nn.Module; received {type(found).__name__}")
    return found


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise _Wrong(f"there is no module {error.name}, looked for in {os.getcwd()} and in sys.path") from error
        raise _Wrong(f"importing {name} raised ModuleNotFoundError: {error}") from error
    except (Exception, SystemExit) as error:
        raise _Wrong(f"importing {name} raised {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Returns an error in one line of a readable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


@contextlib.contextmanager
def _here_importable() -> Iterator[None]:
    """Makes modules of the current directory importable, as `python -m` does and a console script does not."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _counted(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n       ".join([f"{_plural(len(lines), 'module')}:", *lines[:_SHOWN], *more])


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
