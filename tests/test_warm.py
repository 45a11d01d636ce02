# SPDX-License-Identifier: BSD-3-Clause
"""A fork of a process that has imported torch is what the same command is in a process of its own."""

import os
import signal

import psutil
import pytest

from tests import processes, warm

PRINTS = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("OWN"), __name__, [path for path in sys.path if "warm" in path])
print(sys.stdin.read(), file=sys.stderr)
"""
COMMANDS = {
    "text": ("-c", PRINTS, "a word", "another"),
    "file": ("prints.py", "--option", "1"),
    "module": ("-m", "prints", "1"),
    "unbuffered": ("-u", "-c", "import os; print(1, end=''); os._exit(3)"),
    "status": ("-c", "import sys; sys.exit(7)"),
    "words": ("-c", "import sys; sys.exit('no')"),
    "error": ("-c", "def f():\n    raise ValueError('a reason')\n\n\nf()"),
    "error in a file": ("raises.py",),
    "no file": ("nothing.py",),
    "no module": ("-m", "nothing"),
    "interrupt": ("-c", "raise KeyboardInterrupt"),
    "killed": ("-c", "import os; os.kill(os.getpid(), 9)"),
    "at exit": ("-c", "import atexit; atexit.register(print, 'the last word')"),
    "another option": ("-X", "utf8", "-c", "import sys; print(sys.flags.utf8_mode)"),
    "spawns": ("spawns.py",),
}
SPAWNS = """
import multiprocessing

def square(x):
    return x * x

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [2, 3]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("programs")
    (made / "prints.py").write_text(PRINTS)
    (made / "raises.py").write_text("raise ValueError(1)\n")
    (made / "spawns.py").write_text(SPAWNS)
    return made


@pytest.mark.xdist_group("warm")
def test_a_fork_writes_whole_lines_where_it_is_told_to(monkeypatch):
    """Words of two ranks must not mix in a line; unbuffered Python, which a launcher starts, writes word by word."""
    program = "import os; print('a', 'line'); print('half', end=''); os._exit(0)"
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert warm.python("-c", program).stdout == ""
    for how in ((["-u"], {}), ([], {"PYTHONUNBUFFERED": 1})):
        options, environ = how
        assert warm.python(*options, "-c", program, **environ).stdout == "a line\nhalf"
        assert warm.python(*options, "-c", program, SYNCBN_TEST_WHOLE_LINES=1, **environ).stdout == "a line\n"


@pytest.mark.xdist_group("warm")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fork_prints_and_ends_as_a_process_of_its_own(folder, command):
    own, fork = (start(*COMMANDS[command], cwd=folder, OWN="mine") for start in (processes.python, warm.python))
    said = [(done.returncode, done.stdout, done.stderr) for done in (own, fork)]
    if command in ("no file", "no module"):  # Python says it in its own words
        said = [(bool(status), out, "nothing" in err) for status, out, err in said]
    assert said[0] == said[1]


def forked(tmp_path, text):
    """A fork that says its process, and the stub that stands for it."""
    (tmp_path / "sleeps.py").write_text(text)
    stub = processes.start(warm.commands() / "python", "-u", tmp_path / "sleeps.py")
    return stub, psutil.Process(int(stub.stdout.readline()))


SLEEPS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print(os.getpid())
time.sleep(60)
"""


@pytest.mark.xdist_group("warm")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
def test_a_signal_to_the_stub_ends_the_fork(tmp_path, number, status):
    stub, fork = forked(tmp_path, SLEEPS)
    assert fork.pid != stub.pid
    os.kill(stub.pid, number)
    assert stub.wait(20) == status
    assert processes.survivors([fork]) == []
    stub.communicate()


@pytest.mark.xdist_group("warm")
def test_ranks_of_a_launcher_are_forks_and_their_failure_is_its_own(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(
        "import time; began = time.process_time()\nimport torch.distributed, syncbn\n"
        "world = syncbn.init()\nassert time.process_time() - began < 1, 'torch was imported anew'\n"
        "print(f'{world.rank} of {world.size}\\n', end='')\nworld.barrier()\n"
        "if world.rank == 1: raise ValueError('mine')\n"
    )
    for start in (warm.mpirun, warm.torchrun):
        done = start(2, program, limit=60)
        assert sorted(done.stdout.split("\n")) == ["", "0 of 2", "1 of 2"], done.stderr
        assert done.returncode not in (0, -9)
        assert "ValueError: mine" in done.stderr
