# SPDX-License-Identifier: BSD-3-Clause
"""Imports torch once and becomes, in a fork each, the programs that ``stub.py`` asks for. See ``__init__.py``.

``main(address)`` in a process of its own. It ends, with all of its forks, when its stdin is closed.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing.process
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
NAMESPACES = ("uts", "ipc", "net", "mnt")
FRAMES = ("<string>", __file__)
"""Where a fork is before its program."""


class Server:
    """The stubs that wait, each with the process of its program."""

    def __init__(self, address):
        self.listener = socket.socket(socket.AF_UNIX)
        self.folder = Path(address).parent
        self.listener.bind(address)
        self.listener.listen(128)
        self.pid_of = {}
        self.ends, self.wakes = os.pipe()  # can be read when a process has ended
        os.set_blocking(self.wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wakes)

    def serve(self):
        """Forks until stdin ends, and returns in each fork what it was asked for."""
        while True:
            ready, _, _ = select.select([0, self.ends, self.listener, *self.pid_of], [], [])
            if 0 in ready:
                break
            if self.ends in ready:
                os.read(self.ends, 4096)
                self._tell_ends()
            for stub in [each for each in self.pid_of if each in ready]:  # it says nothing: it was killed
                self._kill(self.pid_of.pop(stub))
                stub.close()
            if self.listener in ready and (order := self._fork()):
                return order
        for pid in self.pid_of.values():
            self._kill(pid)
        os._exit(0)

    @staticmethod
    def _kill(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _tell_ends(self):
        """Tells each stub whose program has ended its status."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for stub in [stub for stub, pid in self.pid_of.items() if pid == ended[0]]:
                    with contextlib.suppress(BrokenPipeError):
                        stub.sendall(struct.pack("i", os.waitstatus_to_exitcode(ended[1])))
                    del self.pid_of[stub]
                    stub.close()

    def _fork(self):
        """Forks for one stub. Returns the order in the fork, and None in the server."""
        stub, _ = self.listener.accept()
        head, files, _, _ = socket.recv_fds(stub, 4, 3)
        length = struct.unpack("i", head)[0]
        order = json.loads(stub.recv(length, socket.MSG_WAITALL))
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            stub_pid, _, _ = struct.unpack("3i", stub.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            (self.folder / f"fork-{stub_pid}").write_text(str(pid))
            stub.sendall(struct.pack("i", pid))
            self.pid_of[stub] = pid
            return None
        signal.set_wakeup_fd(-1)
        for each in (self.listener, stub, *self.pid_of):
            each.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in (self.ends, self.wakes, *files):
            os.close(file)
        return order


def enter_namespaces(pid):
    """Goes to the host of a process: those of tests/hosts are namespaces."""
    for name in NAMESPACES:
        theirs, own = f"/proc/{pid}/ns/{name}", f"/proc/self/ns/{name}"
        if os.path.exists(theirs) and os.readlink(theirs) != os.readlink(own):
            with open(theirs) as file:
                if LIBC.setns(file.fileno(), 0):
                    raise OSError(ctypes.get_errno(), theirs)


def become(order, path):
    """Makes this fork the process that was asked for; path is that of an empty PYTHONPATH."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    enter_namespaces(order["pid"])
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(order["cwd"])
    multiprocessing.process.ORIGINAL_DIR = order["cwd"]  # where a spawned process looks for the program
    os.environ.clear()
    os.environ.update(order["environ"])
    lines = bool(os.environ.get("SYNCBN_TEST_WHOLE_LINES"))
    at_once = not lines and bool(order["unbuffered"] or os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=lines, write_through=at_once)
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = added + path
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    random.seed()
    sys.excepthook = _print_own_frames


def _print_own_frames(kind, error, frames):
    """Prints an exception as a process of its own does: from the program on."""
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename in FRAMES:
        frames, passed = frames.tb_next, frames.tb_frame.f_code
        if passed.co_name == "run":
            break
    sys.__excepthook__(kind, error.with_traceback(frames), frames)


def run(words):
    """Runs the words as Python does, in ``__main__``."""
    main = sys.modules["__main__"].__dict__
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        return runpy._run_module_as_main(words[1], alter_argv=True)
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        main |= {"__file__": None, "__doc__": None}
        return exec(words[1], main)
    path = Path.cwd() / words[0]
    sys.path.insert(0, str(path.resolve().parent))
    sys.argv = words
    main |= {"__file__": str(path), "__doc__": None}
    return exec(compile(path.read_bytes(), path, "exec"), main)


def main(address, many):
    """Serves at an address, and is the program that was asked for in each fork.

    Args:
        address: of the socket.
        many: whether it imports what only some programs and tests need, too: 3 s, for a whole suite.
    """
    clone, given = sys.path.pop(0), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path.append(clone)  # where no syncbn is installed
    import torch
    import torch._dynamo  # takes as long as torch itself: optimizers and DDP import it
    import torch.distributed.run
    import torch.nn.parallel

    import syncbn  # noqa: F401

    if many:
        for name in ("functorch.compile", "matplotlib.pyplot", "sklearn.datasets"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    del sys.modules["torch.distributed.run"], torch.distributed.run  # -m warns of a module that is imported before
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000)  # as tests/startup has it of programs that are no forks
    order = Server(address).serve()
    become(order, [path for path in sys.path if path not in (clone, *given)])
    run(order["words"])
