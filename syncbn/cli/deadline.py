# SPDX-License-Identifier: BSD-3-Clause
"""Ends a command that waits for others for too long, whatever it waits in."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LEAD = 2.0
"""Seconds by which rank 0 gives up before the others: when it ends, the launcher ends them."""


@contextmanager
def time_limit(seconds: float, rank: int, give_up: Callable[[], None]) -> Iterator[None]:
    """Ends this process with status 1 if the block takes longer.

    Args:
        seconds: the limit; infinity for none.
        rank: of this process.
        give_up: called before, on a thread of its own, to say what is wrong.
    """
    if math.isinf(seconds):
        yield
        return

    def end() -> None:
        give_up()
        os._exit(1)

    limit = seconds if rank == 0 else seconds + LEAD
    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    # MPI_Init blocks all Python threads, also the timer. faulthandler needs no Python.
    faulthandler.dump_traceback_later(limit + LEAD, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
