# SPDX-License-Identifier: BSD-3-Clause
"""What `python -m benchmarks.gpu` measures first, what it computes from times, and how it judges and writes that."""

import json

import pytest

from benchmarks.gpu import main
from benchmarks.gpu.methods import COPY, OURS, THEIRS
from benchmarks.gpu.plan import DTYPES, Case, Options, plan, seconds_of_turns
from benchmarks.gpu.report import Report
from benchmarks.gpu.targets import TWO_IMAGES, Measured, derive, judge, must_move

TWO = (2, 64, 56, 56)
LARGE = (2, 256, 512, 512)
SMALLER = (32, 64, 112, 112)
MICROSECOND = 1e3  # of GB/s: B / us / 1000


def measured(shape, method, us, graph_us=None, host_waits=0.0):
    """One method whose GPU time is the time of a replay, for which `graph_us` stands, or `us`."""
    graph_us = us if graph_us is None else graph_us
    return Measured(shape, "float32", "contiguous", method, 4, (us,), (graph_us,), graph_us, 4.0, host_waits)


def case(shape, ours, theirs, copy=10.0, **more):
    rows = [measured(shape, COPY, copy)]
    rows += [measured(shape, name, ours, **more) for name in OURS]
    return rows + [measured(shape, name, theirs) for name in THEIRS]


def targets(*cases):
    return {target.target.partition(":")[0]: target for target in judge([r for c in cases for r in derive(c, 0)])}


def test_what_the_cache_holds_is_read_once_and_the_rest_twice():
    B = 2 * 3 * 4 * 4 * 4
    assert must_move((2, 3, 4, 4), 4, cache=2 * B) == 5 * B
    assert must_move((2, 3, 4, 4), 4, cache=B) == 6 * B
    assert must_move((2, 3, 4, 4), 4, cache=0) == 8 * B


def test_a_row_has_bandwidth_and_ratios():
    rows = {row.measured.method: row for row in derive(case(TWO, ours=20.0, theirs=50.0), cache=0)}
    x_bytes = 2 * 64 * 56 * 56 * 4
    assert rows[COPY].gb_per_s == pytest.approx(5 * x_bytes / 10.0 / MICROSECOND)
    assert rows[COPY].of_copy == 1
    assert rows[OURS[0]].gb_per_s == pytest.approx(8 * x_bytes / 20.0 / MICROSECOND)
    assert rows[OURS[0]].of_copy == pytest.approx(8 / 20 * 10 / 5)
    assert rows[OURS[0]].eager_ratio == rows[OURS[0]].gpu_ratio == 2.5
    assert rows[THEIRS[0]].eager_ratio is None
    assert rows[OURS[1]].as_dict()["must_move"] == 8 * x_bytes


def test_targets_are_judged_by_the_worst_row():
    found = targets(case(TWO, ours=10.0, theirs=31.0), case((2, 256, 14, 14), ours=10.0, theirs=29.0))
    eager = found["2 images, eager"]
    assert (eager.result, eager.rows, eager.short, eager.worst) == ("missed", 4, 2, 2.9)
    assert eager.where.startswith("2,256,14,14 float32 contiguous, syncbn, ")
    assert found["2 images, graph replay"].result == "met"
    assert found["x of 256 MB"].result == "not measured"
    assert found["every row, GPU time"].worst == 2.9


@pytest.mark.parametrize(("us", "met"), [(18.0, "met"), (19.0, "missed")])
def test_bandwidth_is_held_against_the_copy_at_large_shapes(us, met):
    found = targets(case(LARGE, ours=us, theirs=us, copy=10.0), case(TWO, ours=1000.0, theirs=3000.0))
    assert found["x of 256 MB"].result == met
    assert found["x of 256 MB"].worst == pytest.approx(8 / 5 * 10 / us)


def test_bandwidth_of_smaller_shapes_is_reported_and_not_judged():
    found = targets(case(SMALLER, ours=100.0, theirs=100.0, copy=10.0))
    assert found["x of 256 MB"].result == "not measured"
    assert found["smaller large shapes"].result == "not judged"
    assert found["smaller large shapes"].worst == pytest.approx(8 / 5 * 10 / 100)


def test_the_yardstick_is_the_fastest_of_the_copys_times():
    for times in ((10.0, 30.0, 20.0), (30.0, 10.0, 20.0), (30.0, 20.0, 10.0), (10.0, None, None)):
        eager, graph, gpu = times
        copy = Measured(LARGE, "float32", "contiguous", COPY, 4, (eager,), (graph,) if graph else (), gpu)
        rows = derive([copy, measured(LARGE, OURS[0], 16.0)], cache=0)
        assert [row.of_copy for row in rows] == [1, pytest.approx(8 / 5 * 10 / 16)], times


def test_a_slow_moment_is_in_both_times_of_a_ratio():
    def turns(method, *times):
        return Measured(TWO, "float32", "contiguous", method, 4, times, times)

    ours, theirs = turns(OURS[0], 10.0, 10.0, 30.0, 30.0, 30.0), turns(THEIRS[0], 40.0, 40.0, 40.0, 120.0, 120.0)
    row = derive([ours, theirs], cache=0)[0]
    assert row.eager_ratio == row.graph_ratio == 4.0
    assert theirs.eager_us / ours.eager_us < 2
    assert (row.as_dict()["eager_us"], row.as_dict()["eager_turns"]) == (30.0, ours.eager_turns)


def test_slower_than_torchs_kernels_in_any_row_misses():
    found = targets(case((64, 2048), ours=10.0, theirs=9.0), case(LARGE, ours=10.0, theirs=90.0))
    assert (found["every row, GPU time"].result, found["every row, GPU time"].short) == ("missed", 2)


def test_a_wait_of_the_host_misses():
    assert targets(case(TWO, 1.0, 9.0))["every row"].result == "met"
    assert targets(case(TWO, 1.0, 9.0, host_waits=1.0))["every row"].result == "missed"


def test_what_only_torch_can_capture_misses_and_what_torch_cannot_is_not_judged():
    def without_graph(names):
        return [
            Measured(m.shape, m.dtype, m.layout, m.method, 4, m.eager_turns, () if m.method in names else (1.0,))
            for m in case(TWO, ours=10.0, theirs=40.0)
        ]

    assert targets(without_graph(OURS))["2 images, graph replay"].result == "missed"
    assert targets(without_graph(THEIRS))["2 images, graph replay"].result == "not measured"
    assert targets(without_graph(THEIRS))["every row, GPU time"].result == "not measured"


def test_what_is_worth_most_comes_first():
    cases = plan(Options())
    assert len(cases) == len(set(cases)) == 3 * (2 * 20 + 1)
    kinds = [(len(c.shape) == 2, DTYPES.index(c.dtype), c.shape not in TWO_IMAGES) for c in cases]
    assert cases[0].shape[0] == 2
    assert [k[0] for k in kinds] == sorted(k[0] for k in kinds)
    assert [k for k in kinds if not k[0]] == sorted(k for k in kinds if not k[0])
    assert {c.layout for c in cases if len(c.shape) == 2} == {"contiguous"}


def test_turns_at_2_images_are_longer_and_their_time_is_known_before():
    cases = [Case(TWO, "float32", "contiguous"), Case(LARGE, "float32", "contiguous")]
    assert seconds_of_turns(cases, repeats=5) == pytest.approx(7 * 5 * (0.02 + 3 * 0.005))


def test_a_document_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    report = Report({"gpu": "none"}, 1)
    report.write(str(path))
    report.rows = derive(case(TWO, 1.0, 2.0), 0)
    monkeypatch.setattr(main.Report, "as_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(str(path))
    assert json.loads(path.read_text())["rows"] == []
