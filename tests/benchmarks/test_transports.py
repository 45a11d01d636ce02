# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark of the transports runs, and its rows are what they say."""

import json

import pytest

from benchmarks import transports
from syncbn.transports import shared_memory
from tests import warm

SHARED = ["shm"] * (not shared_memory.problem())


def test_the_layers_are_those_of_a_resnet_50():
    shapes = transports.resnet50_shapes()
    assert len(shapes) == 53
    assert sum(C for C, _ in shapes) == 26_560  # torchvision counts 53,120 weights and biases of batch norms
    assert shapes[0] == (64, 112)
    assert shapes[-1] == (2048, 7)


@pytest.mark.program
def test_every_transport_is_timed():
    done = warm.mpirun(2, "benchmarks/transports.py", "--rounds", 1, "--json", limit=200)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2
    assert len(document["us"]) == 7
    for us in document["us"].values():
        assert sorted(us) == sorted([*SHARED, "mpi", "torch"])
        assert all(each > 0 for each in us.values())
