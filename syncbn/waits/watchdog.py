# SPDX-License-Identifier: BSD-3-Clause
"""The thread of each process that looks at its own calls, and, on one rank, at those of all.

Rank 0 looks at all. If rank 0 has ended, is stopped or gone, or its host does not answer, another one does: rank 1, or
the first rank of another host. Every rank ends when that one has found a reason. A rank that can reach neither ends by
itself: soon if it waits for them and both have died, else a little after the limit.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import selectors
import signal
import socket
import sys
import threading
import time
from typing import final

from syncbn.waits import limits, processes, report
from syncbn.waits.channel import Channel
from syncbn.waits.judge import ENDED_STATUS, LIMIT_STATUS, Judge
from syncbn.waits.limits import TICK
from syncbn.waits.status import ENDED, Group, Reader, Status, farewells, of_exception

GRACE = 3.0
"""Seconds after the limit at which a rank ends that can reach no other one."""
LONGEST_PAUSE = 3.0
"""Ticks between two looks of a large job: below what a hub may be silent for."""
ORPHANED = 1.5
"""Seconds for which a rank waits for ranks that have died, if those were all that could report."""
QUIET = 1.5
"""Seconds for which a rank that ends by an exception lets the others report it."""
LINGER = 0.6
"""Seconds for which a rank lives after SIGTERM, so that one of them can report. Open MPI kills after a second."""
_LAUNCHERS = ("torchrun", "openmpi", "mpich")
_WAKE = b"w"


@final
class Watchdog(threading.Thread):
    """Watches the calls of this process.

    Args:
        rank: of this process in the whole job.
        launcher: its name, see ``transports/launchers.py``.
    """

    def __init__(self, rank: int, launcher: str) -> None:
        super().__init__(name="syncbn-watchdog", daemon=True)
        self.reader, self.pid = Reader(rank), os.getpid()
        self.channels: list[Channel] = []
        self.made: list[Group] = []
        self._judges: dict[Channel, Judge | None] = {}
        self._parent = os.getppid() if launcher in _LAUNCHERS else None
        self._ends, self._told = threading.Event(), threading.Event()
        self._terminated = 0.0
        self._selector = selectors.DefaultSelector()
        signals, self._signal_end = os.pipe()
        os.set_blocking(self._signal_end, False)
        self._selector.register(signals, selectors.EVENT_READ, (self._hear_signal, signals))

    def run(self) -> None:
        """Looks every half second."""
        last = next_look = time.monotonic()
        pause = TICK
        try:
            while not self._ends.is_set():
                for key, _ in self._selector.select(max(0.0, next_look - time.monotonic())):
                    hear, *arguments = key.data
                    hear(*arguments, self._selector)
                    if hear == self._hear_signal:
                        next_look = 0.0
                now = time.monotonic()
                if now >= next_look:
                    self._look(min(now - last, 2 * max(TICK, pause)))  # a stopped process has not waited meanwhile
                    pause = self._pause()
                    last, next_look = now, now + pause
                if self._terminated and now >= self._terminated + LINGER:
                    _die_by_sigterm()
        finally:
            _hear_sigterm_no_more()

    def _pause(self) -> float:
        if self._terminated or self.reader.ended is not None:
            return 0.05
        ranks = max((len(channel.ranks) for channel in self.channels), default=1)
        return TICK * min(max(1.0, ranks / 256), LONGEST_PAUSE)

    def _look(self, seconds: float) -> None:
        """Reads the status of this process, tells it to the others, and acts on what they have said."""
        own = self.reader.read(seconds, limits.or_default())
        own.terminated = self._terminated > 0
        for channel in list(self.channels):
            if channel not in self._judges:
                channel.register(self._selector)
                self._judges[channel] = None if channel.hub is None else Judge(channel, self.reader)
            judge = self._judges[channel]
            own.sees = _sees(channel)
            channel.count(seconds)  # before anything new is on its way
            channel.post(own.text())
            if self.reader.ended == ENDED and channel.hub is not None:
                channel.hub.say_goodbye()
            if channel.verdict is not None:
                self._end(channel, channel.verdict["status"])
            if judge is not None:
                judge.look(own, seconds, self._end)
        if self.reader.ended is not None and all(channel.is_sent for channel in self.channels):
            self._told.set()
        if self._parent is not None and os.getppid() != self._parent:
            report.write(f"syncbn: rank {own.rank} ends, as its launcher (process {self._parent}) is gone.\n")
            exit_now(ENDED_STATUS)
        self._look_alone(own)

    def farewell(self, ended: str) -> None:
        """Tells the others how this process ends. After an exception, lets them report it. On the main thread."""
        self.reader.ended = ended
        self.wake()
        self._told.wait(1.0)
        began = time.monotonic()
        while ended != ENDED and self.is_alive() and time.monotonic() < began + QUIET:
            time.sleep(0.05)  # the thread goes on, and ends this process if somebody has reported
        self._ends.set()
        self.wake()
        self.join(2.0)

    def wake(self) -> None:
        """Makes the thread look now."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._signal_end, _WAKE)

    def hear_sigterm(self) -> None:
        """Makes SIGTERM leave time for a report, if this process does nothing else on it. Launchers send it.

        Python's handlers run in the main thread, which may be in a library that does not return. So faulthandler
        writes to a pipe that this thread reads.
        """
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            faulthandler.register(signal.SIGTERM, file=self._signal_end, all_threads=False, chain=False)

    def _hear_signal(self, pipe: int, selector: selectors.BaseSelector) -> None:
        del selector
        if os.read(pipe, 65536).strip(_WAKE) and not self._terminated:
            self._terminated = time.monotonic()

    def _look_alone(self, own: Status) -> None:
        """Ends this process if it waits for ranks that have died, or too long, and can reach no rank that looks."""
        if any(channel.is_heard for channel in self.channels):
            return
        unanswered = max((channel.unanswered for channel in self.channels), default=0.0)
        nobody = "no rank that could say for whom answers"
        if unanswered:
            hosts = sorted({channel.host(server) for channel in self.channels for server in channel.servers})
            nobody = (
                f"host{'s' * (len(hosts) > 1)} {', '.join(hosts)} {'have' if len(hosts) > 1 else 'has'} not answered "
            )
            nobody += f"for {limits.spoken(unanswered)}: down, or this host, {socket.gethostname()}, is cut off"
        dead = {rank for channel in self.channels for rank in channel.dead()}
        members = {group.group_id: group.ranks for group in self.reader.groups()}
        for wait in own.waits:
            if wait.current is None:
                continue
            patience = own.limit if wait.patience is None else wait.patience
            told = f"syncbn: rank {own.rank} has waited for {limits.spoken(wait.waited)} in {wait.current}, and "
            awaited = sorted(dead.intersection(members.get(wait.group, ())))
            if awaited and wait.waited >= ORPHANED:
                gone = f"of rank {awaited[0]} is" if len(awaited) == 1 else f"of ranks {awaited[0]}, {awaited[1]} are"
                told += f"the process{'es' * (len(awaited) > 1)} {gone} gone, with all ranks that could report."
                report.write(f"{told} It ends with status {ENDED_STATUS}.\n")
                exit_now(ENDED_STATUS)
            if wait.waited >= patience + GRACE:
                self._end_alone(f"{told}{nobody}", unanswered)
        if unanswered >= own.limit + GRACE:  # it may wait in a call of another library
            self._end_alone(f"syncbn: rank {own.rank}: {nobody}", unanswered)

    def _end_alone(self, told: str, unanswered: float) -> None:
        report.write(f"{told}. It ends with status {LIMIT_STATUS}.\n")
        if unanswered:
            processes.end_daemon()
        exit_now(LIMIT_STATUS)

    def _end(self, channel: Channel, status: int) -> None:
        for rank in channel.on_this_host():
            if rank != channel.rank:
                processes.kill_stopped(channel.processes[rank])  # it hears nothing else
        exit_now(status)


def _sees(channel: Channel) -> dict[int, str]:
    """Returns the ranks of this host that are stopped or gone, if this rank is the first one here that runs."""
    states = {}
    for rank in channel.on_this_host():
        state = processes.RUNS if rank == channel.rank else processes.state(channel.processes[rank])
        if state == processes.RUNS and rank < channel.rank:
            return {}
        if state != processes.RUNS:
            states[channel.ranks[rank]] = state
    return states


def exit_now(status: int) -> None:
    """Ends this process although its main thread does not return. What the program has printed is written first."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(0.3)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _hear_sigterm_no_more() -> None:
    faulthandler.unregister(signal.SIGTERM)


def _die_by_sigterm() -> None:
    _hear_sigterm_no_more()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)


_running: list[Watchdog] = []
_starting = threading.Lock()


def watch(group: Group, channel: Channel | None, rank: int, launcher: str) -> None:
    """Watches the calls of a group.

    Args:
        group: its transport.
        channel: a new one, or None if one that covers the group is there.
        rank: of this process in the whole job.
        launcher: its name.
    """
    dog = started(rank, launcher)
    if channel is not None:
        dog.channels = [*dog.channels, channel]
        dog.wake()
    dog.reader.add(group)


def started(rank: int, launcher: str) -> Watchdog:
    """Returns the watchdog of this process, and starts it if there is none. For the arguments see ``Watchdog``."""
    with _starting:
        if not _running or _running[0].pid != os.getpid():  # a fork has no thread
            _running[:] = [Watchdog(rank, launcher)]
            _running[0].hear_sigterm()
            _running[0].start()
            atexit.register(_at_exit)
            os.register_at_fork(after_in_child=_hear_sigterm_no_more)
        return _running[0]


def watches(group: Group) -> bool:
    """Whether the calls of a group are watched already."""
    return any(each is group for dog in _running if dog.pid == os.getpid() for each in dog.reader.groups())


def covers(ranks: tuple[int, ...]) -> bool:
    """Whether this process has a channel with all of these ranks."""
    return any(channel.covers(ranks) for dog in _running if dog.pid == os.getpid() for channel in dog.channels)


def _at_exit() -> None:
    for dog in _running:
        if dog.pid == os.getpid():
            error = getattr(sys, "last_value", None)  # what the interpreter has printed
            for tell in farewells:
                tell(error)
            dog.farewell(ENDED if error is None else of_exception(error))
