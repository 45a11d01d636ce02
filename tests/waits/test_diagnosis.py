# SPDX-License-Identifier: BSD-3-Clause
"""Who waits for whom, from statuses made by hand."""

import math

import pytest

from syncbn.waits import diagnosis
from syncbn.waits.diagnosis import SURE, Member
from syncbn.waits.status import COMPILES, DEBUGGED, ENDED, FILES, Status, Wait
from tests.waits.members import GROUP, groups, inside, numbers, only, outside


def test_nobody_is_missed_before_a_wait_is_sure():
    members = [inside(0, SURE - 0.1), outside(1)]
    assert diagnosis.blocked(members, groups(2)) == []
    assert only(members, least=0.0).waited == SURE - 0.1


def test_all_outside_of_calls_wait_for_nobody():
    assert diagnosis.blocked([outside(0), outside(1, ended=ENDED)], groups(2)) == []
    assert diagnosis.blocked([Member(0, Status(0)), Member(1, Status(1))], groups(2)) == []


def test_the_longest_wait_comes_first_and_groups_are_apart():
    members = [inside(0, 2.0), outside(1), inside(2, 9.0, group=8), outside(3, group=8)]
    found = diagnosis.blocked(members, {GROUP: (0, 1), 8: (2, 3)})
    assert [(one.group, numbers(one.waiting), numbers(one.missing)) for one in found] == [
        (8, [2], [3]),
        (GROUP, [0], [1]),
    ]
    assert [one.group for one in diagnosis.blocked(members, {GROUP: (0, 1)})] == [GROUP]


def test_ranks_outside_of_a_group_are_not_missed():
    members = [outside(0, None, ended=ENDED), inside(1), inside(2)]
    assert numbers(only(members, {GROUP: (1, 2)}).missing) == []


@pytest.mark.parametrize(
    ("busy", "reason"),
    [
        ([DEBUGGED], DEBUGGED),
        ([COMPILES, COMPILES], COMPILES),
        ([COMPILES, None], None),
        ([None], None),
        ([COMPILES, DEBUGGED], DEBUGGED),
        ([FILES, COMPILES], COMPILES),
    ],
)
def test_who_keeps_others_waiting_may_be_excused(busy, reason):
    members = [inside(0), *[outside(1 + i, busy=each) for i, each in enumerate(busy)]]
    assert diagnosis.excused(only(members)) == reason
    assert diagnosis.is_unlimited(reason) == (reason == DEBUGGED)


def test_who_waits_elsewhere_for_one_that_is_excused_is_no_fault():
    elsewhere = Member(2, Status(2, waits=[Wait(8, 1, "World.average", None, 3.0)]))
    assert diagnosis.excused(only([inside(0), outside(1, busy=DEBUGGED), elsewhere])) == DEBUGGED
    assert diagnosis.excused(only([inside(0), outside(1), elsewhere])) is None
    assert diagnosis.excused(only([inside(0), elsewhere], {GROUP: (0, 2)})) is None


def test_the_limit_is_the_calls_own_or_the_least_of_any_rank():
    members = [inside(0), outside(1)]
    members[1].status.limit = 20.0
    assert diagnosis.limit_of(only(members), members) == 20.0
    assert diagnosis.limit_of(only([inside(0, patience=math.inf), outside(1)]), members) == math.inf
    of_two = [inside(0, patience=50.0), inside(1, patience=40.0), outside(2)]
    assert diagnosis.limit_of(only(of_two), members) == 40.0
    assert diagnosis.limit_of(only(members), []) == math.inf


def test_a_rank_that_is_being_terminated_is_not_missed():
    """The launcher ends all ranks since one has failed: they did nothing."""
    assert numbers(only([inside(0), outside(1, terminated=True), outside(2)]).missing) == [2]
