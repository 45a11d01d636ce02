# SPDX-License-Identifier: BSD-3-Clause
"""The table, the sentence and the JSON."""

import json
import os

import pytest

from syncbn.waits import diagnosis, findings, report
from syncbn.waits.processes import GONE, STOPPED
from syncbn.waits.status import COMPILES, ENDED
from tests.waits.members import BEFORE, CALL, GROUP, groups, inside, outside


def found(members):
    return findings.late(diagnosis.blocked(members, groups(len(members)))[0])


def table(members):
    """The rows of the table, without its head."""
    text = report.text(found(members), members, 124)
    rows = text.split("\n\n")[1].splitlines()
    assert rows[0].split()[:3] == ["rank", "is", "in"]
    return rows[1:]


def test_the_report_of_three_ranks_is_as_printed():
    members = [inside(0, 12.0), outside(1), inside(2, 9.75)]
    assert report.text(found(members), members, 124) == (
        "\n"
        "syncbn: Rank 1 is in no call of syncbn, at train.py:12 in main, while ranks 0, 2 wait in forward 5\n"
        "of 'bn1'.\n"
        "\n"
        "rank  is in               for    last completed       at\n"
        "   0  forward 5 of 'bn1'  12 s   backward 4 of 'bn1'  train.py:12 in main\n"
        "   1  not in a call              backward 4 of 'bn1'  train.py:12 in main\n"
        "   2  forward 5 of 'bn1'  9.8 s  backward 4 of 'bn1'  train.py:12 in main\n"
        "\n"
        "It sleeps, waits for something else (data, a lock, another library's collective), left this call\n"
        "out, or needs longer than the limit. If it may, raise that by SYNCBN_TIMEOUT or\n"
        "syncbn.init(timeout=...).\n"
        'All ranks end now, with status 124. See "It hangs" in the documentation (docs/clusters/hangs.md).\n'
    )


@pytest.mark.parametrize(
    ("member", "parts"),
    [
        (outside(1, None), ["not in a call", "nothing", "train.py:12 in main"]),
        (outside(1, ended=ENDED), ["has ended", BEFORE]),
        (outside(1, ended="ended with KeyError: 3"), ["has ended with KeyError: 3", BEFORE]),
        (
            outside(1, state=GONE),
            ["its process is gone", f"{BEFORE}, or later", "last heard of at train.py:12 in main"],
        ),
        (
            outside(1, state=STOPPED),
            ["stopped by a signal", f"{BEFORE}, or later", "last heard of at train.py:12 in main"],
        ),
        (
            outside(1, silent=True),
            ["gives no sign of life", f"{BEFORE}, or later", "last heard of at train.py:12 in main"],
        ),
        (outside(1, busy=COMPILES), ["not in a call: is compiling", BEFORE, "train.py:12 in main"]),
        (outside(1, evaluates=["'a'"]), ["not in a call: layers in eval mode", BEFORE, "train.py:12 in main"]),
        (inside(1, 3.0, call="World.average", number=9), ["World.average", "3.0 s", BEFORE, "train.py:12 in main"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_row_says_where_a_rank_is(member, parts):
    row = table([inside(0), member])[1]
    assert [part.strip() for part in row.split("  ") if part.strip()] == ["1", *parts]


def test_the_longest_wait_of_a_rank_is_in_its_row():
    member = inside(0, 2.0, group=8, call="World.barrier")
    member.status.waits.insert(0, inside(0, 7.0).status.waits[0])
    assert f"{CALL}  7.0 s" in table([member, outside(1)])[0]


def test_equal_rows_of_many_ranks_are_joined():
    members = [inside(0, 20.0), outside(1), *[inside(rank, 20.0 - rank / 100) for rank in range(2, 64)]]
    rows = table(members)
    assert len(rows) == 2
    assert rows[0].startswith("0, 2-63  forward 5 of 'bn1'  20 s ")
    assert rows[1].startswith("      1  not in a call  ")
    members[40].status.line = ("train.py", 99, "main")
    rows = table(members)
    assert [row.split("  forward")[0].split("  not")[0].strip() for row in rows] == ["0, 2-39, 41-63", "1", "40"]
    assert rows[2].endswith("train.py:99 in main")


def test_up_to_sixteen_ranks_have_a_row_each():
    members = [inside(0), *[outside(rank) for rank in range(1, 16)]]
    assert len(table(members)) == 16
    assert len(table([*members, outside(16)])) == 2


def test_the_time_of_joined_rows_is_the_longest():
    members = [inside(0, 1.0), *[inside(rank, 5.0) for rank in range(1, 20)], outside(20)]
    assert "5.0 s" in table(members)[0]


def test_ctrl_c_is_one_line():
    members = [inside(0), outside(1, ended="ended with KeyboardInterrupt")]
    finding = findings.early(diagnosis.blocked(members, groups(2))[0])
    text = report.text(finding, members, 1)
    assert text.startswith("\nsyncbn: Rank 1 ended with KeyboardInterrupt after backward 4")
    assert text.count("\n") == 2


def test_the_json_holds_all_that_is_known():
    members = [inside(0, 12.34), outside(1, state=STOPPED, evaluates=["'a'"]), outside(2, None, busy=COMPILES)]
    finding = found(members)
    content = report.as_json(finding, members, 124)
    assert content.endswith("}\n")
    said = json.loads(content)
    assert {name: said[name] for name in finding._fields} == finding._asdict()
    assert (said["kind"], said["status"], said["waiting"], said["missing"]) == ("limit", 124, [0], [1, 2])
    line = {"file": "train.py", "line": 12, "function": "main"}
    call = {"group": GROUP, "begun": 5, "current": CALL, "completed": BEFORE, "failed": None, "waited": 12.3}
    known = {"host": "", "process": "runs", "silent": False, "ended": None, "busy": None, "elsewhere": None}
    known |= {"evaluates": []}
    known["line"] = line
    stopped = {"process": "stopped", "evaluates": ["'a'"]}
    assert said["ranks"] == [
        {**known, "rank": 0, "calls": [call]},
        {**known, **stopped, "rank": 1, "calls": [{**call, "begun": 4, "current": None, "waited": 0.0}]},
        {**known, "rank": 2, "busy": COMPILES, "calls": []},
    ]


def test_the_json_is_written_or_a_line_says_why_not(tmp_path):
    path = tmp_path / "report.json"
    assert report.write_json(str(path), "{}\n") == ""
    assert path.read_text() == "{}\n"
    for wrong in (tmp_path / "no" / "report.json", tmp_path):
        said = report.write_json(str(wrong), "{}\n")
        assert said.startswith(f"syncbn: the report could not be written to {wrong}: ")
        assert said.endswith("\n")


def test_a_warning_says_when_the_job_ends():
    finding = found([inside(0, 6.0), outside(1)])._replace(sentence="Rank 1 is late.")
    assert report.warning(finding, 30.0) == "syncbn: after 6.0 s: Rank 1 is late; the job ends after 30 s.\n"
    assert report.warning(finding, float("inf")).endswith("Rank 1 is late; it waits without a limit.\n")


def test_stderr_gets_all_of_a_text(capfd):
    text = "a\udcffé" + "x" * 100000 + "\n"
    report.write(text)
    assert capfd.readouterr().err == text.replace("\udcff", "?")


def test_a_closed_stderr_is_no_exception(monkeypatch):
    def closed(fd, data):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "write", closed)
    report.write("lost\n")
