# SPDX-License-Identifier: BSD-3-Clause
"""The hosts of these tests are what they seem: apart, reachable, and gone afterwards."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.hosts import network

pytestmark = pytest.mark.hosts
ADDRESS = "import socket; print(socket.gethostname(), socket.gethostbyname('h2'))"
LISTENS = "import socket, time; s = socket.create_server(('', 7000)); print('ready'); time.sleep(60)"
CONNECTS = "import socket; socket.create_connection(('h1', 7000), 1); print('reached')"
OWNER = """
import os, pathlib, sys, time
from tests.hosts import network
hosts = network.Hosts(1, pathlib.Path(sys.argv[1]))
sleeps = hosts.start("h1", "sh", "-c", "echo ready; exec sleep 100")
assert sleeps.saw("ready", 10)
print(hosts.environ["HOSTS_PREFIX"], *hosts.pids("h1"), flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def hosts(make_hosts):
    return make_hosts(2)


@pytest.fixture(scope="module", params=["bridge", "wire"])
def cut_hosts(make_hosts, request):
    return make_hosts(2, request.param)


def python(code):
    return sys.executable, "-c", code


def test_the_scripts_say_how_they_are_used():
    for script in (network.SCRIPT, network.AGENT):
        assert os.access(script, os.X_OK)
    done = subprocess.run(
        [network.SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOSTS_PREFIX": "s", "HOSTS_RUN": "/s"},
    )
    assert done.returncode == 2
    assert "hosts.sh up N [bridge|wire]" in done.stdout


def test_a_machine_without_a_command_says_which(monkeypatch):
    network.problem.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "need iproute2 and util-linux: no ip, unshare" in network.problem()
    network.problem.cache_clear()


def test_each_host_has_a_name_and_knows_the_others(hosts):
    done = hosts.run("h1", *python(ADDRESS))
    assert (done.status, done.out) == (0, "h1 10.77.0.2\n"), done


@pytest.mark.parametrize("fault", ["drop", "cable"])
def test_a_fault_cuts_a_host_off_and_can_be_mended(cut_hosts, fault):
    hosts = cut_hosts
    serves = hosts.start("h1", *python(LISTENS))
    assert serves.saw("ready", 10)
    assert hosts.run("h2", *python(CONNECTS)).out == "reached\n"
    hosts.do(fault, "h1", "on" if fault == "drop" else "out")
    assert hosts.run("h2", *python(CONNECTS)).status == 1
    hosts.do(fault, "h1", "off" if fault == "drop" else "in")
    assert hosts.run("h2", *python(CONNECTS.replace("1)", "5)"))).out == "reached\n"
    hosts.clear()
    assert serves.process.poll() == -signal.SIGKILL
    assert hosts.pids("h1") == []


def test_a_command_that_does_not_end_is_killed(hosts):
    done = hosts.run("h1", "sleep", 100, limit=0.5)
    assert done.status is None
    assert done.seconds < 5
    hosts.clear()


def test_hosts_end_with_the_process_that_made_them(tmp_path):
    if network.problem():
        pytest.skip(network.problem())
    owner = network.Running(
        [*python(OWNER), tmp_path], tmp_path, {**network.environment(), "PYTHONPATH": str(network.ROOT)}, network.ROOT
    )
    assert owner.saw(r"\d+ \d+", 20), owner.done(0)
    prefix, pid = owner.out.split()
    owner.process.kill()
    owner.process.wait()
    end = time.monotonic() + 10
    while prefix in namespaces() and time.monotonic() < end:
        time.sleep(0.1)
    assert prefix not in namespaces()
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
