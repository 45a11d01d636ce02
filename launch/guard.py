# SPDX-License-Identifier: BSD-3-Clause
"""Runs mpirun, and makes sure that it ends with a job that has failed, and with a status that says so.

guard.py mpirun -n 4 python train.py

Open MPI's mpirun waits for the daemons of all hosts before it ends, for minutes or for ever if one of them is on a host
that is lost; and where a daemon or its host is lost it can end with status 0. So this program reads mpirun's stderr on
its way. After the words of a job that has failed mpirun has some seconds to end, and the status is never 0.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import threading

PATIENCE = 3.0
"""Seconds that mpirun has to end after the job has failed."""
FAILED = re.compile(
    rb"(?:All ranks end now, with|It ends with) status (\d+)\."  # syncbn's report
    rb"|detected that one or more processes exited with non-zero status"
    rb"|noticed that process rank \d+ with PID \d+ on node \S+ exited"
    rb"|has lost communication with a remote daemon"
    rb"|A daemon failed to report back after being spawned"
    rb"|BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES"  # MPICH
)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Lets the system end mpirun if this process is killed; mpirun then ends the ranks. Linux."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Guard:
    """A command whose stderr is read."""

    def __init__(self, command: list[str]) -> None:
        # In a group of its own, so that Ctrl-C reaches it once: from here.
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - there are no threads yet
        )
        self.status: int | None = None
        """What its words say of the end of the job; None while nothing has failed."""
        self._writes = False
        self._timer = threading.Timer(PATIENCE, self._kill)
        self._timer.daemon = True

    def copy_stderr(self) -> None:
        """Passes on what the command and the ranks say, as it comes."""
        assert self.process.stderr is not None
        pipe, tail = self.process.stderr.fileno(), b""
        while data := os.read(pipe, 65536):
            self._writes = True
            with contextlib.suppress(OSError):  # whoever reads it is gone
                rest = data
                while rest:
                    rest = rest[os.write(2, rest) :]
            tail = tail[-300:] + data  # words may come in two pieces
            found = FAILED.search(tail)
            if found and self.status is None:
                self.status = int(found[1] or 1)
                self._timer.start()
            self._writes = False

    def _kill(self) -> None:
        sys.stderr.write(f"{sys.argv[0]}: {self.process.args[0]} has not ended with the job, and is killed.\n")  # type: ignore[index]
        for pid in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """Returns the status of the job."""
        reader = threading.Thread(target=self.copy_stderr, daemon=True)
        reader.start()
        status = self.process.wait()
        reader.join(1.0)  # a process of the job that is left may hold the pipe
        assert self.process.stderr is not None
        while reader.is_alive() and (self._writes or select.select([self.process.stderr], [], [], 0)[0]):
            reader.join(0.1)  # whoever reads ours is slow
        self._timer.cancel()
        if status == 0 or (status < 0 and self.status is not None):
            return self.status or 0
        return 128 - status if status < 0 else status


def _descendants(pid: int) -> list[int]:
    """Returns the processes that a process has started, and those that these have started; Linux."""
    parents = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def main(command: list[str]) -> int:
    """Runs a command, see above."""
    guards: list[Guard] = []
    early: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        del frame
        for guard in guards:
            guard.process.send_signal(number)
        if not guards:
            early.append(number)

    def stop(number: int, frame: object) -> None:
        pass_on(number, frame)
        os.kill(os.getpid(), signal.SIGSTOP)
        pass_on(signal.SIGCONT, frame)

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP):
        if signal.getsignal(each) != signal.SIG_IGN:  # as of nohup, or of a job in the background
            signal.signal(each, stop if each == signal.SIGTSTP else pass_on)
    try:
        guard = Guard(command)
    except OSError as error:
        sys.stderr.write(f"{sys.argv[0]}: {error.filename}: {error.strerror}\n")
        return 127
    guards.append(guard)
    for number in early:
        guard.process.send_signal(number)
    return guard.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
