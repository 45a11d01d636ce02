# SPDX-License-Identifier: BSD-3-Clause
"""How a job of several hosts starts, and what it says where it cannot."""

import json
import re
import sys

import pytest

from tests.hosts import jobs
from tests.hosts.jobs import Job
from tests.hosts.network import ROOT

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]
PROGRAM = ROOT / "tests/hosts/start_program.py"
INCLUDE = "OMPI_MCA_btl_tcp_if_include"
LIMIT = 200  # a busy machine takes minutes to import torch several times
ANSWERS = """
import sys
from syncbn.transports import reach
reach.require_answer("10.77.0.3", 29500, "rank 0", "", limit=0.5)  # it refuses: rank 0 may come later
try:
    reach.require_answer("10.77.0.1", 29500, "rank 0", "Set MASTER_ADDR.", limit=0.5)
except RuntimeError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def debian(make_hosts):
    """Their own names are 127.0.1.1, and both have a docker0 with one address."""
    return make_hosts(2, ETC_HOSTS="debian", DOCKER0=1)


@pytest.fixture(scope="module")
def bare(make_hosts):
    """They know no names, also not their own."""
    return make_hosts(3, ETC_HOSTS="bare", DOCKER0=1)


def doctor(monkeypatch, hosts, way, *words, per_host=1, **environ):
    """What the command says, as JSON, and the statuses."""
    monkeypatch.setattr(jobs, "PROGRAM", "-m")
    job = Job(hosts, way, per_host, "syncbn", "doctor", "--json", *words, **environ)
    statuses = job.statuses(LIMIT)
    found = re.search(r"^\{.*^\}", job.out, re.DOTALL | re.MULTILINE)
    assert found, f"{statuses}\n{job.out}\n{job.err}"
    hosts.clear()
    return json.loads(found.group()), statuses, job


@pytest.mark.parametrize(("way", "more"), [("plain", {"MASTER_ADDR": "h1"}), ("torchrun", {})])
def test_hosts_whose_own_names_are_loopback_train_to_the_bit(debian, way, more):
    job = Job(debian, way, 1, **more)
    assert set(job.statuses(LIMIT)) == {0}, job.out + job.err
    assert job.out.count(": 0 differences") == 2, job.out + job.err
    debian.clear()


def test_ddp_under_mpirun_needs_no_names(bare, monkeypatch):
    """Rank 0 sends its address, at which its store listens; its name would mean nothing on the other hosts."""
    monkeypatch.setattr(jobs, "PROGRAM", PROGRAM)
    job = Job(bare, "mpirun", 1, "--ddp", **{INCLUDE: "10.77.0.0/24"})
    assert set(job.statuses(LIMIT)) == {0}, job.out + job.err
    assert sorted(re.findall(r"ddp on (\S+)", job.out)) == ["h1", "h2", "h3"]
    bare.clear()


def test_an_interface_that_a_host_does_not_have_is_one_error_on_all(debian, monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", PROGRAM)
    job = Job(debian, "plain", 1)
    job.parts[1][1].process.kill()
    own = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": jobs.PORT}
    done = debian.run("h2", sys.executable, PROGRAM, limit=LIMIT, GLOO_SOCKET_IFNAME="nope", **own)
    assert set(job.statuses(10)) == {1, -9}, job.out + job.err
    text = (
        "RuntimeError: On rank 1: GLOO_SOCKET_IFNAME must name a network interface of each host; received 'nope' on "
        "h2, whose interfaces are eth0 (10.77.0.2), docker0 (172.17.0.1). Set GLOO_SOCKET_IFNAME to one of them"
    )
    assert f"raised on h2: {text}" in done.out, done
    assert f"raised on h1: {text}" in job.out, job.out + job.err
    debian.clear()


def test_a_host_that_does_not_answer_is_named_with_the_variable(bare):
    bare.do("drop", "h1", "on")
    done = bare.run("h2", sys.executable, "-c", ANSWERS)
    bare.clear()
    assert done.status == 1, done
    assert (
        "Every host must reach rank 0 at 10.77.0.1 port 29500; received no answer within 0.5 s on h2 (10.77.0.2): "
        "a firewall, a host that is down, or an address of another network. Set MASTER_ADDR." in done.err
    ), done


def test_the_doctor_says_what_each_host_offers_and_who_reaches_whom(bare, monkeypatch):
    bare.run("h2", "ip", "route", "add", "blackhole", "10.77.0.3/32")
    try:
        report, statuses, job = doctor(monkeypatch, bare, "plain", "--timeout", 40)
    finally:
        bare.run("h2", "ip", "route", "del", "blackhole", "10.77.0.3/32")
    assert set(statuses) == {1}, job.err
    assert [list(host.values()) for host in report["network"]["hosts"]] == [
        [f"h{i + 1}", [i], f"10.77.0.{i + 1}", "eth0", "", ["docker0 172.17.0.1"]] for i in range(3)
    ]
    found = {(each["source"], each["target"]): each["found"] for each in report["network"]["routes"]}
    assert len(found) == 6
    assert {pair for pair, how in found.items() if how != "reached"} == {("h2", "h3"), ("h3", "h2")}
    [problem] = report["problems"]
    assert "h2 does not reach h3 at 10.77.0.3 (no answer)" in problem["what"]
    assert "GLOO_SOCKET_IFNAME" in problem["remedy"]
    names, repeated = report["warnings"]
    assert "h1 (unknown), h2 (unknown), h3 (unknown)" in names["what"]
    assert "set GLOO_SOCKET_IFNAME=eth0" in names["remedy"]
    assert "several hosts have the same address: docker0 172.17.0.1" in repeated["what"]


def test_the_doctor_names_what_makes_open_mpi_wait(debian, monkeypatch):
    """Open MPI connects to docker0's address, which is this host's own. Its daemons still pass texts on."""
    report, statuses, job = doctor(monkeypatch, debian, "mpirun", "--timeout", 12)
    assert statuses == [1], job.err
    assert [host["address"] for host in report["network"]["hosts"]] == ["10.77.0.1", "10.77.0.2"]
    [problem] = report["problems"]
    assert (
        "could not connect the processes within 12 s: several hosts have the same address: docker0" in problem["what"]
    )
    assert problem["remedy"].startswith(f"Set {INCLUDE}=10.77.0.0/24")


def test_the_doctor_warns_if_all_ranks_are_on_one_of_several_hosts(debian, monkeypatch):
    policy = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # what the launch script used to set
    report, statuses, job = doctor(monkeypatch, debian, "mpirun", forks=False, **policy)
    assert statuses == [0], job.err
    assert {place["host"] for place in report["ranks"]} == {"h1"}
    warning, *_ = report["warnings"]  # one more, if other programs use the cores
    assert warning["what"] == "all 2 ranks are on host h1, of 2 hosts that the launcher knows"
    assert "slot:oversubscribe" in warning["remedy"]


def test_the_verdict_on_the_latency_is_that_of_the_delay_between_hosts(make_hosts, monkeypatch):
    far = make_hosts(2, "wire")
    far.do("shape", 30_000, 0, 0)
    report, statuses, job = doctor(monkeypatch, far, "plain")
    assert statuses == [0, 0], job.err
    assert {25_000 < each["round_trip_us"] / 2 < 60_000 for each in report["network"]["routes"]} == {True}
    assert report["verdict"]["expected_us"] > 25_000
    assert report["verdict"]["status"] in ("as expected", "above the usual")
    assert " from host to host" in report["verdict"]["text"]
