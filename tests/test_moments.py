# SPDX-License-Identifier: BSD-3-Clause
"""The wire form: additive, led by the identity of the call, of one size and dtype, and never NaN."""

import itertools

import pytest
import torch

from syncbn import moments
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import ABSTAINS, LIMIT, Counters, Message, Running, Status

EPS = 1e-5
NUMBERS = (1, 7, LIMIT - 1, 3)
MOST_RANKS = 2**16
GOOD = Status(0.0, 2.0, 2.0, 0.0, 0.0, 2.0, 0.0)
"""Of two ranks."""


def wire_of(x, status=Status(), numbers=NUMBERS):  # noqa: B008 - a NamedTuple of zeros is immutable
    return TorchKernels().local_moments(x, None, numbers, status)


def wire_with(count, mean, var):
    """A reduced wire that finalizes to these numbers, of one channel."""
    sums = torch.tensor([mean * count, (var + mean * mean) * count], dtype=torch.float64)
    return moments.pack(NUMBERS, count, *sums.split(1), Status())


def test_count_and_sums_are_views_of_what_was_packed():
    packed = torch.arange(6, dtype=torch.float64)
    wire = moments.pack(NUMBERS, 4.0, packed[:3], packed[3:], Status(float32=1.0))
    assert moments.count(wire).item() == 4.0
    assert torch.equal(moments.sums(wire), packed)
    moments.sums(wire).zero_()
    moments.count(wire).zero_()
    assert not wire[moments.CALL : -len(Status._fields)].any()


def test_pack_takes_a_count_and_a_fault_that_no_host_has_read():
    sums = torch.arange(6, dtype=torch.float64)
    status = Status(1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    known = moments.pack(NUMBERS, 2.5, sums[:3], sums[3:], status)
    unread = status._replace(faults=torch.ones((), dtype=torch.float64))
    assert torch.equal(moments.pack(NUMBERS, torch.tensor(2.5, dtype=torch.float64), sums[:3], sums[3:], unread), known)


@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_size_and_dtype_of_the_wire_depend_on_c_alone(dtype, n):
    wire = wire_of(torch.ones(n, 3, 2, dtype=dtype))
    assert wire.shape == (2 * 3 + 15,)
    assert wire.dtype == torch.float64


@pytest.mark.parametrize("C", [0, 1, 3, 2048])
def test_lengths_and_channels_belong_together(C):
    assert moments.wire_length(C) == 2 * C + 15
    assert moments.sums_length(C) == 2 * C + 7
    assert moments.channels(torch.zeros(moments.wire_length(C))) == C


def test_the_call_comes_first_and_is_read_where_a_longer_wire_was_cut_short():
    wire = wire_of(torch.randn(4, 3))
    assert wire[: moments.CALL].tolist() == [*NUMBERS, *(v * v for v in NUMBERS[1:])]
    assert same_call(wire, NUMBERS)
    for slot in (1, 2, 3):
        other = list(NUMBERS)
        other[slot] -= 1
        assert not same_call(wire, tuple(other))


def test_wires_of_local_batches_add_up_to_the_wire_of_the_whole():
    x = torch.randn(9, 4, 5)
    parts = sum(wire_of(part) for part in x.split([0, 1, 5, 3]))
    torch.testing.assert_close(parts[moments.CALL :], wire_of(x)[moments.CALL :], rtol=1e-15, atol=1e-13)
    assert same_call(parts, NUMBERS)


def same_call(wire, numbers):
    return moments.same_call(wire[: moments.CALL].tolist(), numbers)


def summed(*ranks):
    """The call slots of some ranks, added up."""
    return sum(torch.tensor(moments.head(numbers), dtype=torch.float64) for numbers in ranks)


@pytest.mark.parametrize("value", [0, 1, LIMIT // 2 + 1, LIMIT - 1])
def test_same_call_is_exact_at_the_most_ranks(value):
    """Ranks add up one after another, which would round at once where a sum is not exact."""
    numbers = (1, value, value, value)
    wire = summed(numbers).repeat(MOST_RANKS, 1).cumsum(0)[-1]
    assert wire.tolist() == [float(MOST_RANKS * v) for v in moments.head(numbers)]
    assert same_call(wire, numbers)
    assert same_call(wire, ABSTAINS)


@pytest.mark.parametrize("slot", [1, 2, 3])
@pytest.mark.parametrize("value", [0, 1, 12345, LIMIT - 2, LIMIT - 1])
def test_every_change_of_one_rank_among_the_most_is_found_by_all(value, slot):
    numbers = (1, value, value, value)
    right = summed(numbers) * MOST_RANKS
    every = torch.arange(LIMIT, dtype=torch.float64)
    wires = (right - summed(numbers)).repeat(LIMIT, 1)
    for i in (1, 2, 3):
        own = every if i == slot else torch.full_like(every, value)
        wires[:, i] += own
        wires[:, 3 + i] += own * own
    wires[:, 0] += 1
    assert (wires == right).all(1).nonzero().flatten().tolist() == [value]  # as same_call compares one wire
    for odd in {0, 1, value - 1, value + 1, LIMIT - 1} & set(range(LIMIT)):
        its = tuple(odd if i == slot else numbers[i] for i in range(4))
        for own in (numbers, its, ABSTAINS):
            assert same_call(wires[odd], own) == (odd == value)


def test_calls_of_few_ranks_are_one_exactly_if_they_are_equal():
    """Also where the sums agree: {1, 3} and {2, 2}."""
    for values in itertools.product(range(5), repeat=3):
        ranks = [(1, 0, v, LIMIT - 1) for v in values]
        for own in (*ranks, ABSTAINS):
            assert same_call(summed(*ranks), own) == (len(set(values)) == 1)


def test_a_rank_that_abstains_agrees_with_any_call_and_with_no_two():
    one, other = (1, 5, 6, 7), (1, 5, 6, 8)
    for abstaining in (0, 1, MOST_RANKS - 2):
        both = summed(one, other) + abstaining * summed(ABSTAINS)
        for own in (one, other, ABSTAINS):
            assert not same_call(both, own)
            assert same_call(summed(one, one), own) == (own != other)
    assert same_call(summed(ABSTAINS, ABSTAINS), ABSTAINS)


@pytest.mark.parametrize("own", [NUMBERS, ABSTAINS], ids=["a call", "abstains"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_slots_that_hold_no_integers_are_no_call(value, own):
    """As where ranks have sent something else."""
    slots = [float(v) for v in moments.head(own)]
    assert moments.same_call(slots, own)
    for slot in range(moments.CALL):
        assert not moments.same_call([*slots[:slot], value, *slots[slot + 1 :]], own)
    assert not moments.same_call([value] * moments.CALL, own)


def test_status_becomes_numbers_of_ranks():
    votes = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[torch.float32])
    other = Status(1.0, 1.0, 0.0, *moments.DTYPE_VOTES[torch.bfloat16])
    x = torch.zeros(2, 3)
    counters = moments.read_counters(wire_of(x, votes) + wire_of(x, votes) + wire_of(x, other), NUMBERS)
    assert counters == Counters(True, 6.0, Status(1.0, 3.0, 2.0, 0.0, 1.0, 2.0, 0.0))
    assert counters.problem(3) == "input"
    assert moments.read_counters(wire_of(x), (*NUMBERS[:3], 4)).same_call is False


def test_the_first_problem_that_applies_is_named():
    wrong = {"same_call": False, "faults": 1.0, "bfloat16": 1.0, "grad_enabled": 1.0, "count": 1.0}
    order = ["call", "input", "dtype", "grad_enabled", "count"]
    for first in range(6):
        now = dict(list(wrong.items())[first:])
        same, count = now.pop("same_call", True), now.pop("count", 8.0)
        problem = Counters(same, count, GOOD._replace(**now)).problem(2)
        assert problem == (order[first] if first < 5 else "")


@pytest.mark.parametrize(
    ("count", "problem"), [(0.0, ""), (0.25, "count"), (1.0, "count"), (1.25, ""), (2.0, "")], ids=str
)
def test_one_value_per_channel_is_a_problem_and_none_is_not(count, problem):
    assert Counters(True, count, GOOD).problem(2) == problem


@pytest.mark.parametrize(("ranks", "problem"), [(0, ""), (1, "grad_enabled"), (2, "")])
def test_all_or_none_of_the_ranks_record(ranks, problem):
    assert Counters(True, 8.0, GOOD._replace(grad_enabled=float(ranks))).problem(2) == problem


def test_ranks_without_samples_vote_for_no_dtype():
    assert Counters(True, 8.0, GOOD._replace(float32=1.0)).problem(2) == ""
    for other in ("float16", "bfloat16", "float64"):
        assert Counters(True, 8.0, GOOD._replace(**{other: 1.0})).problem(3) == "dtype"


def test_a_message_is_called_by_layer_direction_and_serial():
    texts = [str(Message(NUMBERS, 1, "'stem.norm'", direction, 7)) for direction in range(5)]
    assert texts[0] == "forward of 'stem.norm' (call 7)"
    assert texts[1] == "backward of 'stem.norm' (call 7)"
    assert texts[2] == "derivative 2 through the forward of 'stem.norm' (call 7)"
    assert texts[3] == "derivative 2 through the backward of 'stem.norm' (call 7)"
    assert len(set(texts)) == 5
    assert str(Message(NUMBERS, 1, "World.barrier", -1, 7)) == "World.barrier (call 7)"  # of no layer


def test_finalize_gives_mean_variance_and_invstd():
    x = torch.randn(50, 3, dtype=torch.float64) * 2 + 5
    mean, var, invstd = moments.finalize(wire_of(x), EPS)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(var, x.var(0, correction=0))
    torch.testing.assert_close(invstd, (x.var(0, correction=0) + EPS).rsqrt())


def test_finalize_of_nothing_is_finite():
    mean, var, invstd = moments.finalize(wire_of(torch.empty(0, 3)), EPS)
    assert torch.equal(mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(var, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(invstd, torch.full((3,), EPS**-0.5, dtype=torch.float64))


def test_variance_is_never_negative():
    x = torch.full((1000, 1), 12345.678, dtype=torch.float64)
    assert moments.finalize(wire_of(x), EPS)[1].item() >= 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_running_statistics_move_with_the_unbiased_variance(dtype):
    running = Running(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype), torch.tensor(0), 0.25)
    moments.update_running(running, wire_with(5.0, 3.0, 2.0))
    assert running.mean.item() == 1.5
    assert running.var.item() == 0.75 + 0.25 * 2.5
    assert running.num_batches_tracked.item() == 1


@pytest.mark.parametrize("momentum", [0.25, None])
def test_an_empty_global_batch_is_counted_and_moves_nothing(momentum):
    running = Running(torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(4), momentum)
    moments.update_running(running, wire_of(torch.empty(0, 3)))
    assert running.num_batches_tracked.item() == 5
    assert running.mean.tolist() == [2.0] * 3
    assert running.var.tolist() == [3.0] * 3


def test_nothing_moves_where_it_must_not_and_nothing_is_counted():
    running = Running(torch.zeros(1), torch.ones(1), torch.tensor(4), 0.25)
    moments.update_running(running, wire_with(5.0, 3.0, 2.0), torch.tensor(False))
    assert (running.mean.item(), running.var.item(), running.num_batches_tracked.item()) == (0.0, 1.0, 4)
    moments.update_running(running, wire_with(5.0, 3.0, 2.0), torch.tensor(True))
    assert (running.mean.item(), running.num_batches_tracked.item()) == (0.75, 5)


def test_momentum_none_averages_over_all_batches():
    running = Running(torch.zeros(1), torch.ones(1), torch.tensor(0), None)
    for batch in (1.0, 2.0, 6.0):
        moments.update_running(running, wire_with(2.0**30, batch, 1.0))
    assert running.mean.item() == 3.0


def test_momentum_none_without_a_counter_moves_nothing():
    """As in torch, whose average is over the batches counted."""
    running = Running(torch.zeros(1), torch.ones(1), None, None)
    moments.update_running(running, wire_with(5.0, 3.0, 2.0))
    assert (running.mean.item(), running.var.item()) == (0.0, 1.0)
