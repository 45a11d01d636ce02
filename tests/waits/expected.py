# SPDX-License-Identifier: BSD-3-Clause
"""What is expected of each fault: how its job ends, how soon, and what it says."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from syncbn.waits.judge import ENDED_STATUS, LIMIT_STATUS
from tests.waits.jobs import END, GIVEN_UP

SOON, SOON_LAUNCHED = 5.0, 8.0
"""Seconds after which a job has ended, counted from the fault or from the limit. A launcher takes some of its own."""
LIMIT, FAR = 3.0, 100.0
"""SYNCBN_TIMEOUT where the limit ends the job, and where something else must end it much earlier."""


class Fault(NamedTuple):
    """What is expected of a fault. ``R`` stands for the rank."""

    kind: str
    """ended: noticed early, as a rank has ended. limit: at the limit. alike: every rank gets the error.

    apart: ranks are in different calls whose messages differ in length. gloo ends one of them, MPI mostly none.
    """
    says: str
    """A pattern of the text of every rank together."""
    call: str = "forward of 'stem.1' (call 12)"
    """That the others wait in, or are in."""


def in_calls(first, second):
    """An error that every rank gets."""
    return Fault("alike", rf"All ranks must be in one call; received .*{re.escape(second)} .*on rank R", first)


FAULTS = {
    "exception": Fault("ended", r"Rank R ended with ValueError: no such image after "),
    "kill": Fault("ended", "The process of rank R is gone"),
    "exits": Fault("ended", "Rank R came to the end of the program after "),
    "exits_at_once": Fault("ended", "The process of rank R is gone"),
    "segfault": Fault("ended", "The process of rank R is gone"),
    "fewer": Fault("ended", r"Rank R came to the end .* syncbn\.join\(model"),
    "checkpoint": Fault("ended", "Rank R ended with ValueError: negative seek"),
    "out_of_memory": Fault(
        "ended", "Rank R ended with OutOfMemoryError: CUDA out of", "forward of 'right.1' (call 14)"
    ),
    "no_memory": Fault("ended", "Rank R ended with MemoryError", "forward of 'right.1' (call 14)"),
    "stop": Fault("limit", "Rank R is stopped by a signal"),
    "sleep": Fault("limit", r"Rank R is in no call of syncbn, at \S*fault_kinds.py:\d+ in sleep"),
    "barrier": Fault("order", r"World.barrier \(call 12\) on rank R"),
    "caught": Fault("ended", r"All ranks must be in one call; .*rank R waits", "forward of 'right.1' (call 14)"),
    "skips": in_calls("forward of 'left.1' (call 13)", "forward of 'right.1'"),
    "twice": in_calls("forward of 'right.1' (call 14)", "forward of 'left.1'"),
    "swaps": in_calls("forward of 'left.1' (call 13)", "forward of 'right.1'"),
    "freezes_one": in_calls("forward of 'left.1' (call 13)", "forward of 'right.1'"),
    "no_grad": Fault("alike", "is_grad_enabled.*False on rank R", "SyncBatchNorm"),
    "eps": Fault("alike", r"same settings of 'left\.1'.*eps=0\.001,[^;]* on rank R", "'left.1'"),
    "momentum": Fault("alike", r"same settings of 'left\.1'.*=0\.5,[^;]* on rank R", "'left.1'"),
    "dtype": Fault("alike", "one dtype on every rank; received .*float64 on rank R", "SyncBatchNorm"),
    "width": Fault("alike", "On rank R: SyncBatchNorm needs .* received 5 channels", "num_features=4"),
    "no_backward": Fault("apart", "World.average_gradients (call 16)", "backward of 'wide.1' (call 15)"),
    "backward_twice": Fault("apart", "backward of 'wide.1' (call 15)", "World.average_gradients (call 16)"),
    "skips_last": Fault("apart", "backward of 'right.1'", "forward of 'wide.1' (call 15)"),
    "swaps_other_width": Fault("apart", "forward of 'wide.1'", "forward of 'right.1' (call 14)"),
    "some_gradients": Fault("apart", "World.average_gradients", "backward of 'right.1' (call 14)"),
    "backward_order": Fault("apart", "backward of 'left.1'", "backward of 'wide.1' (call 15)"),
    "evaluates": Fault("apart", "World.average_gradients"),
    "freezes": Fault("apart", "World.average_gradients"),
    "averages": Fault("apart", "World.average_gradients"),
    "average_of_a_number": Fault("apart", "World.average "),
}
WITH_DDP = {
    "evaluates": Fault("limit", r"Rank R is in eval mode, or froze layers \('left.1', 'right.1', 'stem.1', \.\.\.\)"),
    "no_backward": Fault("limit", "Rank R is in DistributedDataParallel", "backward of 'wide.1' (call 15)"),
    "backward_twice": Fault("limit", r"backward of 'wide.1' \(call 15\) on rank R", "forward of 'stem.1' (call 16)"),
}
"""DDP sends gradients inside backward, and buffers before forward, so that ranks part elsewhere."""
GONE_AT_ONCE, BEFORE = ("kill", "exits_at_once", "segfault"), "World.average_gradients (call 12)"
"""Over gloo what such a rank sent in the call before may be lost with it, on its way to some of the others."""
ALIKE = [name for name, fault in FAULTS.items() if fault.kind == "alike"]


def expected(name, how="average"):
    return WITH_DDP[name] if how == "ddp" and name in WITH_DDP else FAULTS[name]


def check(name, done, *, rank=1, ranks=3, how="average", soon=SOON):
    """Raises if a job has not ended as it should."""
    fault, text = expected(name, how), " ".join(done.err.split())
    limit = LIMIT if fault.kind == "limit" else 0.0
    assert GIVEN_UP not in done.statuses, f"it did not end\n{done}"
    assert 0.8 * limit <= done.seconds <= limit + soon, f"too early or too late\n{done}"
    others = [status for each, status in enumerate(done.statuses) if each != rank or len(done.statuses) == 1]
    assert all(others), f"a rank has ended as if all were well\n{done}"
    assert done.left == [], f"processes are left\n{done}"
    assert done.err.count(END) <= 1, f"reported more than once\n{done}"
    assert (done.report is not None) == (done.err.count(END) == 1), f"JSON and text differ\n{done}"
    if fault.kind == "apart":
        check_apart(fault, done, text, rank)
        return
    assert re.search(pattern(fault.says, rank), text), done
    lost = name in GONE_AT_ONCE and done.report is not None and done.report["call"] == BEFORE
    assert fault.call in text or lost, f"it does not name the call that others are in\n{done}"
    assert (done.report is not None) == (fault.kind != "alike"), (
        f"a report, where and only where somebody waits\n{done}"
    )
    if done.report is not None:
        check_report(done, text, fault.kind, rank, ranks)
        several = name == "caught" or "wait in different calls" in done.report["sentence"]
        assert done.report["call"] == fault.call or several or lost, done


def pattern(says, rank):
    return says.replace("rank R", f"ranks? {rank}").replace("Rank R", f"Rank {rank}")


def check_apart(fault, done, text, rank):
    """Both calls are named, or gloo has ended ranks before they could say in which they were."""
    gone = re.search(r"(?i)the process(es)? of ranks? (\d+)(, \d+)? (is|are) gone", text)
    named = fault.call in text, fault.says in text
    if "Message truncated, error stack" in text and not any(named):
        return  # MPICH has ended the job itself, on a communicator of its own that no error handler of ours reaches
    assert any(named), f"it names no call\n{done}"
    assert all(named) or gone, f"it names one call\n{done}"
    assert gone is None or "op.preamble.length" in text, done
    assert gone is not None or f"on rank {rank}" in text, f"it does not name the rank\n{done}"


def check_report(done, text, kind, rank, ranks):
    """The JSON says what the text says."""
    report = done.report
    assert report["kind"] == kind, done
    assert report["sentence"] in text, done
    assert report["remedy"].split(".")[0] in text, done
    status = LIMIT_STATUS if kind == "limit" else ENDED_STATUS
    assert report["status"] == status, done
    assert f"{END} {status}" in text, done
    assert [row["rank"] for row in report["ranks"]] == list(range(ranks)), done
    assert rank in report["missing"] + report["waiting"], done
    for other in report["waiting"]:
        assert report["ranks"][other]["calls"][0]["current"], done
    row = report["ranks"][rank]
    if rank in report["missing"]:
        assert row["ended"] or row["process"] != "runs" or row["calls"][0]["current"] is None, done


class Jobs:
    """Runs jobs side by side: they mostly wait. All that the collected tests need begin at once."""

    def __init__(self, workers):
        self._pool, self._made, self._lock = ThreadPoolExecutor(workers), {}, threading.Lock()

    def begin(self, key, run):
        with self._lock:
            if key not in self._made:
                self._made[key] = self._pool.submit(run, *key)
            return self._made[key]

    def begin_all(self, keys, run):
        return [self.begin(key, run) for key in keys]

    def close(self):
        self._pool.shutdown(cancel_futures=True)


def check_shared(name, done, *, rank=1, ranks=3, how="average"):
    """Raises if a job has not ended as it should where ranks share memory.

    Every rank that waits for one that has ended gets an error of its own, and so does every rank of those that are in
    different calls. A report is made at the limit.
    """
    fault, text = expected(name, how), " ".join(done.err.split())
    if fault.kind in ("limit", "alike"):
        check(name, done, rank=rank, ranks=ranks, how=how)
        return
    assert GIVEN_UP not in done.statuses, f"it did not end\n{done}"
    assert done.seconds <= SOON, f"too late\n{done}"
    others = [status for each, status in enumerate(done.statuses) if each != rank]
    assert others == [1] * (ranks - 1), f"a rank has not ended by an error\n{done}"
    assert done.err.count(END) <= 1, f"reported more than once\n{done}"
    assert fault.call in text, f"it does not name the call that others are in\n{done}"
    if fault.kind == "ended" and name != "caught":
        assert re.search(pattern(fault.says.removesuffix(" after "), rank), text), done
        found = re.findall(r"RankEndedError: (Rank|The process of rank) (\d+)", text)
        assert {int(who) for _, who in found} == {rank}, f"it names others\n{done}"
        least = 1 if how == "ddp" else ranks - 1  # DDP sends its buffers over gloo, which raises on those that send
        assert len(found) >= least, f"not every rank that waits says for whom\n{done}"
    else:
        assert text.count("All ranks must be in one call") >= ranks - 1, f"not every rank gets the error\n{done}"
        assert re.search(rf"on ranks? {rank}\b", text), f"it does not name the rank\n{done}"
        says = fault.says if fault.kind == "apart" else fault.says.split(" on rank")[0]
        assert name == "caught" or re.search(says if fault.kind != "apart" else re.escape(says), text), done


def limit_of(name, how="average"):
    return LIMIT if name in FAULTS and expected(name, how).kind == "limit" else FAR


def new(folder):
    """An empty folder; any thread may ask for one."""
    made = folder / os.urandom(6).hex()
    made.mkdir()
    return made
