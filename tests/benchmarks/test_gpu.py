# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu`: what it computes from times, and, on the device of host memory, the whole command."""

import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import main, methods, timing
from benchmarks.gpu.methods import COPY, OURS, THEIRS
from benchmarks.gpu.plan import DTYPES, Case, Options, plan, seconds_of_turns
from benchmarks.gpu.report import Report
from benchmarks.gpu.targets import TWO_IMAGES, Measured, derive, judge, must_move
from benchmarks.gpu.timing import MARK, Capturer, Counts, counted
from syncbn import kernels
from syncbn.transports import launchers
from tests import fake_cuda

TWO = (2, 64, 56, 56)
LARGE = (2, 256, 512, 512)
SMALLER = (32, 64, 112, 112)
MICROSECOND = 1e3  # of GB/s: B / us / 1000
on_fake_cuda = pytest.mark.skipif(
    os.environ.get("SYNCBN_TEST_DEVICE") != fake_cuda.NAME, reason=f"needs SYNCBN_TEST_DEVICE={fake_cuda.NAME}"
)


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


def event(name, start, end, *, gpu=False, annotation=False):
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=span)


def test_events_count_for_the_method_whose_turn_it_was():
    events = [
        event(MARK + "a", 2000, 2100),
        event(MARK + "a", 2001, 2300, gpu=True, annotation=True),
        event("kernel", 2050, 2150, gpu=True),
        event("kernel", 2200, 2300, gpu=True),  # when the host had launched everything
        event("cudaDeviceSynchronize", 2101, 2301),  # the bench's own
        event(MARK + "b", 3400, 3500),
        event("cudaStreamSynchronize", 3450, 3460),
        event("cudaLaunchKernel", 3461, 3462),
        event("Memcpy DtoH", 3399, 3405, gpu=True),  # by a clock that is some microseconds behind
    ]
    found = counted(events, 2)
    assert found == {"a": Counts(100.0, 1.0, 0.0), "b": Counts(3.0, 0.5, 0.5)}
    assert counted(events[:1], 2) == {}, "no GPU seen"


def test_a_document_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    report = Report({"gpu": "none"}, 1)
    report.write(str(path))
    report.rows = derive(case(TWO, 1.0, 2.0), 0)
    monkeypatch.setattr(main.Report, "as_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(str(path))
    assert json.loads(path.read_text())["rows"] == []


@pytest.fixture
def one_stream(monkeypatch):
    """Streams as names, and the one that is current."""
    current = ["mine"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return current


def test_a_capture_that_fails_leaves_stream_and_others_alone_and_is_not_tried_again(monkeypatch, one_stream):
    tried = []

    def captured(self, step):
        tried.append(step())
        one_stream[0] = "the capture's"
        if step() == "waits":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return SimpleNamespace(replay=step, reset=lambda: tried.append(f"{step()} reset"))

    monkeypatch.setattr(Capturer, "captured_step", captured)
    capturer, steps = Capturer(), {"a": lambda: "waits", "b": lambda: "runs"}
    assert list(capturer.replays(steps, 1)) == ["b"]
    assert list(capturer.replays(steps, 1)) == ["b"]
    assert one_stream == ["mine"]
    assert tried == ["waits", "runs", "runs reset", "runs", "runs reset"]
    assert capturer.refused == {"a": "operation not permitted"}


def test_without_a_gpu_it_says_so_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.run(Options(), form="table") == 1
    assert "needs an NVIDIA GPU; torch finds none" in capsys.readouterr().err


def test_more_than_one_process_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(launchers, "detect", lambda: SimpleNamespace(size=2))
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert "needs one process; received 2. Start it without a launcher." in capsys.readouterr().err


# On the device of host memory: torch's own operators in Python, gloo for NCCL, a graph that runs the step again, and
# as GPU time and launches those of the kernels' emulator.


def batch_norm_stats(x, eps):
    x = x.transpose(0, 1).flatten(1).float()
    return x.mean(1), (x.var(1, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    weights = (counts / counts.sum()).unsqueeze(1)
    mean = (weights * means).sum(0)
    var = (weights * (invstds**-2 - eps + means**2)).sum(0) - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def spread(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return ((x - spread(mean, x)) * spread(invstd * weight, x) + spread(bias, x)).to(x.dtype)


def batch_norm_backward_reduce(grad_y, x, mean, invstd, weight, *wanted):
    dims = [dim for dim in range(x.dim()) if dim != 1]
    sum_dy, sum_dy_xmu = grad_y.float().sum(dims), (grad_y * (x - spread(mean, x))).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(grad_y, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    mean_dy, scale = sum_dy / counts.sum(), invstd**2 * sum_dy_xmu / counts.sum()
    of_mean = spread(mean_dy, x) + (x - spread(mean, x)) * spread(scale, x)
    return ((grad_y - of_mean) * spread(invstd * weight, x)).to(x.dtype)


OPERATORS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)
SMALL = Options(((2, 4, 3, 3), (6, 3)), ("float32", "bfloat16"), repeats=2)


def profiled(steps):
    launches, found = kernels.dispatch.launcher().emulated.launches, {}
    for name, step in steps.items():
        before = len(launches)
        step()
        found[name] = Counts(1.0, float(len(launches) - before), 0.0)
    return found


@pytest.fixture
def gpu(monkeypatch):
    library = torch.library.Library("aten", "IMPL", "CUDA")  # taken back with the object
    for operator in OPERATORS:
        library.impl(operator.__name__, operator)
    monkeypatch.setattr(methods, "REAL", "gloo")
    monkeypatch.setattr(timing, "steps_in_a_turn", lambda step, seconds: 3)
    monkeypatch.setattr(timing, "profiled", profiled)
    graph = partial(SimpleNamespace, reset=lambda: None)
    monkeypatch.setattr(Capturer, "captured_step", lambda self, step: graph(replay=step))
    yield
    library._destroy()


@on_fake_cuda
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (6, 3)], ids=str)
def test_methods_compute_the_same(gpu, rng, shape):
    x, grad_y = (torch.randn(shape, generator=rng) for _ in range(2))
    with methods.process_groups() as (groups, problem):
        steps = methods.methods(x.requires_grad_(), grad_y, groups)
        found = {name: step() for name, step in steps.items() if name != COPY}
    assert problem == ""
    assert set(found) == {*OURS, *THEIRS, "syncbn, alone", "torch BatchNorm"}
    for name, (grad_x, grad_weight, grad_bias) in found.items():
        exact = found["torch BatchNorm"]
        torch.testing.assert_close(grad_weight, exact[1])
        torch.testing.assert_close(grad_bias, exact[2])
        if name != THEIRS[0]:  # of 8 shares, whose sums the fake all-reduce does not add
            torch.testing.assert_close(grad_x, exact[0])


def test_only_the_fake_groups_gather_is_replaced_and_only_meanwhile(monkeypatch):
    monkeypatch.setattr(methods, "nccl_of_1", lambda: ([], ""))
    name = next(name for name in methods.GATHERS if hasattr(dist, name))
    calls = []
    monkeypatch.setattr(dist, name, lambda *words: calls.append(words))
    original, row, output = getattr(dist, name), torch.tensor([1.0, 2.0]), torch.zeros(1, 16)
    with methods.process_groups() as (groups, _):
        getattr(dist, name)(output, row, groups[0].torchs)
        assert calls == []
        assert torch.equal(output, row.repeat(8).view(1, 16))
        getattr(dist, name)(output, row, "another group")
    assert calls == [(output, row, "another group", False)]
    assert getattr(dist, name) is original


@on_fake_cuda
def test_the_command_measures_every_method_and_says_what_it_means(gpu, capsys, tmp_path):
    output = tmp_path / "bench.json"
    options = Options(SMALL.shapes, SMALL.dtypes, repeats=2, output=str(output))
    assert main.run(options, form="table") == 0
    out, err = capsys.readouterr()
    document = json.loads(output.read_text())
    assert err == ""
    assert (document["planned"], document["timed"], document["profiled"], document["left_out"]) == (6, 6, 6, [])
    assert len(document["rows"]) == 6 * 7
    assert all(row["eager_us"] > 0 and row["graph_us"] > 0 and row["of_copy"] > 0 for row in document["rows"])
    ours = [row for row in document["rows"] if row["method"].startswith("syncbn")]
    assert all(row["launches"] == 4 and row["eager_ratio"] > 0 for row in ours)
    assert [target["result"] for target in document["targets"]] == [*["not measured"] * 4, "met", "met"]
    assert out.startswith(f"gpu       {fake_cuda.NAME}")
    assert "\n\n6 shapes, dtypes and layouts; their turns alone take 1 s.\n\n" in out
    assert sum(line.startswith(("2,4,3,3 ", "6,3 ")) for line in out.splitlines()) == 6 * 7
    assert "every row, GPU time: torch's / ours" in out
    assert out.rstrip().endswith("6 of 6 shapes, dtypes and layouts timed, 6 profiled.")


@on_fake_cuda
def test_json_is_one_document_and_takes_shapes_dtype_and_layout(gpu, capsys):
    words = ["--json", "--shapes", "2,4,3,3", "--dtype", "float16", "--channels-last", "--repeats", "1"]
    assert command.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 7
    assert {(tuple(row["shape"]), row["dtype"], row["layout"]) for row in rows} == {
        ((2, 4, 3, 3), "float16", "channels_last")
    }


@on_fake_cuda
def test_without_nccl_and_a_profiler_the_rest_goes_on_and_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(methods, "REAL", "nccl")
    monkeypatch.setattr(timing, "profiled", lambda steps: {})
    assert main.run(SMALL, form="json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 6 * 5
    assert document["left_out"][0] == "NCCL: this torch is built without nccl"
    assert document["left_out"][1:] == ["GPU time, launches and host waits: torch's profiler sees no GPU"]


@on_fake_cuda
def test_a_method_that_fails_is_left_out_alone(gpu, capsys, monkeypatch):
    monkeypatch.delattr(torch, "batch_norm_stats")
    monkeypatch.setattr(torch, "batch_norm_stats", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")), False)
    assert main.run(SMALL, form="json") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 6 * 5
    assert "torch SyncBatchNorm, fake of 8" in document["left_out"][0]
    assert document["left_out"][0].endswith(": no kernel")


@on_fake_cuda
def test_a_time_limit_ends_the_measuring_and_not_the_report(gpu, capsys):
    assert main.run(Options(SMALL.shapes, time_limit=1e-9), form="table") == 0
    out = capsys.readouterr().out
    assert "0 of 9 shapes, dtypes and layouts timed, 0 profiled; ended by the time limit." in out
    assert out.count("not measured") == 6


@on_fake_cuda
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_measured(gpu, capsys, monkeypatch, tmp_path, number):
    calls, in_turns = [], timing.in_turns

    def interrupted(steps, *words):
        calls.append(1)
        if len(calls) == 4:  # the graphs of the second shape
            os.kill(os.getpid(), number)
        return in_turns(steps, *words)

    monkeypatch.setattr(timing, "in_turns", interrupted)
    before, output = signal.getsignal(number), tmp_path / "bench.json"
    options = Options(SMALL.shapes, SMALL.dtypes, repeats=2, output=str(output))
    assert main.run(options, form="json") == 128 + number
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(output.read_text())
    assert (document["timed"], len(document["rows"]), document["ended"]) == (1, 7, f"ended by {number.name}")
    assert signal.getsignal(number) is before


@on_fake_cuda
def test_a_lost_gpu_leaves_what_was_measured_and_fails(gpu, capsys, monkeypatch):
    in_turns, left = timing.in_turns, [3]

    def lost(steps, *words):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return in_turns(steps, *words)

    monkeypatch.setattr(timing, "in_turns", lost)
    assert main.run(SMALL, form="json") == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert "Traceback" in err
    assert (document["timed"], document["ended"]) == (1, "ended by an error: CUDA error: an illegal memory access")


@on_fake_cuda
def test_an_output_that_cannot_be_written_is_refused_first(gpu, capsys, tmp_path):
    options = Options(SMALL.shapes, output=str(tmp_path / "missing" / "bench.json"))
    assert main.run(options, form="table") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--output needs a file that can be written" in err
