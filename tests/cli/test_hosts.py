# SPDX-License-Identifier: BSD-3-Clause
"""What the commands say where the ranks are on several hosts."""

import json

import pytest

from syncbn.cli.bench import report
from syncbn.cli.bench.report import Row
from syncbn.cli.doctor import text
from syncbn.cli.doctor.report import Report
from tests import warm

BOTH = """
import os, sys
from syncbn.waits import processes
own = processes.own()
processes.own = lambda: own._replace(host=int(os.environ["RANK"]))  # a host for each rank
from syncbn.cli import main
status = main.main(["doctor", "--json"]) or main.main(["bench", "--json", "--shapes", "2,4,3,3", "--repeats", "3"])
sys.exit(status)
"""


@pytest.mark.program
def test_doctor_and_bench_time_all_ranks_beside_those_of_one_node(tmp_path):
    script = tmp_path / "both.py"
    script.write_text(BOTH)
    done = warm.torchrun(2, script, limit=120)
    assert done.returncode == 0, done.stderr
    doctors, end = json.JSONDecoder().raw_decode(done.stdout)
    bench = json.loads(done.stdout[end:])
    assert doctors["hosts"] == 2
    assert list(doctors["node_latency_us"]) == ["64", "512", "2048"]
    assert all(doctors["node_latency_us"][C] < us for C, us in doctors["latency_us"].items()), doctors
    assert 0 < bench["rows"][0]["node_us"] < bench["rows"][0]["syncbn_us"], bench


def test_the_doctor_has_a_line_for_one_node_on_several_hosts_only():
    times = {"64": 900.0}
    assert "in one node" not in text.to_text(Report(processes=4, latency_us=times))
    said = text.to_text(Report(processes=4, hosts=2, latency_us=times, node_latency_us={"64": 2.5}))
    assert "in one node  2.5 us at C = 64 (group_size='node', 2 ranks a host)" in said
    said = text.to_text(Report(processes=5, hosts=2, latency_us=times))
    assert "in one node  not timed: the 2 hosts have different numbers of ranks" in said


def test_the_table_has_a_column_for_one_node_on_several_hosts_only():
    rows = [Row((2, 64, 8, 8), 50.0, 100.0, 800.0, 60.0)]
    header, _, row, last = report.as_table(rows).splitlines()
    assert header.split()[3:7] == ["syncbn", "us", "node", "us"]
    assert row.split() == ["2,64,8,8", "50", "100", "60", "800", "8.00", "2.00"]
    assert last.split() == ["geometric", "mean", "8.00", "2.00"]
    assert report.as_csv(rows).splitlines() == [
        "N,C,H,W,torch_us,syncbn_us,baseline_us,node_us",
        "2,64,8,8,50.0,100.0,800.0,60.0",
    ]
    assert "node" not in report.as_table([Row((2, 64, 8, 8), 50.0, 100.0)])
