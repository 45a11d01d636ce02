# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn test` passes where a job trains as one process does, and fails on every rank where it does not."""

import json
import socket
import time

import pytest
import torch

from syncbn.cli.selftest import command, comparison, training
from syncbn.cli.selftest.comparison import BOUND, WHATS, Row, largest
from syncbn.cli.selftest.report import Report
from syncbn.transports.launchers import Launch
from tests import processes, warm

TEST = ("-m", "syncbn", "test")
LOCAL = """
import sys, syncbn
from syncbn.cli import main
kept = syncbn.convert_sync_batchnorm
syncbn.convert_sync_batchnorm = lambda model: model  # torch's own layers, on local batches
try:
    status = main.main(["test", "--json"])
finally:
    syncbn.convert_sync_batchnorm = kept
sys.exit(status)
"""
LAUNCHED = {"mpirun": (warm.mpirun, 3), "torchrun": (warm.torchrun, 2)}


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    """What the command does one time after the other on the same processes of one launcher, and its name."""
    start, n = LAUNCHED[request.param]
    cases = {
        "text": TEST,
        "json": (*TEST, "--json"),
        "local": ("-c", LOCAL),
        "unconnected": ("SYNCBN_TRANSPORT=single", *TEST),
    }
    return request.param, processes.many(start, n, cases, tmp_path_factory.mktemp("selftest"))


under_each = pytest.mark.parametrize(
    "together",
    [pytest.param(name, marks=pytest.mark.xdist_group(f"selftest {name}")) for name in LAUNCHED],
    indirect=True,
)


@under_each
def test_a_job_that_trains_as_one_process_passes_on_every_rank(together):
    launcher, said = together
    n = LAUNCHED[launcher][1]
    done = said["text"]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f": {n} processes train as one process does on the whole batch.") == 1
    assert done.stdout.count("World.average_gradients") == len(WHATS)
    assert done.stdout.count("DistributedDataParallel  ") == {"torchrun": len(WHATS), "mpirun": 0}[launcher]
    assert ("DistributedDataParallel was not tried" in done.stdout) == (launcher == "mpirun")
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@under_each
def test_json_has_every_row_and_how_much_synchronising_matters(together):
    launcher, said = together
    report = json.loads(said["json"].stdout)
    n = LAUNCHED[launcher][1]
    assert said["json"].returncode == 0
    assert (report["ok"], report["problem"]) == (True, "")
    assert (report["processes"], report["local_batches"]) == (n, training.local_batches(n))
    assert report["transport"] in ("shm", "mpi", "torch")
    assert {row["what"] for row in report["rows"]} == set(WHATS)
    assert all(row["ok"] and row["difference"] <= row["bound"] <= BOUND for row in report["rows"])
    assert report["unsynchronised"] > 100 * BOUND


@under_each
def test_layers_of_local_batches_fail_it_on_every_rank(together):
    report = json.loads(together[1]["local"].stdout)
    assert together[1]["local"].returncode == 1  # of all ranks
    assert not report["ok"]
    found = {row["what"]: row for row in report["rows"] if row["gradients"] == command.AVERAGE}
    assert not any(found[what]["ok"] for what in ("parameters", "running statistics", "outputs"))
    assert found["parameters"]["difference"] > 100 * BOUND


@under_each
def test_processes_that_nothing_connects_fail_it(together):
    done = together[1]["unconnected"]
    assert done.returncode == 1
    assert "FAILED: could not connect the processes: all processes must be connected; " in done.stdout
    assert done.stderr == ""  # the other ranks have the same error


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process."""
    cases = {
        "limit": ("SYNCBN_TIMEOUT=soon", *TEST),  # the first: a limit that was given once holds
        "text": TEST,
        "json": (*TEST, "--json"),
        "unreadable": ("RANK=0", "WORLD_SIZE=two", *TEST),
        "device": (*TEST, "--device", "abacus"),
    }
    return processes.many(warm.python, 1, cases, tmp_path_factory.mktemp("alone"))


in_one_process = pytest.mark.xdist_group("selftest alone")


@in_one_process
def test_alone_it_says_that_nothing_was_synchronised_and_how_to_start_several(alone):
    done = alone["text"]
    assert done.returncode == 0, done.stdout
    assert "and nothing was synchronised" in done.stdout
    assert "torchrun --nproc-per-node 2 -m syncbn test" in done.stdout
    assert "mpirun -n 2 python -m mpi4py -m syncbn test" in done.stdout
    report = json.loads(alone["json"].stdout)
    assert (report["ok"], report["unsynchronised"], report["transport"]) == (True, None, "single")


@in_one_process
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unreadable", "FAILED: could not connect the processes: WORLD_SIZE must be a whole number; received 'two'"),
        (
            "limit",
            "SYNCBN_TIMEOUT must be a number of seconds above 0, or inf to wait without a limit; received 'soon'",
        ),
        ("device", "syncbn.init needs a CPU or CUDA device, or None; received 'abacus'"),
    ],
)
def test_what_keeps_it_from_starting_is_its_result(alone, case, words):
    done = alone[case]
    assert done.returncode == 1
    assert words in done.stdout.replace("\n", " ")
    assert done.stderr == ""


def test_a_rank_that_never_comes_is_named_within_the_limit_of_waits():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    absent = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SYNCBN_TIMEOUT": 6}
    began = time.monotonic()
    done = warm.python(*TEST, "--json", limit=60, **absent)
    assert time.monotonic() - began < 6 + 20  # and what it takes to start, on a busy machine
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (1, False)
    assert "rank 1 did not come to 127.0.0.1" in report["problem"]


def test_what_takes_longer_than_the_limit_says_where_it_was(monkeypatch, capsys):
    ended = []
    monkeypatch.setenv("SYNCBN_TIMEOUT", "0.05")
    monkeypatch.setattr("syncbn.cli.deadline.os._exit", ended.append)
    monkeypatch.setattr("syncbn.cli.deadline.faulthandler.dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(command, "_connect", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(command, "_test", lambda *_: None)
    assert command.run(as_json=False) == 1
    assert ended == [1]
    said = capsys.readouterr().out.replace("\n", " ")
    assert "FAILED: could not connect the processes within the 0.05 s of SYNCBN_TIMEOUT" in said


@pytest.mark.parametrize(
    ("error", "rank", "printed"),
    [
        (RuntimeError("On rank 1: no"), 1, False),
        (ValueError("All ranks must be in one call"), 1, False),
        (MemoryError("no memory"), 1, True),
        (MemoryError("no memory"), 0, False),  # it prints the report
    ],
)
def test_a_rank_prints_an_error_that_it_has_alone(capsys, error, rank, printed):
    command._speak_of_own(error, Launch("openmpi", rank, 2, rank, True, ""))
    assert bool(capsys.readouterr().err) == printed


def test_what_is_not_a_number_is_no_small_difference():
    nan = [torch.tensor([0.0, torch.nan])]
    assert largest(nan, nan) == torch.inf
    assert largest([torch.ones(0)], [torch.ones(0)]) == 0.0
    assert largest([torch.ones(2)], [torch.tensor([1.0, 1.5])]) == 0.5
    assert not Row("", "", torch.inf, BOUND).ok


def test_a_report_without_rows_is_no_success():
    assert not Report().ok
    assert not Report(rows=[Row("", "outputs", 1.0, BOUND)]).ok
    assert "FAILED in 0.0 s" in Report(rows=[Row("", "outputs", 1.0, BOUND)]).to_text()


def test_local_batches_are_uneven_and_one_is_empty():
    assert training.local_batches(1) == [4]
    assert training.local_batches(2) == [4, 10]
    assert training.local_batches(5) == [4, 10, 8, 6, 0]


def test_the_bound_is_far_above_rounding_and_far_below_what_local_batches_do():
    counts = training.local_batches(4)
    data = training.batches(sum(counts), torch.device("cpu"))
    one = training.in_one_process(data, torch.device("cpu"))
    local = training.unsynchronised(data, torch.device("cpu"), counts)
    assert largest(local.parameters, one.parameters) > 100 * comparison.BOUND
    whole = training.unsynchronised(data, torch.device("cpu"), [sum(counts)])
    assert largest(whole.parameters, one.parameters) < comparison.BOUND / 10
