# SPDX-License-Identifier: BSD-3-Clause
"""The examples run as their docstrings say, and digits.py keeps its promises, also about bad data."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from syncbn.transports import launchers
from tests.processes import ROOT, mpirun, python, run, torchrun

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


def launch(launcher, n, *words, **options):
    return (
        python(*words, **options)
        if launcher == "python"
        else {"mpi": mpirun, "torch": torchrun}[launcher](n, *words, **options)
    )


def npz(folder, **arrays):
    path = folder / "mine.npz"
    np.savez(path, **arrays)
    return path


def images(n=40, *shape):
    return np.random.default_rng(0).random((n, *(shape or (8, 8))))


def labels(n=40):
    return np.arange(n) % 4


def test_every_example_says_how_to_run_it():
    named = {Path(word).stem for command, _ in promises() for word in command.split() if word.endswith(".py")}
    assert named == {path.stem for path in EXAMPLES.glob("*.py")} - HELPERS


@pytest.mark.parametrize(
    ("command", "printed"),
    [p for p in promises() if not re.search("digits.py|segmentation|wgan_gp.py|finetune_timm.py", p[0])],
)
def test_an_example_prints_what_its_docstring_says(command, printed):
    done = run("bash", "-c", command)
    assert done.returncode == 0, done.stderr
    assert NUMBER.sub("#", done.stdout.strip()) == NUMBER.sub("#", printed)
    exact = {"mlp.py": 0.03, "recalibrate.py": 0.1}.get(Path(command).name, 1e-9)  # other processors round otherwise
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (done.stdout, printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=exact)


def test_the_demo_prints_the_table_of_its_docstring_and_keeps_its_promise(tmp_path):
    [(command, printed)] = [p for p in promises() if "digits.py" in p[0]]
    done = run("bash", "-c", f"{command} --steps 21 --out {tmp_path}/digits.png")
    assert done.returncode == 0, done.stderr

    def words(text):
        return re.sub(r"[ -]+", " ", NUMBER.sub("#", re.sub(r"\S+digits.png", "FIGURE", text))).strip()

    assert words(done.stdout) == words(printed)
    for arm in ARMS:
        assert len(re.findall(rf"{arm}: 100%", done.stderr)) in (1, 2)  # tqdm may draw the last state twice
    assert "rank" not in done.stderr


def test_the_segmentation_is_good_where_it_is_synchronised_and_only_there(tmp_path):
    [(command, printed)] = [p for p in promises() if "segmentation.py" in p[0]]
    done = run("bash", "-c", f"{command} --out {tmp_path}/segmentation.png")
    assert done.returncode == 0, done.stderr
    assert NUMBER.sub("#", done.stdout.replace(str(tmp_path), "out")).strip() == NUMBER.sub("#", printed)
    rows = [
        [float(n) for n in re.findall(r"\d\.\d+", line)] for line in done.stdout.splitlines() if "BatchNorm" in line
    ]
    assert min(rows[1]) > 0.85
    assert min(rows[0]) < 0.3
    assert (tmp_path / "segmentation.png").stat().st_size > 20_000


@pytest.mark.parametrize(("launcher", "n"), [("mpi", 2), ("torch", 3), ("python", 1)])
def test_the_gradient_penalty_is_that_of_one_process_and_samples_are_drawn(launcher, n, tmp_path):
    """The program itself compares the first gradient with that of one process."""
    from matplotlib.image import imread

    [(_, printed)] = [p for p in promises() if "wgan_gp.py" in p[0]]
    done = launch(launcher, n, "examples/wgan_gp.py", "--steps", 20, "--out", tmp_path / "samples.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].strip() == printed.splitlines()[0]
    pixels = imread(tmp_path / "samples.png")
    assert pixels.shape[:2] == (256, 640)
    assert pixels[..., 0].std() > 0.1


def test_the_timing_of_compiled_steps_prints_its_table():
    done = python("benchmarks/compiled_digits.py", "--backend", "aot_eager", "--repeats", 2, "--batches", 8)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| +8 \|( +[\d.]+ \|){3}$", done.stdout, re.MULTILINE), done.stdout


def test_the_gradient_penalty_fails_where_the_conversion_does_nothing():
    program = "import syncbn, runpy, sys; syncbn.convert_sync_batchnorm = lambda model: model; sys.argv = sys.argv[1:]"
    program += "; sys.path.insert(0, 'examples'); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = mpirun(2, "-c", program, "examples/wgan_gp.py", "--steps", 1)
    assert done.returncode == 2
    assert "The critic's gradient is not that of one process" in done.stderr


@pytest.mark.parametrize(("launcher", "n"), [("python", 1), ("torch", 2)])
def test_the_losses_of_the_mlp_do_not_depend_on_the_number_of_processes(launcher, n):
    [(_, printed)] = [p for p in promises() if "mlp.py" in p[0]]
    done = launch(launcher, n, "examples/mlp.py", "--steps", 100)
    assert done.returncode == 0, done.stderr
    losses = [[float(n) for n in re.findall(r"loss (\S+)", text)] for text in (done.stdout, printed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize(("launcher", "n"), [("python", 1), ("torch", 3)])
def test_recalibration_helps_averaged_weights_alike_on_any_number_of_processes(launcher, n):
    done = launch(launcher, n, "examples/recalibrate.py")
    assert done.returncode == 0, done.stderr
    last, stale, fresh = [float(value) for value in re.findall(r" (0\.\d+)$", done.stdout, re.MULTILINE)]
    assert fresh > max(last, stale + 0.2)
    [(_, printed)] = [p for p in promises() if "recalibrate.py" in p[0]]
    assert f"  {fresh:.2f}" in printed
    assert "recalibrate: 100%" in done.stderr


def test_conversion_loses_nothing_in_one_process_either():
    [(_, printed)] = [p for p in promises() if "convert_model.py" in p[0]]
    assert python("examples/convert_model.py").stdout.strip() == printed


@pytest.mark.parametrize(
    ("launcher", "n", "dtype", "rounding"), [("mpi", 3, "float64", 1e-13), ("torch", 2, "float32", 1e-5)]
)
def test_the_synchronised_run_tracks_one_process_and_the_other_does_not(launcher, n, dtype, rounding, tmp_path):
    figure = tmp_path / "new" / "curves.png"
    done = launch(launcher, n, "examples/digits.py", "--steps", 25, "--dtype", dtype, "--json", "--out", figure)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["tracks"] is True
    assert results["compare_at"] == 20
    differences = [results["arms"][arm]["difference"] for arm in ARMS]
    assert differences[0] == 0
    assert differences[2] <= rounding
    assert differences[1] > 1e-3
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


def test_the_demo_alone_is_three_times_the_same_run(tmp_path):
    done = python("examples/digits.py", "--epochs", 1, "--batch", 300, "--json", "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["steps"] == 4  # 1438 images
    assert [results["arms"][arm]["difference"] < 1e-6 for arm in ARMS] == [True, True, True]


def test_the_demo_fails_where_the_conversion_does_nothing(tmp_path):
    program = "import syncbn, runpy, sys; syncbn.convert_sync_batchnorm = lambda model: model; sys.argv = sys.argv[1:]"
    program += "; sys.path.insert(0, 'examples'); runpy.run_path(sys.argv[0], run_name='__main__')"
    words = ["examples/digits.py", "--steps", 20, "--out", tmp_path / "a.png"]
    done = mpirun(2, "-c", program, *words)
    assert done.returncode == 1
    message = "SyncBatchNorm must stay within 1e-05 of the one-process run at step 20; received a parameter difference"
    assert done.stderr.count(message) == 1
    assert "tracks" not in done.stdout
    assert "Traceback" not in done.stderr


def test_the_demo_trains_on_your_own_images_of_any_size_and_classes(tmp_path):
    path = npz(tmp_path, x=images(40, 3, 9, 7), y=np.array([3, 7, 100, -5])[labels()])
    words = ["--data", path, "--steps", 5, "--json", "--out", tmp_path / "a.png"]
    done = mpirun(2, "examples/digits.py", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compare_at"] == 5


def test_the_mlp_trains_on_your_own_rows_of_784(tmp_path):
    path = npz(tmp_path, x=images(40, 784), y=labels())
    done = python("examples/mlp.py", "--data", path, "--steps", 5, "--batch", 8)
    assert done.returncode == 0, done.stderr
    assert "after 5 steps on 1 process over single" in done.stdout


def without_array(path):
    np.savez(path, images=images(), y=labels())


def not_an_archive(path):
    path.write_text("x,y\n1,2\n")


BAD_FILES = {
    "none at all": (lambda path: None, "--data needs an .npz file .* No such file"),
    "text": (not_an_archive, "--data needs an .npz file with arrays of numbers x and y; received "),
    "keys": (without_array, "--data needs an .npz file .*x is not a file in the archive"),
    "shapes": (lambda p: np.savez(p, x=images(), y=labels(39)), r"--data needs x of shape .* received x \(40, 8, 8\)"),
    "infinite": (lambda p: np.savez(p, x=images() / (images() > 0.1), y=labels()), "--data needs finite .x. < 1e.18"),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_data_ends_all_ranks_with_one_message_and_code_2(what, tmp_path):
    write, message = BAD_FILES[what]
    write(tmp_path / "mine.npz")
    done = mpirun(2, "examples/digits.py", "--data", tmp_path / "mine.npz", "--out", tmp_path / "a.png", limit=60)
    assert done.returncode == 2
    assert len(re.findall(rf"digits.py: error: On ranks 0, 1: {message}", done.stderr)) == 1
    assert done.stderr.count("--data needs") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_file_missing_on_one_rank_ends_all_ranks(tmp_path):
    npz(tmp_path, x=images(40, 784), y=labels())
    program = "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, 'examples'); "
    program += "sys.argv[-1] += '.missing' * (os.environ['OMPI_COMM_WORLD_RANK'] == '2'); "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = mpirun(3, "-c", program, "examples/mlp.py", "--batch", 8, "--data", tmp_path / "mine.npz", limit=60)
    assert done.returncode == 2
    assert done.stderr.count("mlp.py: error: On rank 2: --data needs an .npz file with ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 0], "argument --steps: needs a whole number >= 1; received 0"),
        (["--out", "LICENSE/a.png"], "--out needs a figure's name in a folder to write to; received LICENSE/a.png"),
    ],
)
def test_bad_options_end_all_ranks_with_one_message_and_code_2(words, message):
    done = mpirun(2, "examples/digits.py", *words, limit=60)
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr


def test_help_is_printed_once():
    done = mpirun(2, "examples/digits.py", "--help", limit=60)
    assert done.returncode == 0
    assert done.stdout.count("usage: digits.py") == 1


@pytest.fixture
def digits_data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("digits_data")
    sys.modules.pop("digits_data")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images(), "y": labels()[:, None]}, "y of shape"),
        ({"x": images(40, 64), "y": labels()}, "x of shape"),
        ({"x": images().astype(complex), "y": labels()}, "real numbers in x; received .* of complex128"),
        ({"x": images(), "y": labels() / 2}, "integer classes in y; received .* of float64"),
        ({"x": images(40, 3, 3), "y": labels()}, "images of at least 4 x 4"),
        ({"x": images(40, 0, 8, 8), "y": labels()}, "images of at least 4 x 4"),
        ({"x": images(9), "y": labels(9)}, "training part of at least one batch of 10"),
        ({"x": images(0), "y": labels(0)}, "training part of at least one batch of 10"),
        ({"x": images() * np.nan, "y": labels()}, "finite .* 40 of 40 images .* first at index 0"),
        ({"x": images() * 1e30, "y": labels()}, "finite"),
        ({"x": images(), "y": labels() * 0}, r"at least two classes in y; received only \[0\]"),
        ({"x": np.array([None] * 40), "y": labels()}, "arrays of numbers x and y; .* allow_pickle=False"),
        ({}, "x is not a file in the archive"),
    ],
)
def test_data_that_cannot_train_is_refused_with_its_reason(digits_data, arrays, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        digits_data.load(npz(tmp_path, **arrays), smallest_batch=10, seed=0)


def test_a_damaged_or_foreign_file_is_refused(digits_data, tmp_path):
    path = npz(tmp_path, x=images(), y=labels())
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"damage" + whole[2006:])
    with pytest.raises(ValueError, match=r"--data needs an \.npz file .*Bad CRC-32"):
        digits_data.load(path, smallest_batch=10, seed=0)
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="not a zip file"):
        digits_data.load(path, smallest_batch=10, seed=0)
    with pytest.raises(ValueError, match="Is a directory"):
        digits_data.load(tmp_path, smallest_batch=10, seed=0)


def test_images_of_another_size_are_refused_for_a_fixed_network(digits_data, tmp_path):
    with pytest.raises(ValueError, match="28 x 28 images, or rows of 784, in x"):
        digits_data.load(npz(tmp_path, x=images(), y=labels()), smallest_batch=10, seed=0, side=28)


def test_loaded_images_are_scaled_and_split_without_overlap(digits_data, tmp_path):
    x = np.arange(40.0)[:, None, None] + np.zeros((40, 4, 4))
    data = digits_data.load(npz(tmp_path, x=x, y=labels()), smallest_batch=10, seed=0)
    assert (len(data.x), len(data.test_x), data.classes) == (32, 8, 4)
    assert data.x.mean().abs() < 1e-6
    assert torch.unique(torch.cat([data.x, data.test_x])[:, 0, 0, 0]).numel() == 40


def test_constant_images_do_not_divide_by_zero(digits_data, tmp_path):
    data = digits_data.load(npz(tmp_path, x=np.ones((40, 8, 8)), y=labels()), smallest_batch=10, seed=0)
    assert torch.equal(data.x, torch.zeros(32, 1, 8, 8))
