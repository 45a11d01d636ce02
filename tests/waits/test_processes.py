# SPDX-License-Identifier: BSD-3-Clause
"""Whether a process runs, is stopped or is gone."""

import os
import signal
import subprocess
import time

import pytest

from syncbn.waits import processes
from syncbn.waits.processes import GONE, RUNS, STOPPED, Process


@pytest.fixture
def child():
    """A process of this host that sleeps; what the kernel calls it holds parentheses and spaces."""
    sleeps = subprocess.Popen(["sleep", "60"])
    yield sleeps
    if sleeps.poll() is None:
        sleeps.kill()
        sleeps.wait()


def described(child):
    return processes.own()._replace(pid=child.pid, began=processes._stat(child.pid)[1])


def wait_for(process, state):
    end = time.monotonic() + 10
    while processes.state(process) != state and time.monotonic() < end:
        time.sleep(0.005)
    return processes.state(process)


def test_this_process_runs_and_is_described_in_numbers_that_float64_holds():
    own = processes.own()
    assert processes.state(own) == RUNS
    assert own == processes.own()
    assert own.pid == os.getpid()
    assert own.began > 0
    assert Process(*map(int, map(float, own))) == own


def test_a_child_is_stopped_goes_on_and_is_gone(child):
    process = described(child)
    assert wait_for(process, RUNS) == RUNS
    child.send_signal(signal.SIGSTOP)
    assert wait_for(process, STOPPED) == STOPPED
    child.send_signal(signal.SIGCONT)
    assert wait_for(process, RUNS) == RUNS
    child.kill()
    assert wait_for(process, GONE) == GONE  # nobody has waited for it: it is a zombie
    assert child.returncode is None
    child.wait()
    assert processes.state(process) == GONE


def test_a_number_that_is_used_again_is_another_process(child):
    process = described(child)
    assert processes.state(process._replace(began=process.began - 1)) == GONE
    assert processes.state(process) == RUNS


def test_a_process_with_any_name_is_read(child, tmp_path):
    program = tmp_path / "a) Z (b"
    program.symlink_to("/bin/sleep")
    named = subprocess.Popen([program, "60"])
    try:
        assert wait_for(described(named), RUNS) == RUNS
    finally:
        named.kill()
        named.wait()


def test_only_a_stopped_process_is_killed(child):
    process = described(child)
    processes.kill_stopped(process)
    time.sleep(0.05)
    assert child.poll() is None
    child.send_signal(signal.SIGSTOP)
    assert wait_for(process, STOPPED) == STOPPED
    processes.kill_stopped(process._replace(began=process.began + 1))  # the number of another one
    time.sleep(0.05)
    assert child.poll() is None
    processes.kill_stopped(process)
    assert child.wait(10) == -signal.SIGKILL
    processes.kill_stopped(process)  # gone: nothing to do


def test_without_proc_a_process_runs_or_is_gone(child, monkeypatch):
    process = described(child)
    monkeypatch.setattr(processes, "_stat", lambda pid: ("?", 0))
    assert processes.state(process) == RUNS
    child.kill()
    child.wait()
    assert processes.state(process) == GONE


def test_a_process_of_another_user_runs_without_proc(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(processes, "_stat", lambda pid: ("?", 0))
    monkeypatch.setattr(os, "kill", refuse)
    assert processes.state(processes.own()) == RUNS


def test_another_name_or_process_namespace_is_another_host(monkeypatch):
    own = processes.own().host
    assert 0 <= own < 2**52
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    other = processes.own().host
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "elsewhere")
    assert len({own, other, processes.own().host}) == 3
