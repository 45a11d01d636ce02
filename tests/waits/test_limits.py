# SPDX-License-Identifier: BSD-3-Clause
"""How long a call may wait: what says so, and what is refused."""

import math
from datetime import timedelta

import pytest

import syncbn
from syncbn.transports import torch_dist
from syncbn.waits import limits
from tests import processes

GROUPS = """
import sys, torch, torch.distributed as dist, syncbn
from syncbn.transports import torch_dist
syncbn.init(torch_distributed=True, timeout=7)
groups = dist.group.WORLD, torch_dist.group_of_everyone("cpu")
sys.stdout.write(" ".join(str(g._get_backend(torch.device("cpu")).options._timeout) for g in groups))
"""


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch):
    monkeypatch.setattr(limits, "_given", [])
    monkeypatch.delenv(limits.TIMEOUT, raising=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 300.0), ("", 300.0), ("7", 7.0), (" 0.25 ", 0.25), ("1e3", 1000.0), ("inf", math.inf), ("1e999", math.inf)],
)
def test_the_variable_decides_else_the_default(monkeypatch, text, seconds):
    if text is not None:
        monkeypatch.setenv(limits.TIMEOUT, text)
    assert limits.limit() == seconds


@pytest.mark.parametrize("text", ["0", "-1", "abc", "nan", "-inf", "5 s", "0x5", " "])
def test_a_wrong_variable_is_refused_with_its_name_and_value(monkeypatch, text):
    monkeypatch.setenv(limits.TIMEOUT, text)
    with pytest.raises(ValueError, match="must be a number of seconds above 0, or inf") as raised:
        limits.limit()
    assert str(raised.value) == (
        f"SYNCBN_TIMEOUT must be a number of seconds above 0, or inf to wait without a limit; received {text!r}. "
        "Correct it or leave it out: the default is 300."
    )
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(("seconds", "expected"), [(5, 5.0), (0.1, 0.1), (math.inf, math.inf), (2**60, 2.0**60)])
def test_a_number_above_zero_is_taken(seconds, expected):
    got = limits.checked(seconds, "it")
    assert got == expected
    assert type(got) is float


@pytest.mark.parametrize(
    "seconds",
    [True, False, "5", b"5", [5], 1j, math.nan, 0, -0.0, -1, -math.inf, 10**400, 10**5000, object()],
    ids=lambda value: limits.shown(value, 9),
)
def test_what_is_no_number_above_zero_is_refused(seconds):
    with pytest.raises(ValueError, match=r"it must be a number of seconds above 0.*; received .*default is 300\."):
        limits.checked(seconds, "it")


class Silent:
    def __repr__(self):
        raise KeyError("no repr")


def test_a_value_whose_repr_raises_is_named_by_its_type():
    with pytest.raises(ValueError, match=r"received a value of type Silent\. Correct"):
        limits.checked(Silent(), "it")


def test_a_long_value_is_cut_in_the_error():
    with pytest.raises(ValueError, match="received 'x") as raised:
        limits.checked("x" * 10000, "it")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("timeout", [True, "5", math.nan, 0, -3, 10**400], ids=lambda value: repr(value)[:9])
def test_init_refuses_a_wrong_timeout_and_keeps_the_limit(timeout):
    limits.give(11.0)
    with pytest.raises(ValueError, match=r"syncbn\.init\(timeout\) must be a number of seconds above 0"):
        syncbn.init(timeout=timeout)
    assert limits.limit() == 11.0


def test_init_sets_the_limit_and_the_variable_is_the_default(monkeypatch):
    monkeypatch.setenv(limits.TIMEOUT, "17")
    syncbn.init(timeout=None)
    assert limits.limit() == 17.0
    syncbn.init(timeout=3)
    assert limits.limit() == 3.0


def test_init_refuses_a_wrong_variable_unless_it_is_given_a_timeout(monkeypatch):
    monkeypatch.setenv(limits.TIMEOUT, "soon")
    with pytest.raises(ValueError, match=r"SYNCBN_TIMEOUT must be a number .* received 'soon'"):
        syncbn.init()
    syncbn.init(timeout=5.0)
    assert limits.limit() == 5.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (10.4, "10 s"), (300, "300 s"), (math.inf, "without")]
)
def test_seconds_are_spoken_shortly(seconds, text):
    assert limits.spoken(seconds).startswith(text)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(7, 70.0), (0.5, 5.0), (math.inf, 365 * 86400.0), (limits.DEFAULT, None), (-1, None), ("x", None)],
)
def test_libraries_may_wait_for_ten_limits_if_one_was_given(given, wanted):
    found = limits.of_libraries(given)
    assert (None if found is None else found.total_seconds()) == wanted


def test_groups_of_torch_get_the_limit_that_was_given(monkeypatch):
    monkeypatch.setattr(limits, "_given", [7.0])
    assert limits.of_libraries() == timedelta(seconds=70)
    assert torch_dist.limit_of(None, "cpu") == timedelta(seconds=70)


def test_init_gives_its_limit_to_torch_distributed():
    done = processes.python("-c", GROUPS)
    assert done.stdout == "0:01:10 0:01:10", done.stdout + done.stderr
