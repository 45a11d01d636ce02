# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the pages are what their scripts make of what was measured, and can be read on a phone."""

import io
import re
import struct
import zlib
from xml.etree import ElementTree

import pytest

from benchmarks.pictures import __main__ as command
from benchmarks.pictures import results, svg
from tests.processes import ROOT

pytestmark = pytest.mark.cpu("the scripts compute on the CPU what they draw")

FOLDER = ROOT / "docs" / "pictures"
READABLE = 12
"""Pixels of text in a picture of 520, some 8 on a phone."""


@pytest.mark.parametrize("theme", svg.THEMES)
@pytest.mark.parametrize("name", sorted(set(command.PICTURES) - {"variance"}))  # whose numbers are this processor's
def test_a_picture_is_what_its_script_makes(name, theme):
    assert command.PICTURES[name](theme).render() == (FOLDER / f"{name}-{theme}.svg").read_text()


@pytest.mark.parametrize("theme", svg.THEMES)
@pytest.mark.parametrize("name", sorted(command.PICTURES))
def test_a_picture_has_a_title_and_text_that_can_be_read(name, theme):
    root = ElementTree.fromstring(command.PICTURES[name](theme).render())
    texts = [part for part in root.iter() if part.tag.endswith("text")]
    assert texts
    assert all(float(text.get("font-size", svg.TEXT)) >= READABLE for text in texts)
    assert float(root.get("width")) == svg.WIDTH
    assert len(root[0].text) > 60


def test_every_picture_comes_small_and_for_both_themes():
    names = {path.stem for path in FOLDER.iterdir()}
    for name in {name.rpartition("-")[0] for name in names}:
        assert {f"{name}-light", f"{name}-dark"} <= names
    assert [path.name for path in FOLDER.iterdir() if path.stat().st_size >= 40_000] == []


def test_every_measured_file_has_its_command():
    read_off = {"gpu"}  # what the picture of that run held
    assert {path.stem for path in results.FOLDER.glob("*.json")} == {*command.COMMANDS, *read_off}


def test_the_variance_of_float64_sums_is_better_by_far():
    from benchmarks.pictures import variance

    for ratio, (float32, torchs, ours) in zip(variance.RATIOS, variance.errors(), strict=True):
        assert ours < 1e-14 * max(ratio, 1.0) ** 2
        assert ours < torchs
        assert ours < float32


def test_two_samples_a_rank_become_plus_and_minus_one():
    from benchmarks.pictures import small_batch

    _, local, together = small_batch.numbers()
    assert local.abs().tolist() == pytest.approx([1.0] * 8, abs=2e-2)
    assert len({round(value, 2) for value in together.tolist()}) == 8


def test_pixels_survive_the_encoding():
    rows = [[0, 1, 2], [2, 1, 0]]
    data = svg.png(rows, ("#ffffff", "#0072b2", "#d55e00"))
    assert struct.unpack(">II", data[16:24]) == (3, 2)
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0]
    lines = zlib.decompress(data[start : start + length])
    assert [list(lines[4 * i + 1 : 4 * i + 4]) for i in range(2)] == rows


def test_the_command_draws_some_and_refuses_others(tmp_path, capsys):
    assert command.main(["digits", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-dark.svg", "digits-light.svg"]
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "no picture nothing; choose from data_flow" in capsys.readouterr().err
    assert command.main(["--commands"]) == 0
    assert "syncbn bench --json --channels-last > " in capsys.readouterr().out


def test_shrinking_keeps_what_is_drawn():
    pytest.importorskip("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none"}):
        figure = Figure()
        figure.subplots().plot([1, 2, 3], "o-", color="#123456", label="words")
        figure.savefig(written := io.StringIO(), format="svg")
    text = written.getvalue()
    small = svg.shrunk(text)
    ElementTree.fromstring(small)
    assert len(small) < 0.8 * len(text)
    assert small.count("<use") == text.count("<use")
    assert re.findall(r">([^<>]+)</text>", small) == re.findall(r">([^<>]+)</text>", text)
    assert 'fill="#123456"' in small
