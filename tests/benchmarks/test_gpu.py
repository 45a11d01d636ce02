# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu`: the whole command, on the device of host memory."""

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
from benchmarks.gpu.plan import Options
from benchmarks.gpu.timing import Capturer, Counts
from syncbn import kernels
from syncbn.transports import launchers
from tests import fake_cuda

on_fake_cuda = pytest.mark.skipif(
    os.environ.get("SYNCBN_TEST_DEVICE") != fake_cuda.NAME, reason=f"needs SYNCBN_TEST_DEVICE={fake_cuda.NAME}"
)


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
