# SPDX-License-Identifier: BSD-3-Clause
"""Where a job of several hosts listens, and what a stranger on their network can do there: nothing by rubbish."""

import json
import re
import sys

import pytest

from tests.hosts import jobs
from tests.hosts.jobs import Job
from tests.hosts.network import ROOT

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]
PROGRAM = ROOT / "tests/hosts/start_program.py"
LIMIT = 200  # a busy machine takes minutes to import torch several times
# To each listener: another protocol, zeros, ones, all bytes, a number as torch's store expects it,
# JSON that is nested too deeply, and nothing at all.
STRANGER = r"""
import json, socket, sys, time
said = [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b"\xff" * 5000, bytes(range(256)) * 9, b"\x3c\x85\xf7\x3c"]
said += [b"[" * 1500 + b"\n", b""]
end, held = time.monotonic() + 150, []
for address in map(tuple, json.loads(sys.argv[1])):
    for words in said:
        while True:
            try:
                held.append(socket.create_connection(address, 3))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end
                time.sleep(0.1)
        held[-1].sendall(words)
time.sleep(0.5)
print("said", len(held))
"""


@pytest.fixture(scope="module")
def hosts(make_hosts):
    return make_hosts(2)


def stranger_says(hosts, addresses):
    done = hosts.run("x", sys.executable, "-c", STRANGER, json.dumps(addresses), limit=LIMIT)
    assert done.out == f"said {7 * len(addresses)}\n", done


def listeners(job, text):
    """Where the ranks listen, once all say so."""
    for _, part in job:
        assert part.saw("listens on h", LIMIT), part.out + part.err + text
    return [
        each for _, part in job for found in re.findall(r"listens on h\d: (.*)", part.out) for each in json.loads(found)
    ]


def statuses_and_bits(parts):
    statuses = {part.done(LIMIT).status for _, part in parts}
    return statuses, "".join(part.out for _, part in parts).count(": 0 differences")


def test_with_plain_variables_all_listeners_are_on_the_network_of_the_job_and_rubbish_changes_nothing(hosts):
    own = {"WORLD_SIZE": 2, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": jobs.PORT}
    go = hosts.folder / "go"
    words = (sys.executable, PROGRAM, go)
    parts = [("h1", hosts.start("h1", *words, RANK=0, **own))]
    stranger_says(hosts, [("10.77.0.1", jobs.PORT)])  # while rank 0 waits for the other one
    parts.append(("h2", hosts.start("h2", *words, RANK=1, **own)))
    found = listeners(parts, "")
    assert ["10.77.0.1", jobs.PORT] in found
    assert len(found) >= 5  # besides the store: a group of gloo and the side channel on each host
    assert {address for address, _ in found} == {"10.77.0.1", "10.77.0.2"}
    stranger_says(hosts, found)
    go.touch()
    assert statuses_and_bits(parts) == ({0}, 4), "".join(part.out + part.err for _, part in parts)


def test_under_mpirun_ours_are_there_too_and_only_mpi_listens_everywhere(hosts, monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", PROGRAM)
    go = hosts.folder / "go-mpi"
    job = Job(hosts, "mpirun", 1, "--ddp", go)
    assert job.parts[0][1].saw(r"(?s)listens on h.*listens on h", LIMIT), job.out + job.err
    found = listeners(job.parts, job.err)
    everywhere = [port for address, port in found if address in ("0.0.0.0", "::")]
    ours = [each for each in found if each[1] not in everywhere]
    assert set(everywhere) <= set(range(1024, 1100))  # btl_tcp_port_min_v4 of Open MPI
    assert len(ours) >= 4  # gloo and the side channel on each host
    assert {address for address, _ in ours} == {"10.77.0.1", "10.77.0.2"}
    stranger_says(hosts, ours)
    go.touch()
    assert statuses_and_bits(job.parts) == ({0}, 4), job.out + job.err
