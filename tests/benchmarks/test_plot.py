# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.gpu.plot`: every synchronised row of ours is one mark."""

import json

import pytest

from benchmarks.gpu import plot
from benchmarks.gpu.methods import OURS

pytest.importorskip("matplotlib")
MACHINE = {"gpu": "A GPU of tests", "torch": "2.11.0", "cupy": "14.2.0"}


def row(method, shape, dtype="float32", layout="contiguous", itemsize=4, **more):
    ratios = {"eager_ratio": 2.5, "graph_ratio": 1.25, "of_copy": 0.75}
    return {"method": method, "shape": shape, "dtype": dtype, "layout": layout, "itemsize": itemsize, **ratios, **more}


ROWS = [
    *[row(method, [2, 256, 14, 14], layout=each) for method in OURS for each in ("contiguous", "channels_last")],
    row("syncbn, alone", [2, 256, 14, 14]),
    row(OURS[0], [2, 512, 14, 14], graph_ratio=None),
    *[row(method, [2, 256, 512, 512]) for method in OURS],
]


def test_a_picture_has_a_mark_for_each_ratio_and_each_large_shape(tmp_path):
    document = tmp_path / "bench.json"
    document.write_text(json.dumps({"machine": MACHINE, "rows": ROWS}))
    assert plot.main([str(document), str(tmp_path / "gpu.svg")]) == 0
    text = (tmp_path / "gpu.svg").read_text()
    assert "A GPU of tests, torch 2.11.0, CuPy 14.2.0" in text
    assert all(word in text for word in ("eager", "CUDA graph", "fake of 8", "NCCL of 1", "megabytes of x"))
    from matplotlib.figure import Figure

    ratios, bandwidth = Figure().subplots(1, 2)
    plot.ratios_at_2_images(ratios, [r for r in ROWS if r["method"] in OURS and r["shape"][-1] < 512])
    plot.bandwidth_of_large(bandwidth, [r for r in ROWS if r["method"] in OURS])
    marks = [line.get_ydata()[0] for line in ratios.lines if line.get_marker() != "None"]
    assert sorted(marks) == [1.25] * 4 + [2.5] * 5  # one eager row has no graph
    assert [line.get_ydata()[0] for line in bandwidth.lines if line.get_marker() != "None"] == [0.75]


@pytest.mark.parametrize("text", ["no JSON", "{}", None], ids=["not JSON", "another document", "no file"])
def test_what_is_no_document_of_the_benchmark_is_said(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "bench.json").write_text(text)
    assert plot.main([str(tmp_path / "bench.json"), str(tmp_path / "gpu.svg")]) == 1
    assert "it needs the benchmark's JSON and matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "gpu.svg").exists()
