# SPDX-License-Identifier: BSD-3-Clause
"""What a rank says of itself. The watchdog reads it from the outside, so that the hot path only stores."""

from __future__ import annotations

import itertools
import json
import os
import sys
import sysconfig
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol

DEBUGGED, COMPILES, FILES = "is under a debugger", "is compiling", "is saving or loading a file"
_BUSY = {
    "torch/_dynamo/__init__.py": COMPILES,  # its first import takes seconds
    "torch/_dynamo/convert_frame": COMPILES,
    "torch/_inductor/__init__.py": COMPILES,
    "torch/_inductor/compile_fx": COMPILES,  # others are on the stack when a compiled graph runs
    "torch/utils/cpp_extension": COMPILES,
    "torch/serialization": FILES,
    "torch/distributed/checkpoint/": FILES,
    "/bdb.py": DEBUGGED,
    "/pdb.py": DEBUGGED,
    "/pydevd": DEBUGGED,
}
"""Parts of paths of code, and what a process does whose main thread is in it."""
_ELSEWHERE = {
    "torch/nn/parallel/distributed": "DistributedDataParallel",
    "torch/distributed/": "torch.distributed",
    "mpi4py/": "mpi4py",
}
"""Parts of paths of code that waits for other ranks too, and its name."""


class Group(Protocol):
    """A transport, as this room uses it. The three counters are stored by ``AbstractTransport.reduce``."""

    @property
    def group_id(self) -> int:
        """A number that is equal on all members, and on no other group."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members."""

    begun: int
    current: Any
    completed: Any
    failed: Any
    patience: float | None
    recent: deque[tuple[int, Any]] | None


@dataclass
class Wait:
    """What a rank does in one group."""

    group: int
    begun: int
    """How many calls it has begun."""
    current: str | None
    """The call that it is in, or None."""
    completed: str | None
    """The last call that it completed."""
    waited: float = 0.0
    """Seconds that it has been in the current call."""
    patience: float | None = None
    """A limit of this call's own; inf for none."""
    failed: str | None = None
    """The last call that it has begun, if that has failed here: it asks the others, or has raised the error."""

    @property
    def done(self) -> int:
        """How many calls it has completed."""
        return self.begun if self.current is None and self.failed is None else self.begun - 1


@dataclass
class Status:
    """What a rank says of itself, every half second."""

    rank: int
    beat: int = 0
    limit: float = 300.0
    waits: list[Wait] = field(default_factory=list)
    line: tuple[str, int, str] | None = None
    """File, line and function of the user's code where the main thread is."""
    busy: str | None = None
    """Why it keeps the others waiting although nothing is wrong."""
    elsewhere: str | None = None
    """A library that the user's code has called, and that may wait for other ranks in its turn."""
    evaluates: list[str] = field(default_factory=list)
    """Layers that have been in a call, and are in eval mode now."""
    ended: str | None = None
    """How it ended, or None."""
    terminated: bool = False
    """Whether it has got a SIGTERM: it ends in a moment, by no fault of its own."""
    sees: dict[int, str] = field(default_factory=dict)
    """Ranks of its host whose process is stopped or gone."""

    def text(self) -> str:
        """Returns it as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_text(text: str) -> Status:
        """Undoes ``text``."""
        values = json.loads(text)
        values["waits"] = [Wait(**each) for each in values["waits"]]
        values["line"] = None if values["line"] is None else tuple(values["line"])
        values["sees"] = {int(rank): state for rank, state in values["sees"].items()}
        return Status(**values)


describers: list[Callable[[], list[str]]] = []
"""Functions that name layers in eval mode, see ``Status.evaluates``. The room of the layers adds one."""


farewells: list[Callable[[BaseException | None], None]] = []
"""Functions that tell others how this process ends: by an error, or none. Shared memory adds one."""


pending: list[Callable[[], Callable[[], list[Any]] | None]] = []
"""Weak references to functions that return the calls which a device has not done yet. The kernels for GPUs add one."""


class Reader:
    """Reads the status of this process.

    Args:
        rank: of this process in the whole job.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.ended = rank, None
        self._groups: list[weakref.ref[Group]] = []
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[int, Any]] = {}
        self._waited: dict[int, float] = {}
        self._beats = itertools.count(1)
        self._main = threading.main_thread()

    ended: str | None

    def add(self, group: Group) -> None:
        """Reads this group too, as long as it lives."""
        with self._lock:
            if all(each() is not group for each in self._groups):  # one group may be found in several ways
                self._groups.append(weakref.ref(group))

    def groups(self) -> list[Group]:
        """Returns the groups that are alive."""
        with self._lock:
            self._groups = [each for each in self._groups if each() is not None]
            return [group for each in self._groups if (group := each()) is not None]

    def read(self, seconds: float, limit: float) -> Status:
        """Returns the status.

        Args:
            seconds: since the last reading. A wait is as long as the readings that found it.
            limit: seconds that a call may wait.
        """
        status = Status(self.rank, next(self._beats), limit, ended=self.ended)
        if self.ended is None:
            status.line, status.busy, status.elsewhere = _where(self._main.ident)
        devices = [message for each in pending if (unfinished := each()) is not None for message in unfinished()]
        for group in self.groups():
            begun, current = _call_of(group, devices)
            key = id(group)
            same = current is not None and self._seen.get(key) == (begun, current)
            self._waited[key] = self._waited.get(key, 0.0) + seconds if same else 0.0
            self._seen[key] = begun, current
            if begun:
                failed = None if group.failed is None or group.failed[0] != begun else group.failed[1]
                now, last, failed = (None if m is None else str(m) for m in (current, group.completed, failed))
                wait = Wait(group.group_id, begun, now, last, self._waited[key], group.patience, failed)
                status.waits.append(wait)
        if self.ended is None:
            status.evaluates = sorted({name for describe in describers for name in describe()})[:20]
        return status


def _call_of(group: Group, devices: list[Any]) -> tuple[int, Any]:
    """Returns how many calls a rank has begun in a group, and the one that it is in.

    Where the host does not wait for a GPU, the rank is in the first call that the GPU has not done.
    """
    if group.current is None and group.recent:
        for number, message in list(group.recent):
            if any(message is each for each in devices):
                return number, message
    return group.begun, group.current


def _where(thread: int | None) -> tuple[tuple[str, int, str] | None, str | None, str | None]:
    """Returns the innermost line of a thread that is the user's, what keeps it busy, and a library that may wait."""
    busy, elsewhere = DEBUGGED if _traced() else None, None
    line: tuple[str, int, str] | None = None
    stack = _stack(thread)
    for code, number in stack:
        users, what, library = _about(code.co_filename)
        busy = busy or what
        if line is None:
            elsewhere = elsewhere or library
            line = (_short(code.co_filename), number, code.co_name) if users else None
    if line is None and stack:
        code, number = stack[0]
        line = _short(code.co_filename), number, code.co_name
    return line, busy, elsewhere


def _stack(thread: int | None) -> list[tuple[CodeType, int]]:
    """Returns the code and the line of each frame of a thread, the innermost first.

    Reads them at one go, before the thread may run on: in Python 3.11 the caller of a frame that has ended since can be
    read as another object.
    """
    found = []
    frame: FrameType | None = sys._current_frames().get(thread or 0)
    try:
        while frame is not None:
            found.append((frame.f_code, frame.f_lineno or 0))
            frame = frame.f_back
    except AttributeError:  # it was another object
        pass
    return found


@lru_cache(4096)
def _about(name: str) -> tuple[bool, str | None, str | None]:
    """Returns whether a file is the user's, what a process does that is in it, and whether it may wait for others."""
    library = name.startswith(_LIBRARIES) or any(part in name for part in _OTHER_LIBRARIES)
    found = [next((what for part, what in known.items() if part in name), None) for known in (_BUSY, _ELSEWHERE)]
    return not library, found[0], found[1]


_LIBRARIES = (
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(__file__).parent.parent) + os.sep,
    "<frozen",
)


_OTHER_LIBRARIES = ("/site-packages/", "/dist-packages/", "/torchinductor_")
"""Parts of paths: packages of the user's, or of the system below a virtual environment; what inductor has written."""


def _short(filename: str) -> str:
    """Returns a path from the current directory, if it is below it."""
    return filename.removeprefix(_HERE)


_HERE = os.getcwd() + os.sep


def _traced() -> bool:
    """Whether a debugger holds this process: one of Python's, or one like gdb."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)


_CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ended with RankEndedError")


def is_cut_off(ended: str | None) -> bool:
    """Whether a rank ended by an error that follows the end of another one."""
    return ended is not None and any(text in ended for text in _CUT_OFF)


def of_exception(error: BaseException) -> str:
    """Returns how a rank ended by an exception, in a line."""
    text = " ".join(str(error).split()).removesuffix(".")
    return f"ended with {type(error).__name__}" + (f": {text[:500]}" if text else "")


ENDED = "ended"
"""How a rank ended that came to the end of its program."""
