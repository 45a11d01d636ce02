# SPDX-License-Identifier: BSD-3-Clause
"""What the doctor reads about the machine, and how its text stays readable."""

import pytest

from syncbn.cli import lines
from syncbn.cli.doctor import container, system, text
from syncbn.cli.doctor.report import Place, Report


@pytest.fixture
def root(tmp_path):
    """A folder that stands for /, and a function that writes files in it."""

    def write(name, said):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)

    return tmp_path, write


def test_limits_of_cgroups_2_are_those_of_the_group_and_all_above_it(root):
    path, write = root
    write("proc/self/cgroup", "0::/pod/box\n")
    write("sys/fs/cgroup/pod/box/cpu.max", "max 100000\n")
    write("sys/fs/cgroup/pod/cpu.max", "150000 100000\n")
    write("sys/fs/cgroup/pod/box/memory.max", "max\n")
    write("sys/fs/cgroup/memory.max", f"{3 << 30}\n")
    assert container.core_limit(path) == 1.5
    assert container.memory_limit(path) == 3.0


def test_limits_of_cgroups_1_are_read_too(root):
    path, write = root
    write("proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n")
    write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "50000\n")
    write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{1 << 30}\n")
    assert container.core_limit(path) == 0.5
    assert container.memory_limit(path) == 1.0


def test_without_limits_there_are_none(root):
    path, write = root
    write("proc/self/cgroup", "4:memory:/\n3:cpu:/\n0::/\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert container.core_limit(path) is None
    assert container.memory_limit(path) is None


def test_variables_that_matter_are_shown_and_the_secret_of_the_job_is_not():
    given = {"SYNCBN_JOB": "secret", "GLOO_SOCKET_IFNAME": "lo", "HOME": "/root", "OMPI_MCA_num_procs": "2"}
    assert system.variables(given) == {"GLOO_SOCKET_IFNAME": "lo", "SYNCBN_JOB": "(set)"}


def test_time_spent_waiting_for_a_core_grows():
    first = system.waited_ns()
    assert first is None or system.waited_ns() >= first >= 0


def test_commands_are_never_broken_over_two_lines():
    command = '`pip install "syncbn[mpi]"` or `export MPI4PY_LIBMPI=/a/b`'
    for length in range(60, 100):
        said = lines.wrapped(f"{'x ' * (length // 2)}{command}", "  1. ")
        assert all(len(line) <= lines.WIDTH for line in said.splitlines())
        assert '`pip install "syncbn[mpi]"`' in said
        assert "`export MPI4PY_LIBMPI=/a/b`" in said


def test_lines_of_a_text_stay_lines():
    assert lines.wrapped("one:\n  two", "1. ") == "1. one:\n     two"


def test_many_ranks_have_a_line_a_host():
    ranks = [Place(r, r % 32, f"h{r // 32}", r, "cpu", "0-31", 1) for r in range(64)]
    said = text.to_text(Report(ranks=ranks))
    assert "32-63    h1      cpu        0-31     1" in said
    assert len(said.splitlines()) < 20
    assert "pid" in text.to_text(Report(ranks=ranks[:32]))
