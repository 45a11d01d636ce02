# SPDX-License-Identifier: BSD-3-Clause
"""A process that has imported torch and syncbn, and becomes each program that it is told in a fork of itself.

python forking.py FOLDER PARENT, also under torchrun. ``blocks.py`` starts it and writes an order as FOLDER/N.json;
rank r leaves what its program printed in FOLDER/N.r.out and N.r.err, and its status in N.r.status. It ends with PARENT.
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

GRACE = 3.0
"""Seconds that a rank has to end after another one has failed; torchrun would end it at once."""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def failed(folder, number):
    """Whether a rank ended with an error some seconds ago."""
    done = [file for file in folder.glob(f"{number}.*.status") if file.read_text() not in ("", "0")]
    return any(time.time() - file.stat().st_mtime > GRACE for file in done)


def watch(child, folder, order, rank):
    """Waits for the program, ends it where it takes too long, and writes its status."""
    number, deadline, status = order["number"], time.monotonic() + order["limit"], None
    while status is None:
        pid, waited = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(waited)
        elif time.monotonic() > deadline or failed(folder, number):
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    part = folder / f"{number}.{rank}.part"
    part.write_text(str(status))
    part.rename(folder / f"{number}.{rank}.status")


def become(folder, order, rank):
    """Runs a program as ``python FILE`` does, in this process."""
    os.setpgid(0, 0)
    os.chdir(order["cwd"])
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(folder / f"{order['number']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
    os.environ.update(order["environ"])
    path = Path(order["words"][0]).resolve()
    sys.argv = order["words"]
    sys.path.insert(0, str(path.parent))
    code = compile(path.read_text(), str(path), "exec")
    module = sys.modules["__main__"].__dict__
    for name in [name for name in module if not name.startswith("__")]:
        del module[name]
    module |= {"__file__": order["words"][0], "__doc__": None}
    exec(code, module)


def serve(folder, parent, rank):
    """Returns in each child, once, with its order; the process itself ends here."""
    number = 0
    while alive(parent) and folder.exists():
        file = folder / f"{number}.json"
        if not file.exists():
            time.sleep(0.01)
            continue
        order = json.loads(file.read_text())
        child = os.fork()
        if not child:
            return order
        watch(child, folder, order, rank)
        number += 1
    sys.exit(0)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which a program does not have
    import torch
    import torch._dynamo  # half of the time that a program's imports take: optimizers and DDP import it

    import syncbn  # noqa: F401 - so that no program imports it again

    torch.set_num_threads(1)
    gc.freeze()
    own = int(os.environ.get("RANK", "0"))
    (Path(sys.argv[1]) / f"ready.{own}").touch()
    become(Path(sys.argv[1]), serve(Path(sys.argv[1]), int(sys.argv[2]), own), own)
