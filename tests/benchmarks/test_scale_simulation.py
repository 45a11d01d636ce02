# SPDX-License-Identifier: BSD-3-Clause
"""The simulated collectives give every rank the right bytes, and take the time that the platform says."""

import pytest

from benchmarks.scale import __main__ as command
from benchmarks.scale import results, simulate

pytestmark = [
    pytest.mark.skipif(bool(simulate.problem()), reason=simulate.problem()),
    pytest.mark.xdist_group("scale"),
    pytest.mark.program,
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return simulate.build(tmp_path_factory.mktemp("scale"))


@pytest.mark.parametrize("algorithm", [*simulate.SUMS, *simulate.GATHERS])
@pytest.mark.parametrize("ranks", [2, 32])
def test_every_rank_ends_with_the_bytes_of_all(program, algorithm, ranks):
    words = ["check", algorithm, simulate.PER_NODE, 1144, 32888]
    assert simulate.replay(program, "fat_tree_nvlink", ranks, words) == ["right", "right"]


def test_two_ranks_take_the_time_of_one_message_and_one_sum(program):
    lengths = (1032, 4104)
    times = simulate.replay(program, "ethernet", 2, ["time", "sum_doubling", simulate.PER_NODE, 0, *lengths])
    expected = [0.25 + 0.42 + 0.25 + bytes / 4.4e3 + 0.04e-3 * bytes for bytes in lengths]
    assert [float(us) for us in times] == pytest.approx(expected, rel=0.01)


def test_a_hop_between_nodes_takes_the_time_of_its_links(program):
    """One rank a node; the first two are in one leaf, the 33rd is not."""
    near, far = (
        float(simulate.replay(program, "fat_tree_nvlink", 8 * nodes, ["time", "sum_nodes", 8, 0, 8])[0])
        for nodes in (32, 64)
    )
    assert far - near == pytest.approx(0.25 + 4 * 0.2 + 0.25, abs=0.02)


def test_a_stopped_ring_scaled_is_a_whole_one(program):
    whole, some = (
        float(simulate.replay(program, "fat_tree_nvlink", 64, ["time", "gather_ring", 8, rounds, 1028])[0])
        for rounds in (0, simulate.ROUNDS)
    )
    assert some * 63 / simulate.ROUNDS == pytest.approx(whole, rel=0.01)


@pytest.mark.timeout(300)
def test_the_command_writes_files_and_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["--ranks", "4", "--platforms", "ethernet", "--samples", "10", "--output", str(tmp_path)]
    assert command.main(words) == 0
    found = results.read(tmp_path)
    assert found.ranks() == [2, 4]
    assert found.notes[0] == f"python -m benchmarks.scale {' '.join(words)}"
    assert found.ms("ethernet", 4, "torch, ring") > found.ms("ethernet", 4, "torch, best") > 0
    layers = [check for check in found.checks if check.shortcut.startswith("layers")]
    assert [check.taken for check in layers] == pytest.approx([check.checked for check in layers], rel=0.01)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv"] * 3 + [".svg"] * 4
    assert "Ethernet, 25 Gb/s, 20 us" in capsys.readouterr().out


def test_a_simulation_that_fails_says_why(program):
    with pytest.raises(RuntimeError, match="a power of two ranks"):
        simulate.replay(program, "ethernet", 3, ["check", "sum_doubling", 8, 8])
    with pytest.raises(ValueError, match="4096 ranks at most; received 8192"):
        simulate.replay(program, "ethernet", 8192, [])
