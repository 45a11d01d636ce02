# SPDX-License-Identifier: BSD-3-Clause
"""Runs the commands of a page where nothing is but the files of that page and an installed syncbn."""

import itertools
import os
import shutil
import socket

from tests import processes, warm
from tests.project import pages

PLAIN = os.environ.get("SYNCBN_TEST_BLOCKS") == "plain"
"""Start each program as a process of its own."""
LIMIT = 60
"""Seconds for a command."""
# What a container needs whose user is root and which has fewer cores than a command has ranks.
HERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": 1,
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1,
    "OMPI_MCA_rmaps_base_oversubscribe": 1,
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
}


class Runner:
    """Runs the commands of pages."""

    def __init__(self, folder, startup=processes.STARTUP):
        (folder / "syncbn").symlink_to(processes.ROOT / "syncbn")
        self.path = f"{startup}:{folder}"
        self.programs = {} if PLAIN else warm.environment(self.path)

    def page(self, page, folder):
        """Runs the commands of a page in one new folder; returns what is wrong, as texts."""
        for name in page.files:
            shutil.copy(pages.CODE / name, folder / name)
        return [wrong for run in page.runs for wrong in self._compare(page, run, folder)]

    def _compare(self, page, run, folder):
        printed = []
        for command in run.commands:
            done = self.command(command, folder)
            said = f"{page.name}, line {run.line}: {command}\nstatus {done.returncode}\n"
            said += f"--- stdout\n{done.stdout}--- stderr\n{done.stderr}"
            if done.returncode != 0:
                yield said
            printed.append(_lines(done.stdout))
        if run.promised is not None and not _agrees(run.commands, printed, _lines(run.promised)):
            yield f"{said}--- the page says\n{run.promised}"

    def command(self, command, folder):
        """Runs a command as it stands. No folder of a clone is on the path, as after ``pip install``."""
        environ = {**HERE, **self.programs, "PYTHONPATH": self.path, "PET_MASTER_PORT": _free_port()}
        # Unbuffered, as torchrun starts Python, a line is written word by word, and words of other ranks come between.
        environ |= {"PYTHONUNBUFFERED": "", "SYNCBN_TEST_WHOLE_LINES": 1}
        return processes.run("bash", "-c", command, cwd=folder, limit=LIMIT, **environ)


def _agrees(commands, printed, promised):
    """Whether a page shows what its commands print: one after the other, or once what all print alike."""
    any_order = any(command.startswith(("torchrun", "mpirun")) for command in commands)  # as ranks print
    compared = sorted if any_order else list
    together = compared(itertools.chain(*printed))
    return compared(promised) == together or all(compared(lines) == compared(promised) for lines in printed)


def _lines(text):
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
