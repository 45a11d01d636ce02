# SPDX-License-Identifier: BSD-3-Clause
"""One thread a process, and rules for running under a launcher."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

from syncbn import launchers
from tests import fake_cuda

torch.set_num_threads(1)
LAUNCH = launchers.detect()
WANTED = os.environ.get("SYNCBN_TEST_DEVICE", "cpu")
DEVICE = torch.device(fake_cuda.install() if WANTED == fake_cuda.NAME else WANTED)
"""Where tests make their tensors: launch/gpu.sh runs them on a GPU, make test-fake-gpu on one of host memory."""
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)


if LAUNCH.size > 1:  # ranks that share pytest's folder for temporary files remove it under each other's feet
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=f"syncbn-rank{LAUNCH.rank}-")
    atexit.register(shutil.rmtree, os.environ["PYTEST_DEBUG_TEMPROOT"], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if LAUNCH.rank > 0:  # one report, from rank 0: verdicts are agreed, so it speaks for all
        config.pluginmanager.unregister(config.pluginmanager.get_plugin("terminalreporter"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Makes ranks(n) pytest-mpi's mpi(min_size=n); under torchrun, which that plugin does not know, a plain skip."""
    for item in items:
        if DEVICE.type != "cpu" and (about := item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason=about.args[0]))
        mark = item.get_closest_marker("ranks")
        if mark is None:
            if LAUNCH.size > 1:
                item.add_marker(pytest.mark.skip(reason="a test of one process"))
        elif LAUNCH.size > 1 and not LAUNCH.speaks_mpi:
            if LAUNCH.size < mark.args[0]:
                item.add_marker(pytest.mark.skip(reason=f"needs {mark.args[0]} processes"))
        else:
            item.add_marker(pytest.mark.mpi(min_size=mark.args[0]))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Keeps a transport that a person forces in the shell out of the tests."""
    monkeypatch.delenv("SYNCBN_TRANSPORT", raising=False)


@pytest.fixture
def rng():
    """A generator of its own for each test, the same on every rank."""
    return torch.Generator(DEVICE).manual_seed(int(os.environ.get("SYNCBN_TEST_SEED", "0")))
