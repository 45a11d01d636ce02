# SPDX-License-Identifier: BSD-3-Clause
"""Many exchanges through shared memory, and kills at random moments. By hand there are more:

SYNCBN_TEST_KILLS=200 python -m pytest -n 0 -m faults tests/transports/test_soak.py
"""

import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from syncbn.transports import shared_memory
from tests import warm
from tests.waits.jobs import GIVEN_UP, Nest

pytestmark = pytest.mark.skipif(bool(shared_memory.problem()), reason=shared_memory.problem())
KILLS = int(os.environ.get("SYNCBN_TEST_KILLS", "12"))
NOTICED = 1.0
"""Seconds in which a rank that waits notices that another one is gone."""


@pytest.mark.program
@pytest.mark.parametrize(("start", "ranks"), [(warm.mpirun, 2), (warm.torchrun, 8)])
def test_every_exchange_is_exact(start, ranks):
    done = start(ranks, "tests/transports/soak.py", "--exchanges", 10_000 if ranks < 8 else 1_000)
    assert done.returncode == 0, done.stderr
    exact = re.findall(r"over shm: (\d+) of \1 exchanges exact", done.stdout)
    assert len(exact) == ranks, done.stdout


class Kill:
    """Kills one rank, or all but one, or all, at a random moment after all have begun."""

    def __init__(self, seed, ranks):
        self.random, self.ranks, self.at = random.Random(seed), ranks, None
        self.victims = self.random.sample(range(ranks), self.random.choice([1, 1, 1, ranks - 1, ranks]))

    def __call__(self, folder, pids):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            said = [path.read_text() for path in folder.glob("out.*")]
            if len(said) == self.ranks and all("begun" in text for text in said):
                break
            time.sleep(0.02)
        time.sleep(self.random.random() * 0.3)
        for rank in self.victims:
            os.kill(pids[rank], signal.SIGKILL)
        self.at = time.time()


@pytest.mark.faults
def test_after_a_kill_nobody_waits_for_a_second_and_nothing_is_left(tmp_path):
    nest = Nest()

    def run(seed):
        ranks, folder = 2 + seed % 3, tmp_path / str(seed)
        folder.mkdir()
        kill = Kill(seed, ranks)
        words = ["soak", "--endless", "--seed", str(seed)]
        return kill, nest.run(folder, ranks, words, limit=100, patience=60, then=kill)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(KILLS)))
    nest.close()
    late = []
    for kill, done in found:
        assert GIVEN_UP not in done.statuses, done
        others = [rank for rank in range(kill.ranks) if rank not in kill.victims]
        assert [done.statuses[rank] for rank in kill.victims] == [-9] * len(kill.victims), done
        assert [done.statuses[rank] for rank in others] == [3] * len(others), done
        said = re.findall(r"noticed ([\d.]+) after \d+ exchanges, 0 of them wrong: (.*)", done.out)
        assert len(said) == len(others), done
        for noticed, text in said:
            late.append(float(noticed) - kill.at)
            assert re.match(r"(The process of rank|Rank) \d+", text), text
    print(f"\n{KILLS} kills: noticed after {sorted(late)[len(late) // 2]:.2f} s, at most {max(late):.2f} s")  # noqa: T201
    assert max(late) < NOTICED
    assert not [name for name in os.listdir("/dev/shm") if "syncbn" in name]
