# SPDX-License-Identifier: BSD-3-Clause
"""Whose fault a wait is, from statuses made by hand."""

import copy

import pytest

from syncbn.waits import diagnosis, findings
from syncbn.waits.diagnosis import Member
from syncbn.waits.findings import STUCK
from syncbn.waits.processes import GONE, STOPPED
from syncbn.waits.ranks import ranks_of
from syncbn.waits.status import COMPILES, DEBUGGED, ENDED, FILES, Status, Wait
from tests.waits.members import CALL, GROUP, groups, inside, numbers, only, outside


def sentence_at_limit(*members):
    return findings.late(only(list(members))).sentence


def test_a_rank_that_has_not_come_is_missing():
    one = only([inside(0, 2.0), outside(1), inside(2, 3.0)])
    assert (numbers(one.waiting), numbers(one.missing), one.waited) == ([0, 2], [1], 3.0)
    assert (one.call, one.number, one.differ) == (CALL, 5, False)
    assert findings.early(one) is None
    found = findings.late(one)
    assert (found.kind, found.call, found.waiting, found.missing, found.waited) == ("limit", CALL, [0, 2], [1], 3.0)
    assert found.sentence == (
        f"Rank 1 is in no call of syncbn, at train.py:12 in main, while ranks 0, 2 wait in {CALL}."
    )
    assert "SYNCBN_TIMEOUT or syncbn.init(timeout=...)" in found.remedy


def test_several_ranks_are_missing():
    sentence = sentence_at_limit(inside(0), outside(1), outside(2, None), outside(3))
    assert sentence.startswith("Ranks 1-3 are in no call of syncbn, at train.py:12 in main, while rank 0 waits in ")


@pytest.mark.parametrize(
    ("gone", "sentence", "remedy"),
    [
        (outside(1, ended=ENDED), "Rank 1 came to the end of the program after backward 4 of 'bn1', while", "join"),
        (outside(1, None, ended=ENDED), "Rank 1 came to the end of the program, while", "syncbn.join"),
        (outside(1, ended="ended with ValueError: no"), "Rank 1 ended with ValueError: no after backward", "Mend that"),
        (outside(1, state=GONE), "The process of rank 1 is gone, while ranks 0, 2 wait in forward 5", "kill -9"),
    ],
    ids=["ended", "ended at once", "exception", "gone"],
)  # fmt: skip
def test_a_rank_that_has_ended_is_missed_at_once(gone, sentence, remedy):
    one = only([inside(0), gone, inside(2)])
    found = findings.early(one)
    assert (found.kind, found.missing) == ("ended", [1])
    assert found.sentence.startswith(sentence)
    assert found.sentence.endswith(f"ranks 0, 2 wait in {CALL}.")
    assert remedy in found.remedy


def test_several_that_have_ended_are_named_together():
    members = [inside(0), outside(1, ended=ENDED), outside(2, ended=ENDED), outside(3)]
    assert findings.early(only(members)).sentence.startswith("Ranks 1, 2 came to the end of the program after")


def test_processes_that_are_gone_are_named_with_their_hosts():
    members = [inside(0), *(outside(rank, state=GONE) for rank in (1, 2, 3))]
    assert findings.early(only(members)).sentence.startswith("The processes of ranks 1-3 are gone, while rank 0 waits")
    for member, host in zip(members, ("h1", "h1", "h2", "h2"), strict=True):
        member.host = host
    sentence = findings.early(only(members)).sentence
    assert sentence.startswith("The processes of rank 1 on h1 and ranks 2, 3 on h2 are gone, while rank 0 on h1 waits")


def test_an_exception_is_named_before_those_that_ended_since():
    members = [inside(0), outside(1, ended=ENDED), outside(2, state=GONE), outside(3, ended="ended with KeyError: 3")]
    assert findings.early(only(members)).sentence.startswith("Rank 3 ended with KeyError: 3 after")
    assert findings.early(only(members[:3])).sentence.startswith("Rank 1 came to the end")


def test_a_rank_that_ended_since_another_one_had_ended_is_not_the_cause():
    """On its own host it knew at once, and raised; the other hosts wait."""
    follows = outside(2, ended="ended with RankEndedError: The process of rank 3 is gone, while rank 2 waits for it")
    members = [inside(0), inside(1), follows, outside(3, state=GONE)]
    found = findings.early(only(members))
    assert found.sentence.startswith("The process of rank 3 is gone, while ranks 0, 1 wait in ")
    assert "kill -9" in found.remedy
    assert findings.early(only(members[:3])).sentence.startswith("Rank 2 ended with RankEndedError: The process of")


def test_a_rank_that_ended_inside_the_call_does_not_wait():
    """Its process is gone while its last word was that it is in the call."""
    gone = inside(1)
    gone.state = GONE
    found = findings.early(only([inside(0), gone]))
    assert (found.kind, found.waiting, found.missing) == ("ended", [0], [1])


def test_a_rank_that_has_completed_the_call_and_ended_is_not_missed():
    members = [inside(0), outside(1, 5, ended=ENDED), outside(2)]
    one = only(members)
    assert numbers(one.missing) == [2]
    assert findings.early(one) is None


def test_a_rank_ahead_waits_for_those_behind():
    one = only([inside(0, call="forward 6", number=6), inside(1), inside(2)])
    assert (numbers(one.waiting), numbers(one.missing), one.number) == ([0], [1, 2], 6)
    assert findings.early(one) is None
    assert findings.late(one).sentence == f"Ranks 1, 2 are in {CALL}, behind by 1, while rank 0 waits in forward 6."


def test_ranks_in_different_calls_wait_for_each_other():
    members = [inside(0, STUCK), inside(1, STUCK, call="forward 5 of 'bn2'"), inside(2, STUCK)]
    found = findings.early(only(members))
    assert (found.kind, found.waiting, found.missing) == ("order", [0, 1, 2], [])
    assert found.sentence == (
        f"Ranks wait for each other in different calls: {CALL} on ranks 0, 2 and forward 5 of 'bn2' on rank 1."
    )
    younger = [inside(0, STUCK - 0.1), inside(1, 0.5, call="forward 5 of 'bn2'")]
    assert findings.early(only(younger)) is None, "it may be on the way"


def asking(member, call=CALL):
    """The same rank after an error in the call: it asks the others which one they are in."""
    member.status.waits[0].failed = call
    return member


def test_a_rank_that_waits_where_another_one_has_failed_gets_no_answer():
    other = asking(outside(1, 5, completed="forward 5 of 'bn2'"), "forward 5 of 'bn2'")
    found = findings.early(only([asking(inside(0, 9.0)), other, inside(2, STUCK)]))
    assert (found.kind, found.waiting, found.missing) == ("order", [0, 2], [1])
    assert found.sentence == (
        f"Ranks are in different calls: {CALL} on ranks 0, 2, and an error in forward 5 of 'bn2' on rank 1."
    )


def test_ranks_that_ask_each_other_wait_for_a_slow_one():
    other = asking(outside(1, 5), "forward 5 of 'bn2'")
    assert findings.early(only([asking(inside(0, 9.0)), other, outside(2)])) is None
    assert findings.early(only([asking(inside(0, 9.0)), other, inside(2, STUCK - 0.1)])) is None, "it has just come"


def test_different_calls_are_no_finding_while_a_rank_has_not_come():
    one = only([inside(0, 9.0), inside(1, 9.0, call="forward 5 of 'bn2'"), outside(2)])
    assert not one.differ
    assert findings.early(one) is None


@pytest.mark.parametrize(
    ("first", "singular", "plural"),
    [
        (outside(1, state=STOPPED), "Rank 1 is stopped by a sig", "Ranks 1, 2 are stopped by a sig"),
        (
            outside(1, silent=True),
            "Rank 1 is without a sign of life, while",
            "Ranks 1, 2 are without a sign of life, while",
        ),
        (
            outside(1, evaluates=["'a'", "'b'", "'c'", "'d'"]),
            "Rank 1 is in eval mode, or froze layers ('a', 'b', 'c', ...), while",
            "Ranks 1, 2 are in eval mode, or froze layers ('a', 'b', 'c', ...), while",
        ),
        (outside(1, busy=COMPILES), "Rank 1 is compiling, while", "Ranks 1, 2 are compiling, while"),
        (outside(1, busy=FILES), "Rank 1 is saving or load", "Ranks 1, 2 are saving or load"),
        (outside(1, busy=DEBUGGED), "Rank 1 is under a deb", "Ranks 1, 2 are under a deb"),
    ],
    ids=["stopped", "silent", "eval", "compiles", "file", "debugger"],
)  # fmt: skip
def test_at_the_limit_the_pattern_is_named(first, singular, plural):
    second = copy.deepcopy(first)
    second.rank = second.status.rank = 2

    def said(*missing):
        waiting = [inside(0), inside(3)]
        return findings.late(diagnosis.Blocked(GROUP, 5, CALL, waiting, list(missing))).sentence

    assert said(first).startswith(singular)
    assert said(first, second).startswith(plural)
    assert said(first).endswith(f"while ranks 0, 3 wait in {CALL}.")


def test_the_ranks_that_a_pattern_names_are_those_that_show_it():
    waits = f"while rank 0 waits in {CALL}."
    other = outside(1)
    assert sentence_at_limit(inside(0), other, outside(2, state=STOPPED)) == f"Rank 2 is stopped by a signal, {waits}"
    silent = outside(2, silent=True)
    assert sentence_at_limit(inside(0), other, silent) == f"Rank 2 is without a sign of life, {waits}"
    assert sentence_at_limit(inside(0), other, outside(2, evaluates=["'a'"])).startswith("Rank 2 is in eval mode")
    assert sentence_at_limit(inside(0), outside(1, busy=FILES), outside(2, busy=COMPILES)).startswith(
        "Rank 1 is saving"
    )
    other.status.line = ("data.py", 3, "load")
    assert sentence_at_limit(inside(0), other, outside(2)) == f"Ranks 1, 2 are in no call of syncbn, {waits}"


def test_a_rank_in_another_group_is_named_with_that():
    other = Wait(8, 2, "World.barrier", None, 3.0)
    there = Member(1, Status(1, waits=[Wait(GROUP, 4, None, None), other]))
    found = diagnosis.blocked([inside(0, 5.0), there], {**groups(2), 8: (0, 1)})
    assert [each.group for each in found] == [GROUP, 8]
    one = found[0]
    assert findings.late(one).sentence == (
        f"Rank 1 is in World.barrier of another group, while rank 0 waits in {CALL}."
    )


def test_a_rank_that_is_in_no_call_is_named_before_one_that_waits_elsewhere():
    elsewhere = Member(1, Status(1, waits=[Wait(8, 1, "World.average", None, 3.0)]))
    assert sentence_at_limit(inside(0), elsewhere, outside(2)).startswith("Rank 2 is in no call of syncbn")


def test_those_that_are_being_terminated_wait_if_nobody_else_does():
    one = only([inside(0, terminated=True), outside(1, ended="ended with KeyError: 3")])
    assert numbers(one.waiting) == [0]
    assert findings.early(one).sentence.startswith("Rank 1 ended with KeyError")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([1], "1"),
        ([1, 0], "0, 1"),
        ([0, 1, 2], "0-2"),
        ([0, *range(2, 64)], "0, 2-63"),
        ([0, 1, 3, 4, 6], "0, 1, 3, 4, 6"),
        ([0, 1, 2, 5, 7, 8, 9], "0-2, 5, 7-9"),
        ([], ""),
        (range(0, 4096, 2), f"{', '.join(map(str, range(0, 60, 2)))} and 2018 more"),
    ],
)
def test_ranks_are_named_shortly(ranks, text):
    assert ranks_of(ranks) == text
