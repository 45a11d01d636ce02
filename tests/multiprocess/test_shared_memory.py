# SPDX-License-Identifier: BSD-3-Clause
"""Shared memory on every rank: how ranks come to it, what they do without it, and what disturbs it."""

import errno
import math
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch

import syncbn
from syncbn.transports import memory_file, shared_memory
from syncbn.transports.base import MismatchError
from syncbn.transports.shared_memory import on_one_host
from tests.conftest import DEVICE, TRANSPORT

pytestmark = [
    pytest.mark.ranks(2),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="for CPU tensors"),
    pytest.mark.skipif(bool(shared_memory.problem()), reason=shared_memory.problem()),
]


@pytest.fixture
def library(ranks):
    """What connects the ranks beside shared memory."""
    return getattr(ranks.transport, "host", ranks.transport)


@pytest.fixture
def shared(library):
    return on_one_host(library, "shm")


def last(ranks):
    return ranks.rank == ranks.size - 1


def total(transport, length=1):
    """Sums the ranks' numbers; the same on all."""
    wire = torch.full((length,), 1.0 + transport.rank, dtype=torch.float64)
    return transport.all_reduce(wire)


def in_step(ranks, transport):
    expected = ranks.size * (ranks.size + 1) / 2
    ranks.check_equal(total(transport, 3), torch.full((3,), expected, dtype=torch.float64))


def test_nothing_of_it_has_a_name_or_an_open_file(ranks, library):
    shared = on_one_host(library, "shm")
    in_step(ranks, shared)
    files = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
    ranks.check(not [name for name in files if "memfd:syncbn" in name], f"{files}")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:syncbn" in line]
    ranks.check(maps and all(line.endswith("(deleted)") for line in maps), f"{maps}")
    ranks.check(not [name for name in os.listdir("/dev/shm") if "syncbn" in name])


def test_its_pages_go_when_the_group_goes(ranks, library):
    def mapped():
        return Path("/proc/self/maps").read_text().count("memfd:syncbn")

    shared, before = on_one_host(library, "shm"), mapped()
    del shared
    ranks.check(mapped() == before - 1, f"{mapped()} of {before}")


def test_only_this_user_may_open_it():
    file = memory_file.create(4096)
    try:
        assert os.fstat(file).st_mode & 0o777 == 0o600
        with pytest.raises(PermissionError):
            os.ftruncate(file, 0)  # sealed: nobody can take the pages away from another rank
    finally:
        os.close(file)


def quiet(call):
    """Returns what a call returns, and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        made = call()
    return made, [str(each.message) for each in found]


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_no_memory_on_the_first_rank_is_a_warning_there_and_the_library_serves(ranks, library, monkeypatch):
    def full(size):
        raise FULL

    monkeypatch.setattr(memory_file, "create", full)
    made, said = quiet(lambda: on_one_host(library, "auto"))
    ranks.check(made is library)
    ranks.check(len(said) == (ranks.rank == 0), f"{said}")
    ranks.check(
        ranks.rank > 0 or "without shared memory: the first rank cannot make a memory file" in said[0], f"{said}"
    )
    in_step(ranks, library)
    error = ""
    try:
        on_one_host(library, "shm")
    except RuntimeError as refused:
        error = str(refused)
    ranks.check("SYNCBN_TRANSPORT=shm needs memory that all ranks of a group share" in error, error)
    ranks.check(("No space left" in error) == (ranks.rank == 0), error)


@pytest.mark.parametrize("why", ["refused", "another file", "another size"])
def test_a_rank_that_cannot_open_it_takes_all_back_to_the_library(ranks, library, monkeypatch, why):
    opens = memory_file.open_of

    def fails(pid, number, size):
        if not last(ranks):
            return opens(pid, number, size)
        if why == "refused":
            raise PermissionError(errno.EACCES, "Permission denied")
        if why == "another size":
            return opens(pid, number, size + 4096)
        return memory_file.create(size)  # its key is 0

    monkeypatch.setattr(memory_file, "open_of", fails)
    made, said = quiet(lambda: on_one_host(library, "auto"))
    ranks.check(made is library)
    ranks.check(len(said) == last(ranks), f"{said}")
    ranks.check(not last(ranks) or f"rank {ranks.rank} cannot open the memory of the first one" in said[0], f"{said}")
    in_step(ranks, library)


def test_ranks_of_several_hosts_go_through_the_library_without_a_word(ranks, library, monkeypatch):
    own = shared_memory.processes.own()
    monkeypatch.setattr(shared_memory.processes, "own", lambda: own._replace(host=own.host ^ last(ranks)))
    made, said = quiet(lambda: on_one_host(library, "auto"))
    ranks.check(made is library and not said, f"{said}")
    ranks.raises(RuntimeError, lambda: on_one_host(library, "shm"), "its ranks are on several hosts")


def test_without_a_compiler_on_one_rank_the_library_serves(ranks, library, monkeypatch):
    if last(ranks):
        monkeypatch.setattr(shared_memory, "problem", lambda: "the compiled transport is missing")
    made, said = quiet(lambda: on_one_host(library, "auto"))
    ranks.check(made is library and not said, f"{said}")


def differs(call):
    try:
        call()
    except MismatchError:
        return True
    return False


CALLS = {
    "length": lambda group, odd: group.all_reduce(torch.full((3 + odd,), 7.0, dtype=torch.float64)),
    "dtype": lambda group, odd: group.all_reduce(torch.full((4,), 7.0, dtype=[torch.float64, torch.float32][odd])),
    "kind": lambda group, odd: group.barrier() if odd else group.all_reduce(torch.zeros(4)),
    "a copy": lambda group, odd: (group.broadcast if odd else group.all_reduce)(torch.zeros(4)),
    "root": lambda group, odd: group.broadcast(torch.zeros(4), root=int(odd)),
    "pieces": lambda group, odd: group.broadcast(torch.zeros(900_000 + odd)),
}


@pytest.mark.parametrize("what", CALLS)
def test_different_calls_are_refused_on_all_ranks_and_all_are_in_step_again(ranks, shared, what):
    ranks.check(differs(lambda: CALLS[what](shared, last(ranks))), "every rank finds out")
    in_step(ranks, shared)


def test_no_number_of_another_call_is_read(ranks, shared):
    wire = torch.full((5 + last(ranks),), 7.0, dtype=torch.float64)
    ranks.check(differs(lambda: shared.all_reduce(wire)))
    ranks.check((wire == 7.0).all().item(), f"{wire}")


class InterruptedWaitError(Exception):
    """As KeyboardInterrupt, which would end the run of the tests."""


def interrupt(seconds):
    """Raises in the main thread after a while, whatever it waits in."""

    def stop(number, frame):
        raise InterruptedWaitError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def interrupted(call):
    try:
        call()
    except InterruptedWaitError:
        return True
    return False


def test_a_signal_ends_a_wait_and_the_next_call_is_right(ranks, shared):
    came = threading.Event()
    if last(ranks):
        came.wait(0.5)
        ok = total(shared).item() == math.comb(ranks.size + 1, 2)
    elif ranks.rank == 0:
        interrupt(0.15)
        ok = interrupted(lambda: total(shared))
    else:
        ok = total(shared).item() == math.comb(ranks.size + 1, 2)
    ranks.check(ok)
    in_step(ranks, shared)


def test_a_call_of_many_pieces_that_one_rank_has_left_is_refused_by_all(ranks, shared):
    """The next call of the same length would otherwise take its second piece for its first."""
    long = torch.full((1_000_000,), float(ranks.rank))
    if ranks.rank == 0:
        interrupt(0.15)
        ok = interrupted(lambda: shared.broadcast(long))
        ok = ok and differs(lambda: shared.broadcast(torch.full_like(long, 5.0)))
    else:
        threading.Event().wait(0.5 * last(ranks))
        ok = differs(lambda: shared.broadcast(long))
    ranks.check(ok)
    in_step(ranks, shared)


def test_a_forked_process_is_refused(ranks, shared):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            total(shared)
            os.write(write, b"it went on")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    said = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    ranks.check("received a call in a forked one" in said, said)
    in_step(ranks, shared)


def test_a_second_thread_is_refused(ranks, shared):
    said = []

    def second():
        try:
            shared.barrier()
        except RuntimeError as error:
            said.append(str(error))

    if ranks.rank == 0:
        other = threading.Timer(0.2, second)
        other.start()
        in_step_alone = total(shared).item()
        other.join()
        ranks.check(said == [] or "received one from another thread" in said[0], f"{said}")
    else:
        threading.Event().wait(0.5)
        in_step_alone = total(shared).item()
        ranks.check(True)
    ranks.check(in_step_alone == math.comb(ranks.size + 1, 2))


def test_a_slice_is_refused_before_a_call_begins(ranks, shared):
    with pytest.raises(ValueError, match="contiguous"):
        shared.all_reduce(torch.zeros(8, dtype=torch.float64)[::2])
    with pytest.raises(TypeError, match="float64 or float32"):
        shared.all_reduce(torch.zeros(8, dtype=torch.int64))
    in_step(ranks, shared)


def test_a_part_of_the_ranks_has_a_segment_of_its_own(ranks, shared):
    part = shared.split(ranks.rank % 2)
    ranks.check(part.size == 1 or part.name == "shm", part.name)
    ranks.check(total(part).item() == math.comb(part.size + 1, 2))
    in_step(ranks, shared)


def test_a_layer_and_the_world_use_it(ranks):
    ranks.check(syncbn.init(device="cpu").transport.name == ("shm" if TRANSPORT == "auto" else TRANSPORT))
