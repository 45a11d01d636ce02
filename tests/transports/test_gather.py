# SPDX-License-Identifier: BSD-3-Clause
"""What ranks tell each other where their calls differ, in words, with a transport that holds what the others say."""

import pytest
import torch

from syncbn import moments
from syncbn.calls import sites
from syncbn.calls.sites import Site
from syncbn.moments import Message
from syncbn.transports import gather
from syncbn.transports.base import MismatchError
from syncbn.transports.single import SingleTransport

SETTINGS = (3, 1e-5, 0.1, True, None)


class Told:
    """Three ranks, ours the first; what the others say is given, and what is sent is kept."""

    rank, size, ranks, group_id, serial, layers, begun, current = 0, 3, (0, 2, 5), 9, 7, 0, 1, None

    def __init__(self, *others, wires=(), refuses=""):
        self.others, self.wires, self.refuses, self.sent = others, list(wires), refuses, []

    def all_reduce(self, wire):
        self.sent.append(wire.clone())
        if self.refuses:
            raise MismatchError(self.refuses)
        add = self.wires.pop(0) if self.wires else 2 * wire
        return wire.add_(add(wire) if callable(add) else add)

    def reduce(self, wire, message):
        return self.all_reduce(wire)

    def leave(self):
        self.left = True

    def exchange_notes(self, note):
        return [note, *self.others]


def of(name, direction=0, serial=7):
    return Message((1, 2, 3, 4), 2, f"'{name}'", direction, serial)


def notes(order=1, settings="eps=1e-05"):
    return lambda: (f"layer {order} of the group", settings)


def said(message, order=1, settings="eps=1e-05"):
    return "\n".join((str(message), *notes(order, settings)()))


def test_ranks_in_different_calls_are_named_with_their_calls():
    transport = Told(said(of("a")), said(of("b", 1)))
    error = gather.calls_differ(of("a"), notes(), transport)
    assert type(error) is ValueError
    assert str(error).startswith(
        "All ranks must be in one call; received forward of 'a' (call 7) on ranks 0, 2 and backward of 'b' (call 7) on "
        "rank 5. "
    )
    assert "Look for code that depends on the rank or on its data." in str(error)


def test_a_rank_that_is_silent_is_named_too():
    error = gather.calls_differ(of("a"), notes(), Told(said(of("a")), None))
    assert "forward of 'a' (call 7) on ranks 0, 2 and an unknown call: it sent no word on rank 5" in str(error)


def test_layers_of_one_name_are_told_apart_by_their_order():
    error = gather.calls_differ(of("a"), notes(1), Told(said(of("a"), 2), said(of("a"), 1)))
    assert "All ranks must call the same layer" in str(error)
    assert "(call 7), layer 1 of the group on ranks 0, 5" in str(error)
    assert "(call 7), layer 2 of the group on rank 2" in str(error)


def test_settings_that_changed_on_one_rank_are_named():
    error = gather.calls_differ(of("a"), notes(), Told(said(of("a"), settings="eps=0.001"), said(of("a"))))
    assert "the same settings of 'a'; received eps=1e-05 on ranks 0, 5 and eps=0.001 on rank 2. Change" in str(error)


def test_what_the_library_below_refuses_is_an_error_about_calls_with_its_words(capsys):
    """This rank says it at once, too: its launcher may end it while it waits for the others."""
    transport = Told(said(of("a")), said(of("a")), refuses="message truncated")
    with pytest.raises(ValueError, match=r"one call; received forward of 'a'.*The library below said: message trunc"):
        gather.all_reduce(torch.zeros(9), transport, of("a"), notes())
    assert capsys.readouterr().err == "syncbn: rank 0 was in forward of 'a' (call 7); message truncated\n"


def test_numbers_travel_in_a_message_that_says_what_they_are():
    transport = Told()
    values = torch.tensor([1.5, 2.0], dtype=torch.float64)
    assert gather.exchange(values, transport, "some numbers").tolist() == [4.5, 6.0]
    (wire,) = transport.sent
    numbers = moments.numbers(7, moments.text_hash("some numbers"), 0)
    assert wire.tolist() == [*moments.head(numbers), 1.5, 2.0]


def test_an_exchange_that_meets_another_is_an_error():
    other = moments.head(moments.numbers(7, moments.text_hash("other numbers"), 0))
    words = [str(Message((1, 2, 3, 4), 3, "other numbers", -1, 7)) + "\n\n"] * 2
    transport = Told(*words, wires=[2 * torch.tensor([*other, 0.0], dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"one call; received .*some numbers.* on rank 0 and .*other numbers.* on ran"):
        gather.exchange(torch.zeros(1, dtype=torch.float64), transport, "some numbers")


def rows(*others):
    """What two other ranks add to a table."""

    def add(wire):
        table = torch.zeros(3, (wire.numel() - moments.CALL) // 3, dtype=torch.float64)
        for rank, change in enumerate(others, 1):
            table[rank] = change(wire[moments.CALL :].view(table.shape)[0].clone())
        return torch.cat((2 * wire[: moments.CALL], table.view(-1)))

    return add


def same(row):
    return row


def with_eps(row):
    row[2] = 0.001
    return row


def test_a_layer_compares_name_and_settings_once_and_then_has_an_order():
    transport, site, other = Told(wires=[rows(same, same), rows(same, same)]), Site("SyncBatchNorm"), Site("other")
    for _ in range(2):
        sites.agree_once(site, SETTINGS, transport)
    assert [wire.numel() for wire in transport.sent] == [7 * 3 + 7]
    sites.agree_once(other, SETTINGS, transport)
    assert site.orders[9] == 1
    assert other.orders[9] == 2


def test_settings_that_differ_at_the_first_step_are_an_error_that_names_layer_and_ranks():
    site = Site("SyncBatchNorm")
    site.name = "stem.norm"
    with pytest.raises(
        ValueError, match=r"'stem.norm' needs the same eps on every rank; received .* on ranks 0, 5 and"
    ):
        sites.agree_once(site, SETTINGS, Told(wires=[rows(with_eps, same)]))
    assert site.orders == {0: 0}


def test_a_group_of_one_compares_nothing(monkeypatch):
    transport = SingleTransport()
    monkeypatch.setattr(transport, "all_reduce", lambda wire: pytest.fail("sent"))
    sites.agree_once(Site("SyncBatchNorm"), SETTINGS, transport)


def test_one_process_raises_its_own_error_with_its_rank():
    with pytest.raises(TypeError, match=r"^On rank 0: wrong$"):
        gather.raise_together(TypeError("wrong"), SingleTransport(), "a test")
    gather.raise_together(None, SingleTransport(), "a test")
