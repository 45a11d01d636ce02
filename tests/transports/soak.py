# SPDX-License-Identifier: BSD-3-Clause
"""Exchanges of random lengths with random delays, each compared with the exact sum. Under any launcher, for example

NPROC=4 launch/torchrun.sh tests/transports/soak.py --exchanges 1000000

Threads of every rank keep it busy meanwhile. --endless goes on until a rank has ended, and prints when it was noticed.
"""

import argparse
import sys
import threading
import time

import torch

import syncbn
from syncbn.transports import dispatch
from syncbn.transports.shared_memory import RankEndedError

LONGEST, BASE = 100_000, 131_072
"""Doubles of the longest exchange, which takes several pieces, and of those that all exchanges take theirs from."""


class Soak:
    """What all ranks draw alike, and each one's own delays."""

    def __init__(self, transport, seed):
        self.transport = transport
        numbers = torch.Generator().manual_seed(seed)
        shape = (transport.size, BASE)
        self.parts = torch.randint(-(2**30), 2**30, shape, generator=numbers).double()  # any sum of these is exact
        self.sums, self.common = self.parts.sum(0), numbers
        self.own = torch.Generator().manual_seed(seed + 1 + transport.rank)

    def block(self, count):
        """Runs some exchanges. Returns how many were not exact."""
        few, many = torch.rand(count, generator=self.common), torch.rand(count, generator=self.common)
        lengths = torch.where(few < 0.002, many * LONGEST, torch.where(few < 0.1, many * 5000, many * 600)).long() + 1
        starts = (torch.rand(count, generator=self.common) * (BASE - lengths)).long()
        delays = torch.rand(count, generator=self.own).tolist()
        mine, wrong = self.parts[self.transport.rank], 0
        for length, start, delay in zip(lengths.tolist(), starts.tolist(), delays, strict=True):
            if delay < 0.002:  # from not at all to longer than anybody spins or yields
                time.sleep(delay / 2)
            wire = mine[start : start + length].clone()
            self.transport.all_reduce(wire)
            wrong += not torch.equal(wire, self.sums[start : start + length])
        return wrong


def keep_busy(ends):
    """What else a process does: numbers without Python's lock, and Python."""
    a = torch.randn(64, 64)
    while not ends.is_set():
        a = (a @ a).clamp(-1, 1)
        time.sleep(0.002)


def main(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--exchanges", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endless", action="store_true")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    syncbn.init()
    transport, ends = dispatch.choose(None), threading.Event()
    soak, began, done, wrong = Soak(transport, options.seed), time.perf_counter(), 0, 0
    threading.Thread(target=keep_busy, args=(ends,), daemon=True).start()
    sys.stdout.write(f"begun {time.time()}\n")
    sys.stdout.flush()
    try:
        while options.endless or done < options.exchanges:
            wrong, done = wrong + soak.block(min(2000, options.exchanges)), done + min(2000, options.exchanges)
    except RankEndedError as error:
        sys.stdout.write(f"noticed {time.time()} after {done} exchanges, {wrong} of them wrong: {error}\n")
        raise SystemExit(3) from None
    finally:
        ends.set()
    seconds = time.perf_counter() - began
    sys.stdout.write(
        f"rank {transport.rank} of {transport.size} over {transport.name}: {done - wrong} of {done} exchanges exact, "
        f"{seconds / done * 1e6:.1f} us each\n"
    )
    assert wrong == 0


if __name__ == "__main__":
    main(sys.argv[1:])
