# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn doctor --model` says what conversion would do with a model of the user's, on every rank."""

import json
import re
import sys

import pytest

from syncbn.cli.doctor import models as cli_models
from tests import processes, warm

DOCTOR = ("-m", "syncbn", "doctor")


MODELS = """
import os
import torch
from torch import nn

def whole():
    print("a factory may print")
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.LayerNorm(3))

class Calls(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)

class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()

def partly():
    return nn.Sequential(nn.BatchNorm2d(3), Calls())

def refused():
    return nn.Sequential(nn.BatchNorm2d(3), Activated(3))

def none():
    return nn.Linear(1, 1)

def uneven():
    return nn.Sequential(*[nn.BatchNorm2d(3)] * 1) if RANK == 0 else nn.Sequential(nn.BatchNorm2d(4))

def broken():
    raise ValueError("no data here")

def broken_on_one():
    return whole() if RANK == 0 else broken()

def leaves():
    raise SystemExit(3)

def number():
    return 3

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", os.environ.get("RANK", 0))))
LIMIT = 5
"""


@pytest.fixture
def models(tmp_path):
    """A folder with factories in my_models.py."""
    return write_models(tmp_path)


def write_models(folder):
    (folder / "my_models.py").write_text(MODELS)
    (folder / "imports_absent.py").write_text("import a_package_that_is_absent\n")
    return folder


def test_a_model_is_listed_with_what_conversion_would_do(models):
    done = warm.python(*DOCTOR, "--model", "my_models:whole", cwd=models, PYTHONPATH=processes.ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 +BatchNorm2d +3 +NO +not converted yet", done.stdout, re.MULTILINE)
    assert "Conversion would succeed for 1 layer." in done.stdout
    assert "a factory may print" not in done.stdout
    assert "No problem found." in done.stdout


def test_json_has_the_model(models):
    command = (*DOCTOR, "--json", "--model", "my_models:partly")
    done = warm.python(*command, cwd=models, PYTHONPATH=processes.ROOT)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["model"]["factory"] == "my_models:partly"
    assert report["model"]["converts"] is True
    assert [(row["name"], row["kind"], row["local"]) for row in report["model"]["rows"]] == [
        ("0", "BatchNorm2d", True),
        ("1", "Calls", True),
    ]
    (problem,) = report["problems"]
    assert "would leave 1 module" in problem["what"]
    assert "1 (Calls): its forward calls F.batch_norm" in problem["what"]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("my_models:refused", "would refuse 1 module(?s:.*)1: its forward .*Activated.* would be lost"),
        ("my_models:absent", "my_models has no absent"),
        ("absent_package.models:build", "there is no module absent_package, looked for in "),
        ("imports_absent:build", "importing imports_absent raised ModuleNotFoundError.*a_package_that_is_absent"),
        ("my_models:broken", r"broken\(\) raised ValueError: no data here"),
        ("my_models:leaves", r"leaves\(\) raised SystemExit: 3"),
        ("my_models:number", r"number\(\) must return a torch.nn.Module; received int"),
        ("my_models:LIMIT", "LIMIT must be a function; received 5"),
    ],
)
def test_a_model_that_cannot_be_built_or_converted_is_a_problem(models, monkeypatch, factory, words):
    monkeypatch.chdir(models)
    found = cli_models.look(factory, None)
    ((what, remedy),) = found.problems()
    assert re.search(words, what)
    assert remedy
    assert found.to_dict()["converts"] is False


def test_a_model_without_batch_norm_has_no_problem(models, monkeypatch):
    monkeypatch.chdir(models)
    path = list(sys.path)
    found = cli_models.look("my_models:none", None)
    assert list(found.problems()) == []
    assert "There is nothing to convert." in found.table()
    assert sys.path == path


ON_RANKS = {
    "whole": None,
    "uneven": "ranks build different models: that of rank 1 differs from that of rank 0",
    "broken_on_one": r"On rank 1: broken_on_one\(\) raised ValueError: no data here",
}


@pytest.fixture(scope="module")
def together(request, tmp_path_factory):
    """What the command says of one model after the other on the same two processes."""
    folder = write_models(tmp_path_factory.mktemp("models"))
    cases = {factory: (*DOCTOR, "--json", "--model", f"my_models:{factory}") for factory in ON_RANKS}
    return processes.many(getattr(warm, request.param), 2, cases, folder, PYTHONPATH=f"{folder}:{processes.ROOT}")


@pytest.mark.parametrize(
    "together",
    [pytest.param(n, marks=pytest.mark.xdist_group(f"models {n}")) for n in ("mpirun", "torchrun")],
    indirect=True,
)
@pytest.mark.parametrize("factory", ON_RANKS)
def test_ranks_agree_on_the_model_and_rank_0_prints_once(together, factory):
    done, words = together[factory], ON_RANKS[factory]
    report = json.loads(done.stdout)
    assert (done.returncode == 0) == (words is None)
    assert bool(report["problems"]) == (words is not None)
    if words is None:
        assert [row["name"] for row in report["model"]["rows"]] == ["1"]
    else:
        (problem,) = report["problems"]
        assert re.search(words, problem["what"])


def test_a_model_that_takes_too_long_is_named(models):
    (models / "slow.py").write_text("import time\ndef build():\n    time.sleep(60)\n")
    command = (*DOCTOR, "--json", "--timeout", "15", "--model", "slow:build")
    done = warm.python(*command, cwd=models, PYTHONPATH=processes.ROOT)
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problem["what"] == "could not build the model slow:build within 15 s: it is not done on every rank"
