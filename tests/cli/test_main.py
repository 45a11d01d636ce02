# SPDX-License-Identifier: BSD-3-Clause
import re
import signal
import sys

import pytest

import syncbn
from syncbn.cli import main
from tests import processes, warm

BENCH = ("-m", "syncbn", "bench", "--shapes", "2,64,56,56", "--repeats", "100000")


@pytest.fixture
def naps(monkeypatch):
    """Runs main() here: without its change of a signal handler, and with its pauses recorded instead of slept."""
    slept = []
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    monkeypatch.setattr(main.time, "sleep", slept.append)
    return slept


def test_python_m_syncbn_lists_its_commands():
    done = warm.python("-m", "syncbn", "--help")
    assert done.returncode == 0
    assert all(re.search(rf"^ +{command} ", done.stdout, re.MULTILINE) for command in ("doctor", "test", "bench"))


def test_version_is_that_of_the_package(naps, capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert capsys.readouterr().out.strip() == f"syncbn {syncbn.__version__}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["heal"], "invalid choice: 'heal'"),
        (["bench", "--shapes", "2,64,8"], "four whole numbers N,C,H,W; received '2,64,8'"),
        (["bench", "--shapes", "2,64,8,x"], "received '2,64,8,x'"),
        (["bench", "--shapes", "2,0,8,8"], "N, C, H, W >= 1"),
        (["bench", "--shapes", "1,64,1,1"], "N \\* H \\* W >= 2; received '1,64,1,1'"),
        (["bench", "--dtype", "int8"], "float32"),
        (["bench", "--repeats", "0"], "whole number >= 1; received '0'"),
        (["bench", "--warmup", "-1"], "whole number >= 0; received '-1'"),
        (["bench", "--json", "--csv"], "not allowed with"),
        (["doctor", "--timeout", "0"], "seconds > 0; received '0'"),
        (["doctor", "--model", "package.module"], "needs package.module:function; received 'package.module'"),
        (["doctor", "--model", "models/net.py:build"], "received 'models/net.py:build'"),
        (["doctor", "--timeout", "soon"], "seconds > 0; received 'soon'"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_say_what_is_wrong(naps, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main.main(words)
    assert caught.value.code == 2
    assert naps == []
    assert re.search(message, capsys.readouterr().err)


def test_rank_0_leaves_its_launcher_time_to_pass_on_what_it_has_said(naps, capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(SystemExit):
        main.main(["heal"])
    assert naps == [main.PASSED_ON]
    assert "heal" in capsys.readouterr().err


def test_another_rank_fails_silently_and_after_rank_0(naps, capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        main.main(["heal"])
    assert caught.value.code == 2
    assert naps == [main.GRACE]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("launcher", [warm.mpirun, warm.torchrun])
def test_wrong_arguments_are_reported_once_under_a_launcher_and_end_it_with_a_status(launcher):
    done = launcher(2, "-m", "syncbn", "bench", "--repeats", "none")
    assert done.returncode == {warm.mpirun: 2, warm.torchrun: 1}[launcher]  # torchrun ends with its own
    assert done.stderr.count("needs a whole number") == 1
    assert done.stdout == ""


def test_ctrl_c_leaves_no_traceback():
    process = processes.start(sys.executable, *BENCH)
    try:
        assert process.stdout.readline().startswith("cpu")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        processes.kill(process)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_ctrl_c_under_mpirun_leaves_no_process():
    process = processes.start("launch/mpirun.sh", *BENCH, NPROC=2, PYTHON=sys.executable)
    try:
        assert process.stdout.readline().startswith("cpu")
        children = processes.descendants(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        left = processes.survivors(children)
    finally:
        processes.kill(process)
    assert len(children) >= 2
    assert left == []
    assert "Traceback" not in err
