# SPDX-License-Identifier: BSD-3-Clause
"""launch/guard.py ends mpirun with its job, and never with status 0 where the job has failed."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import processes

GUARD = processes.ROOT / "launch/guard.py"
WORDS = {
    'All ranks end now, with status 124. See "It hangs" in the documentation (docs/clusters/hangs.md).': 124,
    "syncbn: rank 3 has waited. It ends with status 124.": 124,
    "PRTE has lost communication with a remote daemon.": 1,
    "A daemon failed to report back after being spawned. This could": 1,
    "prterun noticed that process rank 1 with PID 17899 on node h2 exited on": 1,
}


def start(script):
    return processes.start(sys.executable, GUARD, "sh", "-c", script)


def status(script):
    done = processes.run(sys.executable, GUARD, "sh", "-c", script, limit=20)
    return done.returncode, done.stdout, done.stderr


def test_without_words_of_a_failure_the_status_and_the_output_are_the_command_s():
    assert status("echo out; echo 'it exited with non-zero status' >&2; exit 0") == (
        0,
        "out\n",
        "it exited with non-zero status\n",
    )
    assert status("exit 7")[0] == 7
    assert status("kill -9 $$")[0] == 137
    assert processes.run(sys.executable, GUARD, "/no/mpirun", limit=20).returncode == 127


@pytest.mark.parametrize("words", WORDS)
def test_status_0_after_words_of_a_failure_is_another_one(words):
    assert status(f"echo '{words}' >&2; exit 0")[::2] == (WORDS[words], f"{words}\n")


def test_words_in_pieces_are_understood():
    assert status("printf 'PRTE has lost communi' >&2; sleep 0.3; echo 'cation with a remote daemon' >&2")[0] == 1


def test_a_command_that_hangs_after_its_job_has_failed_is_killed_with_all_that_it_started():
    began = time.monotonic()
    process = start(
        "sleep 100 & trap '' TERM; echo $!; echo 'All ranks end now, with status 124.' >&2; wait; sleep 100"
    )
    child = psutil.Process(int(process.stdout.readline()))
    assert process.wait(20) == 124
    assert 2.5 < time.monotonic() - began < 15
    assert processes.survivors([child], 2) == []
    assert "has not ended with the job, and is killed" in process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_ends_with_the_guard(number):
    process = start("trap 'exit 5' TERM; echo $$; while :; do sleep 0.1; done")
    command = psutil.Process(int(process.stdout.readline()))
    os.kill(process.pid, number)
    assert process.wait(20) == (5 if number == signal.SIGTERM else -signal.SIGKILL)
    assert processes.survivors([command], 5) == []
    process.communicate()


COUNTS = "trap 'echo got' INT; echo $$; for i in $(seq 20); do sleep 0.1; done; echo end; exit 7"


@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_an_interrupt_reaches_the_command_once(to):
    """mpirun takes a second one for an order to leave everything as it is."""
    process = start(COUNTS)
    process.stdout.readline()
    to(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out.split(), process.returncode) == (["got", "end"], 7), err


def test_a_slow_reader_gets_all_of_it_and_the_status():
    words = "x" * 300_000
    process = start(f"echo '{next(iter(WORDS))}' >&2; head -c 300000 /dev/zero | tr '\\0' x >&2")
    time.sleep(3)
    _, err = process.communicate(timeout=20)
    assert words in err
    assert process.returncode == 124


def test_ctrl_z_stops_the_command_too_and_it_goes_on():
    process = start("echo $$; sleep 3; echo end")
    command = psutil.Process(int(process.stdout.readline()))
    time.sleep(1.0)  # the command runs a moment before its guard knows it
    os.kill(process.pid, signal.SIGTSTP)
    deadline = time.monotonic() + 10
    while {psutil.Process(process.pid).status(), command.status()} != {psutil.STATUS_STOPPED}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "end\n"


def test_what_is_ignored_stays_so():
    process = processes.start("nohup", sys.executable, GUARD, "sh", "-c", "echo $$; sleep 1; echo end")
    process.stdout.readline()
    os.kill(process.pid, signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "end\n"
    assert process.returncode == 0


def test_ctrl_c_in_a_terminal_reaches_the_command_once():
    pid, terminal = pty.fork()
    if pid == 0:  # a program in this terminal that starts another one
        signal.signal(signal.SIGINT, lambda *_: None)
        done = subprocess.run([sys.executable, GUARD, "bash", "-c", COUNTS], check=False)
        os.write(1, f"back {done.returncode} {os.tcgetpgrp(0) == os.getpgrp()}".encode())
        os._exit(0)
    said = os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(terminal, 1000):
            said += data
    os.close(terminal)
    os.waitpid(pid, 0)
    assert said.decode().replace("^C", "").split()[1:] == ["got", "end", "back", "7", "True"]
