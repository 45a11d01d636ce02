# SPDX-License-Identifier: BSD-3-Clause
"""Tests that run on every rank at once. No rank asserts alone, and none outlives another."""

import os
import re
import sys
import time

import pytest
import torch

import syncbn
from syncbn.transports import gather, launchers
from syncbn.world import rendezvous
from tests.conftest import DEFERRED_ERRORS, DEVICE


class AgreedError(AssertionError):
    """Raised on every rank, so the next test still finds all ranks in step."""


class Ranks:
    """The ranks of this run, and how they agree on the result of a check."""

    def __init__(self, world):
        self.world, self.rank, self.size, self.transport = world, world.rank, world.size, world.transport

    @property
    def library(self):
        """The library that connects the ranks: "mpi" or "torch", also where they exchange through shared memory."""
        return getattr(self.transport.spec, "kind", "single")

    def check(self, ok, detail=""):
        """Asserts on every rank that ``ok`` holds on every rank. Collective."""
        failed = torch.tensor([float(not ok)], dtype=torch.float64, device="cpu")
        if gather.exchange(failed, self.transport, "the check of a test").item():
            notes = gather.gather_notes("" if ok else f"rank {self.rank}: failed {detail}"[:900], self.transport)
            raise AgreedError("\n".join(note for note in notes if note))

    def check_equal(self, actual, expected, detail=""):
        """Asserts on every rank that two tensors have the same bits, NaN included, on every rank. Collective."""
        ok = actual.shape == expected.shape and actual.dtype == expected.dtype
        ok = ok and torch.equal(actual.nan_to_num(nan=1234.5), expected.nan_to_num(nan=1234.5))
        gap = "" if ok or actual.shape != expected.shape else f"differs by {(actual - expected).abs().max():.3g}"
        self.check(ok, f"{detail} {gap}")

    def check_close(self, actual, expected, tolerance, detail=""):
        """Asserts on every rank that two tensors differ by at most ``tolerance``, absolutely. Collective."""
        gap = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
        ok = actual.shape == expected.shape and gap <= tolerance
        self.check(ok, f"{detail}: {gap:.3g} > {tolerance:.3g}, {tuple(actual.shape)}, {tuple(expected.shape)}")

    def raises(self, kind, call, *parts):
        """Asserts that ``call`` raises the same ``kind`` of error, with ``parts`` in its text, on every rank."""
        raised = None
        try:
            call()
        except Exception as error:  # of any kind: raised further on one rank, it would end this run
            raised = error
        text = f"{type(raised).__name__}: {raised}" if raised else "nothing was raised"
        texts = gather.gather_notes(text, self.transport)
        if DEFERRED_ERRORS:  # nobody asks the others: where all are wrong, each names itself
            texts = [re.sub(r"On rank \d+: ", "", t) for t in texts]
        self.check(all(t == texts[0] for t in texts), f"the ranks raised different things: {texts}")
        self.check(isinstance(raised, kind), f"needs {kind.__name__}, got {text}")
        self.check(all(part in text for part in parts), f"{parts} not in {text!r}")

    def shares(self, sizes=None, total=None):
        """Row slices of a global batch: (start, stop) of every rank, for given share sizes or an even split."""
        sizes = sizes or [total // self.size + (r < total % self.size) for r in range(self.size)]
        starts = [sum(sizes[:r]) for r in range(self.size)]
        return [slice(a, a + s) for a, s in zip(starts, sizes, strict=True)]


@pytest.fixture(scope="session")
def ranks():
    """Every rank of this run, connected by the transport that the launcher gives."""
    if DEVICE.type == "cuda":  # one GPU for all, also where CUDA_VISIBLE_DEVICES looks as if each had its own
        rendezvous.shares_gpus = lambda launch: True
    world = syncbn.init(device=DEVICE)
    world.average_gradients(torch.nn.ReLU())  # the first call compares parameters; later models may differ in a test
    return Ranks(world)


@pytest.fixture(autouse=DEFERRED_ERRORS)
def _nothing_left(ranks):
    """A deferred error that a test leaves in its GPU is an error of that test, not of the next."""
    yield
    left = ""
    try:
        ranks.world.check()
    except (ValueError, TypeError) as error:
        left = str(error)
    ranks.check(not left, left)


@pytest.fixture
def torch_world(ranks):
    """torch.distributed over gloo, also under mpirun, for what needs DDP; gone again after the test."""
    under_torchrun = not launchers.detect().speaks_mpi
    world = syncbn.init(torch_distributed=True, device=DEVICE)
    yield world
    if not under_torchrun:
        ranks.world.barrier()
        torch.distributed.destroy_process_group()


@pytest.fixture
def world(ranks):
    """Made now: tests before this one may have connected everyone anew."""
    return syncbn.init(device=DEVICE)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Ends every process when one rank fails alone: the others would wait for it in their next collective."""
    outcome = yield
    report = outcome.get_result()
    alone = report.failed and call.excinfo is not None and not call.excinfo.errisinstance(AgreedError)
    launch = launchers.detect()
    if alone and launch.size > 1:
        sys.__stderr__.write(f"\nrank {launch.rank} failed alone in {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        time.sleep(1)  # MPICH's mpirun ends at once, without what it has not read yet
        if launch.speaks_mpi:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)
        os._exit(1)
