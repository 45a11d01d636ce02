# SPDX-License-Identifier: BSD-3-Clause
"""The report of drift: its formulas, what it recommends, and what it prints, draws and writes."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

import syncbn
from syncbn.training.drift import noise
from syncbn.training.drift.local import HEAD
from syncbn.training.drift.report import Report
from syncbn.training.drift.sums import Layer, Sums

M = 4


def table(shift, count=100.0, scale=1.0):
    """What two ranks send of a call: means 0 and ``shift``, variances 1 and ``scale``."""
    rows = torch.zeros(2, HEAD + 4 * M, dtype=torch.float64)
    rows[:, 0], rows[1, 1] = count, 0.002
    values = rows[:, HEAD:].view(2, 4, M)
    values[1, 0], values[0, 1], values[1, 1], values[:, 3] = shift, 1.0, scale, 1.0
    return rows


def report_of(shifts, rank=0, synchronised=False, **options):
    """A report of two ranks, of layers a, b and so on, with these shifts."""
    report = Report(rank, (0, 1))
    for name, shift in zip("abcdefgh", shifts, strict=False):
        sums = report.sums[name] = Sums(Layer(name, "BatchNorm2d", M, synchronised, True), M, 2)
        for _ in range(2):
            sums.add(table(shift, **options))
    return report


def test_the_noise_of_a_mean_is_that_of_a_part_drawn_from_all():
    """Over every choice of 2 of 5 values, and 3 of 5, whatever the values are."""
    x = torch.tensor([0.0, 1.0, 3.0, -7.0, 100.0], dtype=torch.float64)
    for n in (2, 3):
        parts = torch.stack([x[list(part)].mean() for part in itertools.combinations(range(5), n)])
        found = ((parts - x.mean()) / x.std()).square().mean()
        expected = noise.of_mean(torch.tensor(float(n)), torch.tensor(5.0))
        assert found == pytest.approx(float(expected), rel=1e-6)


def test_the_noise_of_a_variance_tends_to_the_textbook_formula():
    """2 / (n - 1) - 2 / (N - 1) for large counts; for one rank that holds everything there is none."""
    for n, N in ((1000.0, 3000.0), (1e6, 2e6)):
        found = float(noise.of_variance(torch.tensor(n, dtype=torch.float64), torch.tensor(N, dtype=torch.float64)))
        assert found == pytest.approx(2 / (n - 1) - 2 / (N - 1), rel=3 / n)
    assert noise.of_variance(torch.tensor(9.0), torch.tensor(9.0)) == 0


def test_values_that_stand_k_times_are_one_unit():
    for k, N in ((4.0, 64.0), (16.0, 32.0)):
        assert noise.samples_per_unit(k * (N - 1) / (N - k), N) == pytest.approx(k)
    assert noise.samples_per_unit(1.0, 10.0) == 1.0


def test_the_fewest_layers_that_hold_the_share_are_recommended():
    report = report_of([0.2, 2.0, 0.001, 1.0])
    excess = {row.name: row.excess for row in report.rows}
    assert excess["c"] == 0, "less than the noise of 100 samples"
    total = sum(excess.values())
    assert excess["b"] / total < 0.8 < (excess["b"] + excess["d"]) / total < 1
    assert report.recommend(excess["b"] / total) == ["b"]
    assert report.recommend(0.8) == ["b", "d"]
    assert report.recommend(1) == ["b", "d", "a"]
    assert report_of([0.0, 0.0]).recommend() == []


def test_noise_of_few_samples_counts_as_excess():
    """A shift of exactly the noise: harmless with 100 samples, not with 4."""
    for count, harmless in ((100.0, True), (4.0, False)):
        N = 2 * count
        a2 = 2 * N / (count * (N - 1)) / (1 - N / (count * (N - 1)) / 2)  # makes mean_drift = mean_expected
        row = report_of([math.sqrt(a2)], count=count).rows[0]
        assert row.mean_ratio == pytest.approx(1.0, abs=0.02)
        assert (row.excess < 1e-3) == harmless, row


def test_the_excess_is_the_square_by_which_an_output_is_off():
    row = report_of([0.0], count=1e9, scale=math.exp(1.0)).rows[0]
    pooled = math.log((1 + math.e) / 2)
    assert row.var_drift == pytest.approx(math.sqrt((pooled**2 + (1 - pooled) ** 2) / 2), rel=1e-6)
    assert row.excess == pytest.approx(row.var_drift**2 / 4, rel=1e-3)


@pytest.mark.parametrize("share", [0, -1, 1.5, math.nan, "all", None])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share above 0 and at most 1; received .* 0.9 is usual"):
        report_of([1.0]).recommend(share)


def test_what_it_recommends_can_be_converted():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    with syncbn.drift(model) as report:
        model(torch.randn(4, 3))
    assert [(row.name, row.mean_drift, row.excess) for row in report.rows] == [("0", 0.0, 0.0), ("1.0", 0.0, 0.0)]
    assert report.recommend() == [], "one process drifts from nothing"
    syncbn.convert_sync_batchnorm(model, only=report.recommend())
    assert type(model[0]) is nn.BatchNorm1d
    syncbn.convert_sync_batchnorm(model, only=["1.0"])
    assert isinstance(model[1][0], syncbn.SyncBatchNorm)
    with pytest.raises(ValueError, match=r"received '2.0', which matches none of 2"):
        syncbn.convert_sync_batchnorm(model, only=["2.0"])


def test_the_table_says_what_it_is_about():
    text = str(report_of([1.0, 0.001], synchronised=True))
    assert [line.split()[:5] for line in text.splitlines()[2:4]] == [
        ["a", "BatchNorm2d", "4", "100", "200"],
        ["b", "BatchNorm2d", "4", "100", "200"],
    ]
    assert "2 layers, 2 calls of each, 2 ranks" in text
    assert "recommend(0.9): 1 of 2 layers hold 90 %" in text
    assert "WARNING: Ranks see different data" in text
    hint = "measure a copy that syncbn.convert_sync_batchnorm has converted"
    assert hint not in text
    assert hint in str(report_of([1.0]))
    assert max(map(len, text.splitlines()[:4])) <= 120
    assert str(report_of([1.0], rank=1)) == "", "rank 0 prints for all"
    assert "measured nothing" in Report(0, (0, 1)).table()


def test_what_a_recommendation_leaves_is_said():
    row = {row.name: row for row in report_of([2.0, 0.4]).rows}["b"]
    assert (
        f"1 of 2 layers hold 90 % of the excess drift; it leaves outputs of others off by {row.excess**0.5:.2f}"
        in str(report_of([2.0, 0.4]))
    )


def test_json_is_written_once_and_has_every_field(tmp_path):
    report, path = report_of([1.0]), tmp_path / "drift.json"
    text = report.to_json(path)
    assert json.loads(text) == json.loads(path.read_text())
    (row,) = json.loads(text)["rows"]
    assert row == report.rows[0]._asdict()
    assert row["seconds"] is None
    report_of([1.0], rank=1).to_json(tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


class Writer:
    def __init__(self):
        self.written = {}

    def add_scalar(self, tag, value, step):
        self.written[tag, step] = value


def test_scalars_are_written_by_rank_zero():
    writer, report = Writer(), report_of([1.0], synchronised=True)
    report.write(writer, 7)
    row = report.rows[0]
    assert writer.written["drift/mean_drift/a", 7] == row.mean_drift
    assert writer.written["drift/seconds/a", 7] == row.seconds == pytest.approx(0.001)
    other = Writer()
    report_of([1.0], rank=1).write(other, 7)
    report_of([1.0], rank=1).write(None)
    assert not other.written


@pytest.mark.filterwarnings("ignore:Unable to import Axes3D:UserWarning")
def test_the_figure_shows_layers_and_both_curves(tmp_path):
    pytest.importorskip("matplotlib")
    for dark in (False, True):
        path = tmp_path / f"{dark}.svg"
        report_of([1.0, 0.1], synchronised=True).figure(path, dark=dark)
        text = path.read_text()
        for word in ("independent samples", "measured", "drift of the mean", "collectives, ms", ">a<", ">b<"):
            assert word in text
    assert (tmp_path / "True.svg").read_text() != (tmp_path / "False.svg").read_text()
    report_of([1.0], rank=1).figure(tmp_path / "other.svg")
    assert not (tmp_path / "other.svg").exists()


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .syncbn\[examples\]"):
        report_of([1.0], rank=1).figure(tmp_path / "a.svg")
