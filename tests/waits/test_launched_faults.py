# SPDX-License-Identifier: BSD-3-Clause
"""A rank under a launcher does something else than the others: all end soon and say who did what."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests import warm
from tests.waits.expected import (
    ALIKE,
    FAULTS,
    GONE_AT_ONCE,
    SOON,
    SOON_LAUNCHED,
    Jobs,
    check,
    limit_of,
    new,
    pattern,
)
from tests.waits.jobs import END, GIVEN_UP, launched


def under(launcher, n, name, how="average", then=None, folder=None, **extra):
    """Runs a case under a launcher: ``name`` may be several faults, each of which every rank survives."""
    words, fault = [*name.split("+"), "--how", how], name.split("+")[-1]
    limit, library = limit_of(fault, how), {"SYNCBN_TRANSPORT": "mpi" if launcher == "mpirun" else "torch"}
    if not then and not extra and fault not in GONE_AT_ONCE:  # how these end is the launcher's, which ends processes
        extra = warm.environment()
    return launched(launcher, new(folder), n, words, limit=limit, patience=60, then=then, **library, **extra)


def mpich():
    """The environment of MPICH's commands, if there are any."""
    folder = Path(os.environ.get("BIN_MPICH", ".venv-mpich/bin")).absolute()
    if not (folder / "mpirun").exists():
        pytest.skip("needs an environment with MPICH in BIN_MPICH")
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": folder / "python"}


LIKE_OTHERS = ["segfault", "exits_at_once", "exits", "no_memory", "checkpoint", "freezes", "average_of_a_number"]
LIKE_OTHERS += ["averages", "some_gradients", "backward_order"]  # as evaluates, swaps_other_width, skips_last
"""To a launcher and to MPI these are like another one."""
MPI_CASES = [("mpirun", 3, name, "average") for name in FAULTS if name not in [*ALIKE, *LIKE_OTHERS]]
MPI_CASES += [("mpirun", 3, "+".join(ALIKE), "average")]
MPI_CASES += [
    ("mpirun", 2, "kill", "average"),
    ("mpirun", 2, "evaluates", "average"),
    ("mpirun", 4, "sleep", "average"),
    ("mpirun", 2, "exception", "compiled"),
    ("mpirun", 2, "sleep", "compiled"),
]
MPI_CASES += [("mpich", 2, name, "average") for name in ("exception", "sleep", "evaluates")]
if os.environ.get("SYNCBN_TEST_FAULTS") == "all":  # a quarter of an hour
    AT_ONCE = ("kill", "segfault", "exits_at_once")
    MPI_CASES = [("mpirun", n, name, "average") for n in (2, 3, 4) for name in FAULTS]
    MPI_CASES += [("mpich", n, name, "average") for n in (2, 3, 4) for name in FAULTS if name not in AT_ONCE]
TORCHRUN_CASES = [("torchrun", 3, name, "average") for name in ("exception", "kill", "sleep")]


@pytest.fixture(scope="module")
def launched_jobs(request, tmp_path_factory):
    jobs, folder = Jobs(2), tmp_path_factory.mktemp("launched")

    def run(launcher, n, name, how):
        extra = mpich() if launcher == "mpich" else {}
        return under("mpirun" if extra else launcher, n, name, how, folder=folder, **extra)

    wanted = [item.callspec.params["case"] for item in request.session.items if "launched_jobs" in item.fixturenames]
    yield lambda case: jobs.begin_all((case, *wanted), run)[0].result()
    jobs.close()


@pytest.mark.faults
@pytest.mark.parametrize("case", [*MPI_CASES, *TORCHRUN_CASES], ids=lambda case: "-".join(map(str, case)))
def test_under_a_launcher(launched_jobs, case):
    _, n, name, how = case
    done = launched_jobs(case)
    *before, last = name.split("+")
    check(last, done, ranks=n, how=how, soon=SOON_LAUNCHED)
    for each in before:
        raised = [line for line in done.out.splitlines() if line.startswith(f"raised by {each}: ")]
        assert len(raised) == n, f"not every rank got the error of {each}\n{done}"
        for line in raised:
            assert re.search(pattern(FAULTS[each].says, 1), line), line
            assert FAULTS[each].call.split(" (call")[0] in line, line


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
@pytest.mark.parametrize("end", ["ctrl-c", "launcher killed"])
def test_the_end_of_the_launcher_ends_all_ranks(tmp_path, launcher, end):
    signals = {
        "ctrl-c": lambda launcher: os.killpg(launcher.pid, signal.SIGINT),
        "launcher killed": lambda launcher: launcher.kill(),
    }
    done = under(launcher, 2, "interrupted", then=signals[end], folder=tmp_path)
    assert GIVEN_UP not in done.statuses, done
    assert done.left == [], done
    assert done.statuses[0] != 0, done
    assert done.seconds < SOON_LAUNCHED + 5 * (launcher == "torchrun"), (
        f"launch/torchrun.sh gives ranks 5 s to end\n{done}"
    )
    assert done.err.count(END) == 0, f"nothing is to be found out\n{done}"


@pytest.mark.faults
def test_mpich_kills_all_ranks_at_once_where_one_is_killed(tmp_path):
    done = under("mpirun", 3, "kill", folder=tmp_path, **mpich())
    assert GIVEN_UP not in done.statuses, done
    assert done.seconds < SOON, done
    assert "BAD TERMINATION" in done.out + done.err, f"MPICH leaves no time for a report; it says what it did\n{done}"
    assert done.left == [], done
