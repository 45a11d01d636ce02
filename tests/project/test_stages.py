# SPDX-License-Identifier: BSD-3-Clause
"""tests/run.sh, with a Python that passes, fails or sleeps instead of testing."""

import os
import signal
import time

import psutil
import pytest

from tests import conftest, processes

PYTHON = """#!/bin/sh
case "$*" in
    *tests.warm*) echo {folder}; exec cat ;;
    *"-m faults"*) {faults} ;;
esac
{others}
"""
PASSES = "echo 2 passed in 0.1s; exit 0"
RUN = processes.ROOT / "tests" / "run.sh"


@pytest.fixture
def start(tmp_path):
    """Starts the script with a Python that does this in the stage of faults, and that in the others."""

    def begin(*stages, faults=PASSES, others=PASSES):
        (tmp_path / "python").write_text(PYTHON.format(folder=tmp_path, faults=faults, others=others))
        (tmp_path / "python").chmod(0o755)
        environ = {
            "BIN": tmp_path,
            "BIN_MPICH": tmp_path,
            "BIN_ZOO": tmp_path,
            "LOGS": tmp_path,
            "SYNCBN_TEST_WARM": "",
        }
        return processes.start(RUN, *stages, **environ)

    return begin


def until(found, seconds=10.0):
    """Waits until there is something, or its time is over."""
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        time.sleep(0.05)
    return found()


def sleepers(process):
    """What sleeps of a run, in its own group and in that of what runs beside."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [each for each in family if each.name() == "sleep"]


def test_it_adds_up_what_passed(start):
    out, err = start("faults", "slurm").communicate(timeout=30)
    assert out.splitlines()[-1].startswith("4 tests passed in "), out + err


def test_a_stage_that_fails_is_shown_and_ends_the_run_with_what_runs_beside(start):
    process = start("rest", faults="sleep 1; echo a reason; exit 3", others="exec sleep 100")
    beside = until(lambda: sleepers(process))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "FAILED with status 3" in out
    assert "a reason" in out, out + err
    assert beside
    assert until(lambda: not any(each.is_running() for each in beside))


def test_what_fails_beside_fails_the_run(start):
    process = start("rest", others='echo 1 passed; case "$*" in *tests/zoo) exit 4 ;; esac')
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "FAILED with status 4" in out


def test_where_others_go_first_limits_are_ten_times_as_long(request, monkeypatch):
    """What runs beside has the lowest priority: a program of some seconds took more than its minute."""
    sleep = ("sleep", "0.5")
    with pytest.raises(AssertionError, match=r"did not end within 0\.2 s"):
        processes.run(*sleep, limit=0.2)
    monkeypatch.setattr(os, "nice", lambda more: 19)
    assert processes.run(*sleep, limit=0.2).returncode == 0
    before = request.node.get_closest_marker("timeout")
    conftest._limit(request.node)
    assert request.node.get_closest_marker("timeout").args == (10 * (before.args[0] if before else 120.0),)


def test_ctrl_c_ends_all_of_it(start):
    process = start("rest", faults="exec sleep 100", others="exec sleep 100")
    assert until(lambda: len(sleepers(process)) >= 2), "a stage, and one beside"
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert until(lambda: not any(each.is_running() for each in family))
