# SPDX-License-Identifier: BSD-3-Clause
"""What a rank says of itself."""

import gc
import math
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import syncbn
from syncbn.calls import sites
from syncbn.moments import ABSTAINS, Message
from syncbn.waits.status import COMPILES, ENDED, Reader, Status, Wait, of_exception

HERE = "tests/waits/test_status.py"


class Group:
    """A transport, as far as the reader looks."""

    def __init__(self, group_id=7, ranks=(0, 1)):
        self.group_id, self.ranks = group_id, ranks
        self.begun, self.current, self.completed, self.patience = 0, None, None, None
        self.failed = self.recent = None

    def enter(self, what, patience=None):
        self.begun += 1
        self.current, self.patience = Message(ABSTAINS, 2, what, -1, self.begun), patience

    def leave(self):
        self.completed, self.current, self.patience = self.current, None, None


def read(reader, seconds=0.5):
    return reader.read(seconds, 30.0)


def the_wait(reader, seconds=0.5):
    (wait,) = read(reader, seconds).waits
    return wait


@pytest.fixture
def group():
    return Group()


@pytest.fixture
def reader(group):
    made = Reader(3)
    made.add(group)
    return made


def test_a_group_without_a_call_is_not_told(reader):
    said = read(reader)
    assert (said.rank, said.limit, said.waits, said.ended) == (3, 30.0, [], None)


def test_the_calls_of_a_group_are_told(reader, group):
    group.enter("World.barrier", math.inf)
    wait = the_wait(reader)
    assert (wait.group, wait.begun, wait.current, wait.completed) == (7, 1, str(group.current), None)
    assert (wait.patience, wait.done) == (math.inf, 0)
    assert "World.barrier" in wait.current
    group.leave()
    wait = the_wait(reader)
    assert (wait.current, wait.done, wait.patience) == (None, 1, None)
    assert "World.barrier" in wait.completed


def test_a_wait_grows_only_while_the_same_call_lasts(reader, group):
    group.enter("World.average")
    assert the_wait(reader, 5.0).waited == 0.0  # it may have begun a moment ago
    assert the_wait(reader, 0.5).waited == 0.5
    assert the_wait(reader, 0.25).waited == 0.75
    group.leave()
    assert the_wait(reader).waited == 0.0
    group.enter("World.average")
    assert the_wait(reader).waited == 0.0
    assert the_wait(reader).waited == 0.5
    group.leave()
    group.enter("World.average")  # between two readings: the same name, another call
    assert the_wait(reader).waited == 0.0


def test_every_reading_has_a_beat_of_its_own(reader):
    assert [read(reader).beat for _ in range(3)] == [1, 2, 3]


def test_a_group_that_is_gone_is_told_no_more(reader, group):
    other = Group(8)
    reader.add(other)
    other.enter("World.average")
    assert [wait.group for wait in read(reader).waits] == [8]
    del other
    gc.collect()
    assert read(reader).waits == []
    assert reader.groups() == [group]


def test_a_status_survives_the_way_as_text():
    said = Status(
        3, 4, math.inf, [Wait(2**62, 5, "a\nb", None, 1.5, math.inf), Wait(1, 1, None, "é", 0.0, None)],
        ("a.py", 3, "f"), COMPILES, "a library", ["'bn'"], ENDED, True, {2: "gone"},
    )  # fmt: skip
    assert "\n" not in said.text()
    assert Status.of_text(said.text()) == said
    assert Status.of_text(Status(0).text()) == Status(0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no\n  such   file"), "ended with ValueError: no such file"),
        (KeyboardInterrupt(), "ended with KeyboardInterrupt"),
        (RuntimeError("x" * 9999), "ended with RuntimeError: " + "x" * 500),
    ],
)
def test_an_exception_is_a_line(error, text):
    assert of_exception(error) == text


def test_layers_in_eval_mode_are_told_once_they_have_been_in_a_call(reader, group):
    layer = syncbn.name_layers(nn.Sequential(syncbn.SyncBatchNorm(3)))
    layer(torch.randn(4, 3))
    layer.eval()
    assert "'0'" not in read(reader).evaluates  # its group is this process alone
    sites.site_of(layer[0]).module = weakref.ref(layer[0])  # as its first call in a group of several does
    layer.train()
    assert "'0'" not in read(reader).evaluates
    layer.eval()
    assert "'0'" in read(reader).evaluates
    del layer
    gc.collect()
    assert "'0'" not in read(reader).evaluates


def test_layers_may_be_made_while_another_thread_reads():
    ends, errors, interval = threading.Event(), [], sys.getswitchinterval()

    def reads():
        try:
            while not ends.is_set():
                sites.in_eval_mode()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=reads)
    kept = [sites.Site("SyncBatchNorm") for _ in range(300)]
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(300):
            kept.append(sites.Site("SyncBatchNorm"))
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors


def test_the_main_thread_is_read_from_another_one(reader):
    said = []
    thread = threading.Thread(target=lambda: said.append(read(reader)))
    thread.start()
    thread.join()  # the innermost frame is the library's
    here = sys._getframe().f_lineno
    file, line, function = said[0].line
    assert (file, function) == (HERE, "test_the_main_thread_is_read_from_another_one")
    assert line in (here - 2, here - 1)
