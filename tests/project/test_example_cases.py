# SPDX-License-Identifier: BSD-3-Clause
"""What the examples promise besides what they print, on other numbers of processes and for wrong data and options.

To import torch and scikit-learn takes longer than most of the programs, so the same processes run many of them.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from syncbn.transports import launchers
from tests import warm
from tests.processes import many
from tests.project.test_digits_data import images, labels, npz
from tests.project.test_examples import ARMS, promises

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(launchers.detect().size > 1, reason="starts its own processes"),
]
DIGITS, MLP, PENALTY = "examples/digits.py", "examples/mlp.py", "examples/wgan_gp.py"
NEED = "examples/do_i_need_it.py"
DIGITS_LAYERS = ["1", "3.main.1", "3.main.4", "4.main.1", "4.main.4", "4.shortcut.1"]
UNCONVERTED = """
import runpy, sys
from unittest import mock
sys.argv = sys.argv[1:]
sys.path.insert(0, "examples")
with mock.patch("syncbn.convert_sync_batchnorm", lambda model: model):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
MISSING_ON_RANK_2 = """
import runpy, sys
from syncbn.transports import launchers
sys.argv = sys.argv[1:]
sys.path.insert(0, "examples")
sys.argv[-1] += ".missing" * (launchers.detect().rank == 2)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_array(path):
    np.savez(path, images=images(), y=labels())


def not_an_archive(path):
    path.write_text("x,y\n1,2\n")


BAD_FILES = {
    "none at all": (lambda path: None, "--data needs an .npz file .* No such file"),
    "text": (not_an_archive, "--data needs an .npz file with arrays of numbers x and y; received "),
    "keys": (without_array, "--data needs an .npz file .*x is not a file in the archive"),
    "shapes": (lambda p: np.savez(p, x=images(), y=labels(39)), r"--data needs x of shape .* received x \(40, 8, 8\)"),
    "infinite": (
        lambda p: np.savez(p, x=np.where(images() > 0.1, images(), np.inf), y=labels()),
        "--data needs finite .x. < 1e.18",
    ),
}


def cases(started, folder):
    """The programs that one start runs, by name."""
    out = ("--out", folder / "new" / "a.png")
    track = (DIGITS, "--steps", 25, "--json", *out, "--dtype")
    everywhere = {
        "penalty": (PENALTY, "--steps", 20, "--out", folder / "samples.png"),
        "mlp": (MLP, "--steps", 100),
        "recalibrate": ("examples/recalibrate.py",),
    }
    bad = {what: (DIGITS, "--data", folder / f"{what}.npz", *out) for what in BAD_FILES}
    return {
        "mpi-2": bad
        | {
            "own images": (DIGITS, "--data", folder / "images.npz", "--steps", 5, "--json", *out),
            "no steps": (DIGITS, "--steps", 0),
            "no folder": (DIGITS, "--out", "LICENSE/a.png"),
            "help": (DIGITS, "--help"),
            "digits without conversion": ("-c", UNCONVERTED, DIGITS, "--steps", 20, *out),
            "penalty without conversion": ("-c", UNCONVERTED, PENALTY, "--steps", 1),
            "penalty": everywhere["penalty"],
            "drift": (NEED, "--network", "digits", "--steps", 22, "--out", folder / "drift", "--dark"),
        },
        "mpi-3": {
            "tracks": (*track, "float64"),
            "missing": ("-c", MISSING_ON_RANK_2, MLP, "--batch", 8, "--data", folder / "rows.npz"),
        },
        "torch-3": everywhere | {"tracks": (*track, "float32")},
        "python-1": everywhere
        | {
            "convert": ("examples/convert_model.py",),
            "digits": (DIGITS, "--epochs", 1, "--batch", 300, "--json", *out),
            "own rows": (MLP, "--data", folder / "rows.npz", "--steps", 5, "--batch", 8),
            "compiled": ("benchmarks/compiled_digits.py", "--backend", "aot_eager", "--repeats", 2, "--batches", 8),
        },
    }[started]


@pytest.fixture(scope="module")
def did(request, tmp_path_factory):
    """What the programs of one start did, by name, and their folder."""
    folder = tmp_path_factory.mktemp("examples")
    npz(folder, "rows", x=images(40, 784), y=labels())
    npz(folder, "images", x=images(40, 3, 9, 7), y=np.array([3, 7, 100, -5])[labels()])
    for what, (write, _) in BAD_FILES.items():
        write(folder / f"{what}.npz")
    launcher, n = request.param.split("-")
    start = {"mpi": warm.mpirun, "torch": warm.torchrun, "python": warm.python}[launcher]
    return SimpleNamespace(folder=folder, of=many(start, int(n), cases(request.param, folder), folder))


def after(*starts):
    """Gives a test what the programs of each start did. All tests after one start share it."""
    marks = {s: [pytest.mark.xdist_group(s), pytest.mark.timeout(400)] for s in starts}
    return pytest.mark.parametrize("did", [pytest.param(s, marks=marks[s]) for s in starts], indirect=True)


def printed(example):
    """What the docstring of an example says that it prints."""
    return next(text for command, text in promises() if example in command)


@after("mpi-2", "torch-3", "python-1")
def test_the_gradient_penalty_is_that_of_one_process_and_samples_are_drawn(did):
    """The program itself compares the first gradient with that of one process."""
    from matplotlib.image import imread

    done = did.of["penalty"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].strip() == printed("wgan_gp.py").splitlines()[0]
    pixels = imread(did.folder / "samples.png")
    assert pixels.shape[:2] == (256, 640)
    assert pixels[..., 0].std() > 0.1


@after("mpi-2")
def test_the_gradient_penalty_fails_where_the_conversion_does_nothing(did):
    done = did.of["penalty without conversion"]
    assert done.returncode == 2
    assert "The critic's gradient is not that of one process" in done.stderr


@after("python-1")
def test_the_timing_of_compiled_steps_prints_its_table(did):
    done = did.of["compiled"]
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| +8 \|( +[\d.]+ \|){3}$", done.stdout, re.MULTILINE), done.stdout


@after("python-1", "torch-3")
def test_the_losses_of_the_mlp_do_not_depend_on_the_number_of_processes(did):
    done = did.of["mlp"]
    assert done.returncode == 0, done.stderr
    losses = [[float(n) for n in re.findall(r"loss (\S+)", text)] for text in (done.stdout, printed("mlp.py"))]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@after("python-1", "torch-3")
def test_recalibration_helps_averaged_weights_alike_on_any_number_of_processes(did):
    done = did.of["recalibrate"]
    assert done.returncode == 0, done.stderr
    last, stale, fresh = [float(value) for value in re.findall(r" (0\.\d+)$", done.stdout, re.MULTILINE)]
    assert fresh > max(last, stale + 0.2)
    assert f"  {fresh:.2f}" in printed("recalibrate.py")
    assert "recalibrate: 100%" in done.stderr


@after("python-1")
def test_conversion_loses_nothing_in_one_process_either(did):
    assert did.of["convert"].stdout.strip() == printed("convert_model.py")


@after("mpi-3", "torch-3")
def test_the_synchronised_run_tracks_one_process_and_the_other_does_not(did):
    done = did.of["tracks"]
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["tracks"] is True
    assert results["compare_at"] == 20
    differences = [results["arms"][arm]["difference"] for arm in ARMS]
    rounding = {"float64": 1e-13, "float32": 1e-5}[done.args[-1]]
    assert differences[0] == 0
    assert differences[2] <= rounding
    assert differences[1] > 1e-3
    figure = did.folder / "new" / "a.png"
    assert figure.stat().st_size > 20_000
    check_figure(figure)


def check_figure(path):
    """The three curves are there: pixels of each colour on a figure of the stated size."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == (600, 1440)
    for colour in ("0.75", "#d55e00", "#0072b2"):
        rgb = [float(colour)] * 3 if colour[0] == "0" else [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - np.array(rgb)).max(-1) < 0.01).sum() > 500, colour


@after("python-1")
def test_the_demo_alone_is_three_times_the_same_run(did):
    done = did.of["digits"]
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["steps"] == 4  # 1438 images
    assert [results["arms"][arm]["difference"] < 1e-6 for arm in ARMS] == [True, True, True]


@after("mpi-2")
def test_the_drift_of_the_digits_is_reported_drawn_and_tried(did):
    done = did.of["drift"]
    assert done.returncode == 0, done.stderr
    report = json.loads((did.folder / "drift" / "drift-digits.json").read_text())
    assert [row["name"] for row in report["rows"]] == DIGITS_LAYERS
    assert all(row["calls"] == 20 and row["seconds"] > 0 and row["mean_drift"] > 0 for row in report["rows"])
    arms = re.findall(r"^\| (\w+) +\| +(\d) \| +0\.\d+ \| +0\.\d+ \|$", done.stdout, re.MULTILINE)
    assert [arm for arm, _ in arms] == ["none", "all", "recommended"]
    assert [arms[0][1], arms[1][1]] == ["0", "6"]
    assert 0 < int(arms[2][1]) < 6
    assert done.stdout.count("20 calls of each, 2 ranks") == 2
    assert (did.folder / "drift" / "drift-digits.png").stat().st_size > 10_000


@after("mpi-2")
def test_the_demo_fails_where_the_conversion_does_nothing(did):
    done = did.of["digits without conversion"]
    assert done.returncode == 1
    message = "SyncBatchNorm must stay within 1e-05 of the one-process run at step 20; received a parameter difference"
    assert done.stderr.count(message) == 1
    assert "tracks" not in done.stdout
    assert "Traceback" not in done.stderr


@after("mpi-2")
def test_the_demo_trains_on_your_own_images_of_any_size_and_classes(did):
    done = did.of["own images"]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compare_at"] == 5


@after("python-1")
def test_the_mlp_trains_on_your_own_rows_of_784(did):
    done = did.of["own rows"]
    assert done.returncode == 0, done.stderr
    assert "after 5 steps on 1 process over single" in done.stdout


@after("mpi-2")
@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_data_is_one_message_and_code_2_on_all_ranks(did, what):
    check_bad_data(did.of[what], BAD_FILES[what][1])


def check_bad_data(done, message):
    assert done.returncode == 2
    assert len(re.findall(rf"digits.py: error: On ranks 0, 1: {message}", done.stderr)) == 1
    assert done.stderr.count("--data needs") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_bad_data_ends_all_processes_with_the_code_of_their_ranks(tmp_path):
    done = warm.mpirun(2, DIGITS, "--data", tmp_path / "mine.npz", "--out", tmp_path / "a.png", limit=60)
    check_bad_data(done, BAD_FILES["none at all"][1])


@after("mpi-3")
def test_a_file_missing_on_one_rank_ends_all_ranks(did):
    done = did.of["missing"]
    assert done.returncode == 2
    assert done.stderr.count("mlp.py: error: On rank 2: --data needs an .npz file with ") == 1
    assert "Traceback" not in done.stderr


@after("mpi-2")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no steps", "argument --steps: needs a whole number >= 1; received 0"),
        ("no folder", "--out needs a figure's name in a folder to write to; received LICENSE/a.png"),
    ],
)
def test_bad_options_are_one_message_and_code_2_on_all_ranks(did, what, message):
    done = did.of[what]
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr


@after("mpi-2")
def test_help_is_printed_once(did):
    done = did.of["help"]
    assert done.returncode == 0
    assert done.stdout.count("usage: digits.py") == 1
