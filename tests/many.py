# SPDX-License-Identifier: BSD-3-Clause
"""Programs one after the other in the same processes, which import torch and connect once.

NPROC=2 launch/mpirun.sh -m tests.many FOLDER

``processes.many`` writes ``FOLDER/cases.json`` and reads what each rank leaves there. What a program leaves behind, the
next one finds: modules, connections, hooks. Where that matters, start a process.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch

from syncbn.cli import main
from syncbn.transports import dispatch, launchers


def run(words):
    """Runs ``-m MODULE``, ``-c PROGRAM`` or ``FILE`` with its arguments; returns status, output and errors."""
    option, rest = (words[0], words[1:]) if words[0] in ("-m", "-c") else ("", words)
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", rest if option != "-c" else words[:1] + rest[1:]),
        mock.patch.object(sys, "path", sys.path if option else [str(Path(rest[0]).parent), *sys.path]),
    ):
        try:
            if option == "-c":
                exec(rest[0], {"__name__": "__main__"})
            else:
                (runpy.run_module if option else runpy.run_path)(rest[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:  # Python itself ends with 1 and prints it
            traceback.print_exc()
            status = 1
    return status, out.getvalue(), err.getvalue()


def all_cases(folder):
    """Runs every case of ``folder`` and keeps what this rank said in it."""
    rank, listens = launchers.detect().rank, signal.getsignal(signal.SIGINT)
    random = torch.get_rng_state()
    main.GRACE = 0.0  # nobody ends the others here, so none waits for rank 0
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        dispatch.made.clear()  # a setting of the environment decides anew
        torch.set_default_dtype(torch.float32)
        torch.set_rng_state(random)
        with mock.patch.dict(os.environ, case["environ"]):
            said = run(case["words"])
        signal.signal(signal.SIGINT, listens)
        (folder / f"{number}.{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    all_cases(Path(sys.argv[1]))
