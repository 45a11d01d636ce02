# SPDX-License-Identifier: BSD-3-Clause
"""The launcher is read from the environment; the innermost one wins."""

import pytest

from syncbn.transports import launchers

OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("none", 0, 1, 0, False)),
        (OPENMPI, ("openmpi", 1, 4, 1, True)),
        (MPICH, ("mpich", 2, 4, 0, True)),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, ("mpich", 2, 4, 0, True)),
        (SLURM, ("slurm", 3, 8, 1, False)),
        (SLURM | {"PMIX_RANK": "3"}, ("slurm", 3, 8, 1, True)),
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "8"}, ("slurm", 3, 8, 1, True)),
        (TORCHRUN, ("torchrun", 1, 2, 1, False)),
        (TORCHRUN | SLURM, ("torchrun", 1, 2, 1, False)),
        (TORCHRUN | OPENMPI, ("torchrun", 1, 2, 1, False)),
        (OPENMPI | SLURM, ("openmpi", 1, 4, 1, True)),
        (MPICH | SLURM, ("mpich", 2, 4, 0, True)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, ("env", 1, 3, 0, False)),
        # a shell inside an allocation, before srun
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ("none", 0, 1, 0, False)),
    ],
)
def test_detect(environ, expected):
    assert launchers.detect(environ)[:5] == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (OPENMPI, 2),  # itself and local rank 0
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        (MPICH | {"MPI_LOCALNRANKS": "4"}, 4),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, 2),
        ({}, 1),
    ],
)
def test_the_processes_of_this_host_are_counted(environ, expected):
    assert launchers.detect(environ).local_size == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number; received 'two'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK must be a whole number; received ''"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "-1"}, "OMPI_COMM_WORLD_LOCAL_RANK must be a whole number"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "WORLD_SIZE must be a whole number; received nothing"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE; received RANK=2 and WORLD_SIZE=2"),
    ],
)
def test_a_variable_that_is_wrong_is_named(environ, words):
    with pytest.raises(ValueError, match=words):
        launchers.detect(environ)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [
        ("2(x3),1", 0, 2),
        ("2(x3),1", 2, 2),
        ("2(x3),1", 3, 1),
        ("4", 0, 4),
        ("2(x3),1", 4, 2),
        ("many", 0, 2),
        ("", 0, 2),
    ],
)
def test_slurm_says_how_many_tasks_a_node_has(tasks, node, expected):
    """Else the ranks of a host would count differently, by their own number, and choose other backends."""
    found = launchers.detect(SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert found.local_size == expected
