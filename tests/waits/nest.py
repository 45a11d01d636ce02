# SPDX-License-Identifier: BSD-3-Clause
"""Starts jobs of several ranks by forks of one process that has imported torch: a job begins in a tenth of a second.

It reads a job a line as JSON and says, a line each, how every rank ended. ``test_faults.py`` starts it. The ranks are
connected by torch.distributed over gloo, as under a launcher that sets RANK and WORLD_SIZE and nothing else: nobody
ends the other ranks when one has ended.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time

import torch
import torch.distributed
import torch.nn.parallel

import syncbn  # noqa: F401 - the ranks find it imported
from tests.transports import soak
from tests.waits import fault_program

FIRST_PORT, LAST_PORT = 20000, 32000
"""Below the ports that the system gives away."""


def free_port():
    """A port of loopback that nobody uses; each call returns another one."""
    for _ in range(LAST_PORT - FIRST_PORT):
        free_port.last = FIRST_PORT + (free_port.last + 1 - FIRST_PORT) % (LAST_PORT - FIRST_PORT)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", free_port.last))
            return free_port.last
    raise RuntimeError("no port is free")


free_port.last = FIRST_PORT + os.getpid() * 37 % (LAST_PORT - FIRST_PORT)


def fork(job, rank, port):
    """Starts a rank. Returns its process; 0 in the rank itself."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = {"RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": job["ranks"]}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", **job["environ"])
    return 0


def prepare(words):
    """Imports what only DDP needs, so that its ranks need not. A fork cannot compile: compiled jobs have a launcher."""
    if "ddp" in words:
        import torch._dynamo  # noqa: F401


def serve():
    """Starts what stdin asks for until it ends. Returns in the ranks, with the words of their program."""
    running, commands = {}, b""
    os.set_blocking(0, False)
    while True:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            *lines, commands = (commands + data).split(b"\n")
            for job in map(json.loads, lines):
                prepare(job["words"])
                port, pids = free_port(), []
                for rank in range(job["ranks"]):
                    if not (pid := fork(job, rank, port)):
                        return job["words"]
                    pids.append(pid)
                    running[pid] = job["id"], rank
                say(id=job["id"], pids=pids, port=port)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                number, rank = running.pop(found[0])
                say(id=number, rank=rank, status=os.waitstatus_to_exitcode(found[1]), time=time.time())
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def end(words):
    """Runs the program in a rank and ends as Python does, without the second it takes to free what torch imported."""
    status = 1
    try:
        if words[0] == "soak":
            soak.main(words[1:])
        else:
            fault_program.main(words)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(**what):
    """Answers in a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    losses = fault_program.Net()(torch.randn(2, 3, 8, 8))
    sum(losses.values()).backward()  # torch imports some of itself at the first use
    gc.collect()
    gc.freeze()  # a collection in a rank would copy every page of what torch has imported
    say(ready=True)
    words = serve()
    if words is not None:
        end(words)
