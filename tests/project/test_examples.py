# SPDX-License-Identifier: BSD-3-Clause
"""The examples print what their docstrings say, started by the very commands that stand there."""

import ast
import re
from pathlib import Path

import pytest

from syncbn.transports import launchers
from tests import warm
from tests.processes import ROOT, many

EXAMPLES = ROOT / "examples"
HELPERS = {"together", "digits_data", "digits_model", "digits_options", "digits_report"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
ARMS = ["one process", "BatchNorm2d", "SyncBatchNorm"]

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(launchers.detect().size > 1, reason="starts its own processes"),
]


def promises():
    """Every command in the docstring of an example, with the lines that it says are printed."""
    found = []
    for path in sorted(EXAMPLES.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        for command, printed in re.findall(r"^ +\$ (.+)\n((?: +\S.*\n?)*)", doc, re.MULTILINE):
            found.append((command, "\n".join(line.strip() for line in printed.splitlines())))
    return found


def test_every_example_says_how_to_run_it():
    named = {Path(word).stem for command, _ in promises() for word in command.split() if word.endswith(".py")}
    assert named == {path.stem for path in EXAMPLES.glob("*.py")} - HELPERS


PRINTED = [
    p for p in promises() if not re.search("digits.py|segmentation|wgan_gp.py|finetune_timm.py|do_i_need_it.py", p[0])
]
UNDER_MPIRUN = re.compile(r"NPROC=(\d+) launch/mpirun.sh (examples/\w+\.py)")


def together():
    """Commands that differ in their program alone, by the number of processes: one start runs these programs."""
    found = {}
    for command, _ in PRINTED:
        if match := UNDER_MPIRUN.fullmatch(command):
            found.setdefault(int(match[1]), {})[command] = [match[2]]
    return {n: cases for n, cases in found.items() if len(cases) > 1}


def group_of(command):
    """The number of processes that several commands share, or "" for a command that is started by itself."""
    return next((n for n, cases in together().items() if command in cases), "")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What a command does. Those of one number of processes share a start."""
    done = {}

    def start(command):
        if not (n := group_of(command)):
            return warm.run("bash", "-c", command)
        if n not in done:
            done[n] = many(warm.mpirun, n, together()[n], tmp_path_factory.mktemp("together"))
        return done[n][command]

    return start


def grouped(promise):
    command, n = promise[0], group_of(promise[0])
    return pytest.param(*promise, marks=[pytest.mark.xdist_group(f"{n} processes")] if n else [], id=command)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("command", "printed"), [*map(grouped, PRINTED)])
def test_an_example_prints_what_its_docstring_says(started, command, printed):
    done = started(command)
    assert done.returncode == 0, done.stderr
    assert NUMBER.sub("#", done.stdout.strip()) == NUMBER.sub("#", printed)
    exact = {"mlp.py": 0.03, "recalibrate.py": 0.1}.get(Path(command).name, 1e-9)  # other processors round otherwise
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (done.stdout, printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=exact)


def test_the_demo_prints_the_table_of_its_docstring_and_keeps_its_promise(tmp_path):
    [(command, printed)] = [p for p in promises() if "digits.py" in p[0]]
    done = warm.run("bash", "-c", f"{command} --steps 21 --out {tmp_path}/digits.png")
    assert done.returncode == 0, done.stderr

    def words(text):
        return re.sub(r"[ -]+", " ", NUMBER.sub("#", re.sub(r"\S+digits.png", "FIGURE", text))).strip()

    assert words(done.stdout) == words(printed)
    for arm in ARMS:
        assert len(re.findall(rf"{arm}: 100%", done.stderr)) in (1, 2)  # tqdm may draw the last state twice
    assert "rank" not in done.stderr


def test_the_segmentation_is_good_where_it_is_synchronised_and_only_there(tmp_path):
    [(command, printed)] = [p for p in promises() if "segmentation.py" in p[0]]
    done = warm.run("bash", "-c", f"{command} --steps 350 --out {tmp_path}/segmentation.png")
    assert done.returncode == 0, done.stderr
    assert NUMBER.sub("#", done.stdout.replace(str(tmp_path), "out")).strip() == NUMBER.sub("#", printed)
    rows = [
        [float(n) for n in re.findall(r"\d\.\d+", line)] for line in done.stdout.splitlines() if "BatchNorm" in line
    ]
    assert min(rows[1]) > 0.85
    assert min(rows[0]) < 0.3
    assert (tmp_path / "segmentation.png").stat().st_size > 20_000
