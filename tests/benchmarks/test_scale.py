# SPDX-License-Identifier: BSD-3-Clause
"""`python -m benchmarks.scale` without its simulation: what is sent, how long ranks wait, tables and pictures."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale import __main__ as command
from benchmarks.scale import plot, results, simulate, tables, waiting, wires
from benchmarks.scale.results import Check, Results
from syncbn import moments
from tests.processes import ROOT

COMMITTED = ROOT / "benchmarks" / "scale" / "results"
WIDTHS = {64: 7, 128: 8, 256: 16, 512: 11, 1024: 7, 2048: 4}
NEW, STAYS = "5 %, new in each piece", "5 %, all stays with the rank"


def test_a_step_of_resnet50_has_106_collectives_of_53_layers():
    assert wires.widths() == WIDTHS
    assert wires.collectives() == 106


@pytest.mark.parametrize("C", [64, 2048])
def test_messages_are_those_that_the_layers_send(C):
    sizes = [wires.message_bytes(message, C) for message in wires.MESSAGES]
    assert sizes == [8 * moments.wire_length(C), 8 * moments.sums_length(C), 4 * (2 * C + 1), 4 * 2 * C]


def test_a_gather_brings_the_blocks_of_all_other_ranks_and_a_sum_twice_its_length():
    channels = sum(C * n for C, n in WIDTHS.items())
    assert wires.received("torch forward", 4096) == 4095 * 4 * (2 * channels + 53)  # 871 MB
    assert wires.received("torch backward", 2) == 4 * 2 * channels


def expected_maximum(n, sigma):
    """Of n log-normal times of mean 1: the integral of their quantiles, substituted so that the ends count."""
    x = np.linspace(-9, 9, 200_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    weight = n * density * np.minimum(below, 1) ** (n - 1) * (x[1] - x[0])
    return float(np.sum(np.exp(sigma * x - sigma**2 / 2) * weight)), float(np.sum(x * weight))


def test_the_slowest_of_n_is_as_late_as_order_statistics_say():
    for n, tabulated in ((2, 0.56419), (8, 1.42360), (10, 1.53875)):  # of n normal numbers
        assert expected_maximum(n, 0.05)[1] == pytest.approx(tabulated, abs=2e-4)
    for n in (8, 64):
        drawn = waiting.added(waiting.LogNormal(0.05), n, [n], 106, 60)[n]
        assert drawn == pytest.approx(expected_maximum(n, 0.05)[0] - 1, abs=0.002)


def test_once_a_step_the_noise_of_the_pieces_averages_out():
    n, pieces = 64, 106
    drawn = waiting.added(waiting.LogNormal(0.05), n, [1], pieces, 400)[1]
    assert drawn == pytest.approx(expected_maximum(n, 0.05 / pieces**0.5)[0] - 1, abs=0.0006)


def test_groups_do_not_help_against_a_rank_that_stays_slow():
    drawn = waiting.added(waiting.LogNormal(0.05, 1.0), 64, [1, 8, 64], 106, 400)
    assert drawn[1] == pytest.approx(drawn[8]) == pytest.approx(drawn[64])
    assert drawn[64] == pytest.approx(expected_maximum(64, 0.05)[0] - 1, abs=0.006)


def test_a_pause_anywhere_stops_everyone_in_its_piece():
    n, pieces = 1024, 106
    noise = waiting.Pause(0.01, 100, pieces)
    touched = pieces * (1 - (1 - 1 / (100 * pieces)) ** n)
    expected = (1 + 0.01 * touched) / noise.mean() - 1
    assert waiting.added(noise, n, [n], pieces, 200)[n] == pytest.approx(expected, rel=0.08)


def dear_of(C):
    return ("sum_nodes",) if C > 200 else ("sum_doubling",)


def made_up(largest=64):
    """The microseconds of an exchange grow as the ranks; on half of the widths node by node is the better way."""
    found = Results(notes=["python -m benchmarks.scale"])
    for n in (2**i for i in range(1, largest.bit_length())):
        for message in wires.MESSAGES:
            for kind in simulate.GATHERS if message == wires.GATHERED else simulate.SUMS:
                slower = 3 if kind == "gather_ring" else 1
                found.exchange["ethernet", n, message, kind] = {
                    C: 10.0 * n * slower * (2 if kind in dear_of(C) else 1) for C in WIDTHS
                }
        for noise, all_ranks in ((NEW, 0.001 * n), (STAYS, 0.03)):
            found.waiting[noise, n] = {g: 0.001 * g if noise == NEW else 0.03 for g in (1, 8, 64) if g < n} | {
                n: all_ranks
            }
    found.checks = [Check("layers added up, sum_nodes", "ethernet", 64, "ms", 1.25, 1.5)]
    return found


def test_a_step_takes_the_best_algorithm_for_each_width():
    found = made_up()
    assert found.ms("ethernet", 8, "syncbn, best") == pytest.approx(106 * 80 / 1e3)
    narrow = sum(n for C, n in WIDTHS.items() if C < 200)
    assert found.ms("ethernet", 8, "syncbn, node by node") == pytest.approx(2 * (narrow + 2 * (53 - narrow)) * 0.08)
    assert found.ms("ethernet", 8, "torch, ring") == pytest.approx(53 * (3 + 1) * 0.08, rel=1e-6)
    assert found.ms("ethernet", 1, "syncbn, best") == 0


def test_where_the_exchange_is_noise_and_where_groups_pay():
    found = made_up()
    assert found.quiet_until("ethernet", 100) == 4  # 1.06 ms a rank: 4.2 ms on 4 ranks, 8.5 on 8
    assert found.quiet_until("ethernet", 1e6) == 64
    assert found.quiet_until("ethernet", 1) == 1
    # (64 - 8) * 1.06 ms of 100 ms and (64 - 8) * 0.1 % of waiting; 16 ranks save 8.5 % and 0.8 %
    assert found.saved("ethernet", NEW, 64, 8, 100) == pytest.approx(0.5936 + 0.056)
    assert found.saved("ethernet", STAYS, 64, 8, 100) == pytest.approx(0.5936)
    assert found.pays_from("ethernet", NEW, 8, 100) == 16
    assert found.pays_from("ethernet", NEW, 8, 1e4) == 64  # only waiting counts: 2.4 % on 32 ranks, 5.6 % on 64
    assert found.pays_from("ethernet", STAYS, 8, 1e4) is None


def test_files_are_read_as_they_were_written(tmp_path):
    found = made_up(16)
    results.write(found, tmp_path)
    assert results.read(tmp_path) == found


@pytest.mark.parametrize("fault", ["missing", "another form"])
def test_files_that_cannot_be_read_are_named(tmp_path, capsys, fault):
    results.write(made_up(16), tmp_path)
    if fault == "missing":
        (tmp_path / "checks.csv").unlink()
    else:
        (tmp_path / "waiting.csv").write_text("ranks\nmany\n")
    assert command.main(["--read", "--output", str(tmp_path)]) == 1
    assert "It needs exchange.csv, waiting.csv and checks.csv" in capsys.readouterr().err


def test_pictures_have_a_line_for_each_way_and_size_of_group():
    figure = pytest.importorskip("matplotlib.figure")
    found = made_up(128)
    picture = figure.Figure()
    plot.of_exchange(picture, found, 100)
    lines = {line.get_label(): list(line.get_ydata()) for line in picture.axes[0].lines}
    assert lines["torch, ring"] == [found.ms("ethernet", n, "torch, ring") for n in found.ranks()]
    picture = figure.Figure()
    plot.of_waiting(picture, found, 100)
    added, saved = ({line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in picture.axes)
    assert added["groups of 8"] == pytest.approx([0.8] * 5)  # 8 ranks and more
    assert added["all ranks, after each piece"][-1] == pytest.approx(12.8)
    assert saved["Ethernet, 25 Gb/s, 20 us"][-1] == pytest.approx(100 * found.saved("ethernet", NEW, 128, 8, 100))


def test_pictures_are_for_light_and_dark_pages(tmp_path):
    pytest.importorskip("matplotlib")
    paths = list(plot.draw(made_up(16), tmp_path, 100))
    assert [path.name for path in paths] == [
        f"scale_{what}-{theme}.svg" for theme in ("light", "dark") for what in ("exchange", "waiting")
    ]
    for path in paths:
        assert path.stat().st_size < 40_000
        assert plot.THEMES["dark" if "dark" in path.name else "light"][0] in path.read_text()


def test_tables_go_to_their_places(tmp_path):
    page = tmp_path / "scale.md"
    names = list(tables.blocks(made_up(), 100))
    page.write_text("".join(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n" for name in names))
    tables.update(page, made_up(), 100)
    text = page.read_text()
    assert "old" not in text
    assert text.count("before") == text.count("after") == len(names)
    assert "| Ethernet, 25 Gb/s, 20 us | 64 " in " ".join(text.split())
    page.write_text("nothing")
    with pytest.raises(ValueError, match="needs one place <!-- answer -->"):
        tables.update(page, made_up(), 100)


def test_the_page_shows_the_committed_results(tmp_path):
    shutil.copy(ROOT / "docs" / "clusters" / "scale.md", tmp_path)
    tables.update(tmp_path / "scale.md", results.read(COMMITTED), 100)
    assert (tmp_path / "scale.md").read_text() == (ROOT / "docs" / "clusters" / "scale.md").read_text()


def test_without_simgrid_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(simulate.shutil, "which", lambda _: None)
    assert command.main(["--output", str(tmp_path)]) == 1
    assert (
        "smpicc and smpirun not found. On Debian and Ubuntu: apt-get install -y libsimgrid-dev"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("ranks", ["3", "8192"])
def test_ranks_that_the_platforms_lack_are_refused(capsys, ranks):
    with pytest.raises(SystemExit):
        command.main(["--ranks", ranks])
    assert f"invalid choice: {ranks} (choose from 2, 4, 8" in capsys.readouterr().err.replace("'", "")


def test_every_platform_has_a_file_and_a_title():
    files = {Path(path).stem for path in (ROOT / "benchmarks" / "scale" / "platforms").glob("*.xml")}
    assert files == set(simulate.PLATFORMS) == set(tables.TITLES)
