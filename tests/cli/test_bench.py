# SPDX-License-Identifier: BSD-3-Clause
import csv
import io
import json

import pytest
import torch

import syncbn
from benchmarks import parts
from syncbn import kernels
from syncbn.cli.bench import cpu, report
from syncbn.cli.bench.report import Options, Row
from syncbn.transports import launchers
from tests import processes, warm

BENCH = ("-m", "syncbn", "bench")
SMALL = ("--shapes", "2,4,3,3", "3,2,2,2", "--repeats", "3", "--warmup", "1")
ROWS = [Row((2, 64, 8, 8), 50.0, 100.0, 800.0), Row((2, 256, 14, 14), 100.0, 50.0, 100.0)]

SAME_NUMBERS = """
import torch, syncbn
from syncbn.cli.bench.baseline import BaselineBatchNorm
world = syncbn.init(torch_distributed=True, device="cpu")
generator = torch.Generator().manual_seed(world.rank)
results = []
for layer in (syncbn.SyncBatchNorm(5).double(), BaselineBatchNorm(5).double()):
    x = torch.randn(2, 5, 3, 4, generator=generator.manual_seed(world.rank), dtype=torch.float64).requires_grad_()
    y = layer(x)
    (y * y * x.detach().cos()).sum().backward()
    results.append((y, x.grad, layer.running_mean))
far = [not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9) for ours, theirs in zip(*results)]
world.raise_together(ValueError(f"they differ: {far}") if any(far) else None)
"""


def test_ratios_say_how_many_times_as_long():
    assert ROWS[0].baseline_ratio == 8
    assert ROWS[0].torch_ratio == 2
    assert Row((2, 1, 1, 1), 1.0, 1.0).baseline_ratio is None


def test_geometric_mean_of_the_ratios_ends_the_table():
    assert report.geometric_mean([8.0, 2.0]) == pytest.approx(4)
    assert report.geometric_mean([8.0, None]) is None
    last = report.as_table(ROWS).splitlines()[-1].split()
    assert last == ["geometric", "mean", "4.00", "1.00"]


def test_shapes_are_the_distinct_ones_of_a_resnet_50():
    assert len(report.SHAPES) == len(set(report.SHAPES)) == 13
    assert (2, 64, 8, 8) in report.SHAPES
    assert {(C, H) for _, C, H, _ in report.SHAPES} - {(64, 8)} == _resnet50()


def _resnet50():
    """(C, H) of every batch norm: a stem, then four stages of bottlenecks whose 3x3 convolution has the stride."""
    found, H = {(64, 112)}, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            found.add((width, H))
            H = H // 2 if stage and not block else H
            found |= {(width, H), (4 * width, H)}
    return found


def test_a_row_holds_the_median_over_rounds_of_the_slowest_rank(monkeypatch):
    world = syncbn.init(device="cpu")
    turns = iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(cpu, "one_turn", lambda *_: next(turns))
    monkeypatch.setattr(cpu.gather, "gather", lambda row, _: torch.stack((row, row + 1, row - 5)))
    row = cpu.measure((2, 3, 2, 2), Options(repeats=3, warmup=1), world)
    assert row == Row((2, 3, 2, 2), 3.0, 21.0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What commands did one after the other in one process, which imports torch once."""
    measure = (*BENCH, *SMALL, "--channels-last", "--json", "--dtype")
    cases = {dtype: (*measure, dtype) for dtype in report.DTYPES}
    cases["unreadable"] = ("RANK=0", "WORLD_SIZE=two", *BENCH, *SMALL)
    cases["parts"] = ("-m", "benchmarks.parts", "--json", *SMALL[:5])
    return processes.many(warm.python, 1, cases, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What commands did one after the other on the same two processes under mpirun."""
    cases = {
        "table": (*BENCH, *SMALL),
        "no baseline": (*BENCH, *SMALL, "--no-baseline", "--json"),
        "unconnected": ("SYNCBN_TRANSPORT=single", *BENCH, *SMALL, "--no-baseline"),
        "csv": (*BENCH, *SMALL, "--csv"),
        "output": (*BENCH, *SMALL, "--no-baseline", "--output", tmp_path_factory.getbasetemp() / "bench.json"),
        "no such folder": (*BENCH, *SMALL, "--no-baseline", "--output", "/no/such/folder/bench.json"),
        "too large": (*BENCH, "--shapes", "100000,100000,1000,1000"),
    }
    return processes.many(warm.mpirun, 2, cases, tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    """The same under torchrun."""
    cases = {"table": (*BENCH, *SMALL), "same numbers": ("-c", SAME_NUMBERS)}
    return processes.many(warm.torchrun, 2, cases, tmp_path_factory.mktemp("torchrun"))


@pytest.mark.xdist_group("bench alone")
@pytest.mark.parametrize("dtype", report.DTYPES)
def test_every_dtype_and_layout_runs_alone_and_leaves_the_baseline_empty(alone, dtype):
    done = alone[dtype]
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["machine"]["processes"] == 1
    assert document["machine"]["threads"] == 1
    assert document["options"]["dtype"] == dtype
    assert [row["shape"] for row in document["rows"]] == [[2, 4, 3, 3], [3, 2, 2, 2]]
    assert all(row["syncbn_us"] > 0 and row["baseline_us"] is None for row in document["rows"])
    assert document["geometric_mean"]["baseline_ratio"] is None


@pytest.mark.xdist_group("bench together")
def test_under_mpirun_rank_0_prints_one_table_with_every_column(together):
    check_table(together["table"])


@pytest.mark.xdist_group("bench under torchrun")
def test_under_torchrun_rank_0_prints_one_table_with_every_column(under_torchrun):
    check_table(under_torchrun["table"])


def check_table(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("geometric mean") == 1
    assert "baseline / syncbn: above 1, syncbn is faster" in done.stdout
    assert "syncbn / torch: below 1, syncbn is faster" in done.stdout
    assert f"torch      {torch.__version__}" in done.stdout
    assert len(next(line for line in done.stdout.splitlines() if line.startswith("2,4,3,3")).split()) == 6


@pytest.mark.xdist_group("bench together")
def test_csv_has_a_line_a_shape(together):
    done = together["csv"]
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["N"], row["C"]) for row in rows] == [("2", "4"), ("3", "2")]
    assert all(float(row[name]) > 0 for row in rows for name in ("torch_us", "syncbn_us", "baseline_us"))


@pytest.mark.xdist_group("bench together")
def test_without_the_baseline_torch_is_not_needed(together):
    document = json.loads(together["no baseline"].stdout)
    assert document["machine"]["transport"] == "shm"
    assert all(row["baseline_us"] is None for row in document["rows"])


@pytest.mark.xdist_group("bench together")
def test_output_is_the_json_document_beside_the_table(together, tmp_path_factory):
    done = together["output"]
    assert done.returncode == 0, done.stderr
    assert "baseline / syncbn: " not in done.stdout  # there is none to explain
    document = json.loads((tmp_path_factory.getbasetemp() / "bench.json").read_text())
    assert document.keys() == json.loads(together["no baseline"].stdout).keys()
    assert [row["shape"] for row in document["rows"]] == [[2, 4, 3, 3], [3, 2, 2, 2]]


@pytest.mark.xdist_group("bench together")
def test_an_output_that_cannot_be_written_ends_it_before_anything_is_measured(together):
    done = together["no such folder"]
    assert done.returncode == 2
    assert done.stderr.count("--output needs a file that can be written; received") == 1
    assert "geometric mean" not in done.stdout


def test_threads_are_those_of_the_environment():
    done = processes.python(*BENCH, *SMALL, "--json", OMP_NUM_THREADS=2)
    assert json.loads(done.stdout)["machine"]["threads"] == 2


@pytest.mark.xdist_group("bench under torchrun")
def test_the_baseline_computes_what_the_layer_computes(under_torchrun):
    done = under_torchrun["same numbers"]
    assert done.returncode == 0, done.stderr


@pytest.mark.xdist_group("bench together")
def test_a_shape_beyond_the_memory_ends_with_status_2_and_one_message(together):
    done = together["too large"]
    assert done.returncode == 2
    assert done.stderr.count("needs memory for shape (100000, 100000, 1000, 1000)") == 1


@pytest.mark.xdist_group("bench together")
def test_processes_that_nothing_connects_are_refused(together):
    done = together["unconnected"]
    assert done.returncode == 1
    assert done.stderr.count("needs all processes connected") == 1
    assert "syncbn doctor" in done.stderr


@pytest.mark.xdist_group("bench alone")
def test_a_launcher_that_cannot_be_read_is_an_error_not_a_crash(alone):
    done = alone["unreadable"]
    assert done.returncode == 1
    assert done.stderr.startswith("syncbn bench: ")
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("bench alone")
def test_parts_say_where_time_and_memory_go(alone):
    done = alone["parts"]
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(row["shape"], row["step"]) for row in document["steps"][:4]] == [
        ([2, 4, 3, 3], step) for step in ("local_moments", "normalize", "backward_sums", "backward_input")
    ]
    assert all(row["ratio"] == pytest.approx(row["us"] / row["copy_us"]) for row in document["steps"])
    overhead = document["overhead_us"]
    besides = sum(us for name, us in overhead.items() if name not in ("whole step", "torch.nn.BatchNorm2d"))
    assert besides == pytest.approx(overhead["whole step"])


def test_a_step_needs_no_more_memory_than_torchs():
    """y and grad_x; a temporary of the input's size would be half as much again."""
    code = "import torch; torch.set_num_threads(1); from benchmarks import memory as m\n"
    code += "for row in m.memory_rows(m.LARGE, torch.float32, torch.contiguous_format): print(row.mib, row.tensor_mib)"
    done = warm.python("-c", code)
    assert done.returncode == 0, done.stderr
    (torchs, tensor), (ours, _) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert torchs == pytest.approx(2 * tensor, rel=0.05)
    if kernels.explain().name == "host":
        assert ours <= torchs + 0.5
    else:  # float64 temporaries: see docs/concepts/numerics.md
        assert ours <= 6 * tensor


def test_parts_are_for_one_process(capsys, monkeypatch):
    monkeypatch.setattr(launchers, "detect", lambda: launchers.Launch("env", 0, 2, 0, False, "a test"))
    assert parts.main([]) == 2
    assert "needs one process; received 2" in capsys.readouterr().err
