# SPDX-License-Identifier: BSD-3-Clause
"""Asks for a fork of a process that has imported torch, and stands for it. ``__init__.py`` fills in the names."""

import json
import os
import signal
import socket
import struct
import sys

KNOWN = ("-u", "-B")
"""Options of Python that change nothing here; with another one the program starts Python itself."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def words():
    """What to run, without Python's own options; None where Python itself must run it."""
    rest = sys.argv[1:]
    while rest and rest[0] in KNOWN:
        rest = rest[1:]
    known = rest and (rest[0] in ("-m", "-c") or not rest[0].startswith("-"))
    return rest if known else None


def main():
    """Runs the program to its end, and ends like it."""
    order = words()
    if order is None:
        os.execv("REAL", ["REAL", *sys.argv[1:]])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    told = {"words": order, "environ": dict(os.environ), "cwd": os.getcwd(), "unbuffered": "-u" in sys.argv[1:3]}
    told["pid"] = os.getpid()
    told["ignored"] = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect("ADDRESS")
        text = json.dumps(told).encode()
        socket.send_fds(server, [struct.pack("i", len(text))], [0, 1, 2])
        server.sendall(text)
        (pid,) = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        (status,) = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
