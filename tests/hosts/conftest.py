# SPDX-License-Identifier: BSD-3-Clause
"""Hosts for a test. They last for a file: a set takes a quarter of a second."""

import shutil
from pathlib import Path

import pytest

from tests.hosts import network


@pytest.fixture(scope="module")
def make_hosts(tmp_path_factory):
    """Makes ``Hosts``; all end with the file. Skips, with the reason, where this machine cannot have any."""
    made = []

    def make(n, kind="bridge", *, ssh=False, **environ):
        if problem := network.problem() or (ssh and network.sshd_problem()):
            pytest.skip(problem)
        if kind == "wire" and not (shutil.which("gcc") and Path("/dev/net/tun").exists()):
            pytest.skip("a network with a delay needs gcc and /dev/net/tun")
        made.append(network.Hosts(n, tmp_path_factory.mktemp("hosts"), kind, **environ))
        if ssh:
            made[-1].do("sshd")
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()
