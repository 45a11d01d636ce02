# SPDX-License-Identifier: BSD-3-Clause
"""One thread a process, and rules for running under a launcher."""

import ast
import atexit
import gc
import inspect
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from syncbn.transports import launchers
from tests import fake_cuda, processes

torch.set_num_threads(1)
HERE = Path(__file__).parent
LAUNCH = launchers.detect()
WANTED = os.environ.get("SYNCBN_TEST_DEVICE", "cpu")
TRANSPORT = os.environ.get("SYNCBN_TEST_TRANSPORT", "auto")
"""Of a whole run: mpi and torch have stages of their own, since auto takes shared memory on one host."""
if TRANSPORT != "auto":
    os.environ["SYNCBN_TRANSPORT"] = TRANSPORT
DEVICE = torch.device(fake_cuda.install() if WANTED == fake_cuda.NAME else WANTED)
"""Where tests make their tensors: launch/gpu.sh runs them on a GPU, tests/run.sh fake-gpu on one of host memory."""
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # the default, which keeps 10 bits: convolutions are part of the oracles
    torch.backends.cudnn.deterministic = True
DEFERRED_ERRORS = DEVICE.type == "cuda" and not LAUNCH.speaks_mpi
"""Whether a rank with a wrong input raises alone, and the others later: gloo sums CUDA tensors behind the host's back.

MPI through host memory makes the host wait. What a rank cannot know then: docs/concepts/gpu.md, "Deferred errors"."""


if LAUNCH.size > 1:  # ranks that share pytest's folder for temporary files remove it under each other's feet
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=f"syncbn-rank{LAUNCH.rank}-")
    atexit.register(shutil.rmtree, os.environ["PYTEST_DEBUG_TEMPROOT"], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if LAUNCH.rank > 0:  # one report, from rank 0: all ranks agree on each check, so it speaks for all
        config.pluginmanager.unregister(config.pluginmanager.get_plugin("terminalreporter"))


def pytest_collection_finish():
    """What torch and pytest have made by now stays. Every later collection would look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Makes ranks(n) pytest-mpi's mpi(min_size=n); without that plugin, and under torchrun, unknown to it, a skip."""
    for item in items:
        if _starts_programs(item):
            item.add_marker(pytest.mark.program)
        _limit(item)
        if "multiprocess" in item.nodeid and "compil" in item.nodeid:  # seconds each, the same on any number of ranks
            item.add_marker(pytest.mark.slow)
        if DEVICE.type != "cpu" and (about := item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason=about.args[0]))
        if DEFERRED_ERRORS and item.get_closest_marker("immediate_errors"):
            item.add_marker(pytest.mark.skip(reason="needs a host that waits for the sums; see DEFERRED_ERRORS"))
        mark, plugin = item.get_closest_marker("ranks"), config.pluginmanager.hasplugin("pytest_mpi")
        if mark is None:
            if LAUNCH.size > 1:
                item.add_marker(pytest.mark.skip(reason="a test of one process"))
        elif plugin and (LAUNCH.size == 1 or LAUNCH.speaks_mpi):
            item.add_marker(pytest.mark.mpi(min_size=mark.args[0]))
        elif LAUNCH.size < max(2, mark.args[0]):
            item.add_marker(pytest.mark.skip(reason=f"needs {max(2, mark.args[0])} processes"))
    _name_groups(items if config.getoption("loadgroup", default=False) else [])


def _limit(item):
    """Gives a test the time that ``processes.patience`` says."""
    given = item.get_closest_marker("timeout")
    seconds = given.args[0] if given else float(item.config.getini("timeout"))
    if (longer := processes.patience(seconds)) > seconds:
        item.add_marker(pytest.mark.timeout(longer), append=False)


def _name_groups(items):
    """Ends the id of a test with its group, as the scheduler of pytest-xdist --dist loadgroup reads it.

    pytest-xdist 3.8 means to, and sets an attribute that pytest has not read since 9.2: each worker started all again.
    """
    for item in items:
        names = sorted({mark.args[0] for mark in item.iter_markers("xdist_group")})
        if names and hasattr(item, "_id"):
            item._id = type(item._id).parse(f"{item.nodeid}@{'_'.join(names)}")


def _starts_programs(item):
    """Whether a test starts programs: the text of it or of one of its fixtures says so."""
    if not hasattr(item, "function"):
        return False
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    return any(word in _text(f) for f in (item.function, *fixtures) for word in ("processes.", "subprocess.", "warm."))


def _text(function):
    code = inspect.unwrap(function).__code__
    return _texts(code.co_filename).get(code.co_name, "")


@cache
def _texts(path):
    """The functions of a file, with their decorators."""
    text = Path(path).read_text(encoding="utf-8") if path.startswith(str(HERE)) else ""
    lines = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    begin = [min([node.lineno, *(each.lineno for each in node.decorator_list)]) for node in functions]
    return {f.name: "\n".join(lines[b - 1 : f.end_lineno]) for f, b in zip(functions, begin, strict=True)}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Keeps a transport that a person forces in the shell out of the tests. A stage of tests forces one itself."""
    if TRANSPORT == "auto":
        monkeypatch.delenv("SYNCBN_TRANSPORT", raising=False)


@pytest.fixture
def rng():
    """A generator of its own for each test, the same on every rank."""
    return torch.Generator(DEVICE).manual_seed(int(os.environ.get("SYNCBN_TEST_SEED", "0")))
