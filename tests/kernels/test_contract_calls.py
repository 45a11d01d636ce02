# SPDX-License-Identifier: BSD-3-Clause
"""Every implementation of the four steps says the same of a call to the other ranks, and moves the same buffers."""

import itertools

import pytest
import torch

from syncbn import moments
from syncbn.moments import Running, Status
from tests.kernels.contract import DTYPES, NUMBERS, STATUS, grad_of, message, moments_of, normalized, sums_of

ABSTAINING = message(numbers=moments.ABSTAINS)


def test_kernels_that_do_not_defer_read_the_counters_and_the_call(implementation):
    if implementation.deferred:
        pytest.skip("the device reads them")
    wire = 3 * moments_of(implementation, torch.ones(4, 2))
    for own in (message(), ABSTAINING):
        counters = implementation.read_counters(wire, own)
        assert counters == (True, 12.0, Status._make(3 * s for s in STATUS))
        assert type(counters.same_call) is bool
        for slot in range(moments.CALL):
            other = wire.clone()
            other[slot] += 1
            assert not implementation.read_counters(other, own).same_call


def test_kernels_that_do_not_defer_compare_the_backward_call(implementation):
    if implementation.deferred:
        pytest.skip("the device compares it")
    x = torch.randn(4, 2)
    wire = 3 * sums_of(implementation, x, x, normalized(implementation, x)[1])
    for own in (message(1), ABSTAINING):
        assert implementation.check_sums(wire, own) is True
        for slot in range(moments.CALL):
            for wrong in (wire[slot].item() - 1, float("nan"), float("inf")):
                other = wire.clone()
                other[slot] = wrong
                assert implementation.check_sums(other, own) is False


def test_what_ranks_find_of_their_calls_is_what_the_definition_says(implementation, rng):
    """With every mixture of few ranks, also at the largest numbers, and of ranks that abstain."""
    if implementation.deferred:
        pytest.skip("the device compares calls")
    top = moments.LIMIT - 1
    calls = [(1, 0, 0, 0), (1, 1, 0, 0), (1, 2, 0, 0), (1, top, top, top), (1, top, top, top - 1), moments.ABSTAINS]
    for some in itertools.product(calls, repeat=3):
        for times in (1, 2**14):
            slots = torch.tensor([moments.head(numbers) for numbers in some], dtype=torch.float64).sum(0) * times
            wire = torch.cat((slots, torch.zeros(4, dtype=torch.float64)))
            same = len(set(some) - {moments.ABSTAINS}) <= 1
            for own in some:
                assert implementation.check_sums(wire, message(1, own)) is same
                assert moments.same_call(slots.tolist(), own) is same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_wires_begin_with_the_call(implementation, rng, dtype):
    x = torch.randn(5, 3, 4, generator=rng).to(dtype)
    stats = normalized(implementation, x)[1]
    for wire in (moments_of(implementation, x), sums_of(implementation, x, x, stats)):
        assert wire.dtype == torch.float64
        assert wire[: moments.CALL].tolist() == [*NUMBERS, *(v * v for v in NUMBERS[1:])]
    assert not implementation.local_moments(x, None, moments.ABSTAINS, STATUS)[: moments.CALL].any()
    assert sums_of(implementation, x, x, stats).shape == (moments.sums_length(3),)
    assert moments_of(implementation, x).shape == (moments.wire_length(3),)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_an_empty_share_sends_zeros_and_gets_empties(implementation, shape):
    x = torch.empty(shape)
    wire = moments_of(implementation, x)
    assert not moments.count(wire)
    assert not moments.sums(wire).any()
    whole = moments_of(implementation, torch.randn(4, 3)) + wire
    y, stats = normalized(implementation, x, whole)
    sums = sums_of(implementation, x, x, stats)
    assert not sums[moments.CALL :].any()
    grad_x = grad_of(implementation, x, x, stats, sums=2 * sums)
    assert y.shape == grad_x.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_normalize_moves_the_running_statistics(implementation, rng, dtype):
    x = torch.randn(8, 3, generator=rng) + 2
    running = Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(4), 0.5)
    normalized(implementation, x, running=running)
    tolerance = {"rtol": 1e-3 if dtype == torch.float16 else 1e-6, "atol": 0}
    torch.testing.assert_close(running.mean, (x.mean(0) / 2).to(dtype), **tolerance)
    torch.testing.assert_close(running.var, ((1 + x.var(0)) / 2).to(dtype), **tolerance)
    assert running.num_batches_tracked.item() == 5


def test_a_global_batch_of_nothing_is_counted_and_moves_nothing(implementation):
    """As torch counts it."""
    x = torch.empty(0, 3)
    for momentum in (0.5, None):
        running = Running(torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(4), momentum)
        y, stats = normalized(implementation, x, running=running)
        assert y.shape == x.shape
        assert stats.isfinite().all()
        assert running.num_batches_tracked.item() == 5
        assert running.mean.tolist() == [2.0] * 3
        assert running.var.tolist() == [3.0] * 3


def test_momentum_none_averages_and_without_a_counter_leaves_the_buffers_alone(implementation):
    counted = Running(torch.zeros(1), torch.ones(1), torch.tensor(0), None)
    uncounted = Running(torch.zeros(1), torch.ones(1), None, None)
    for batch in ([0.0, 2.0], [1.0, 3.0], [5.0, 7.0]):
        for running in (counted, uncounted):
            normalized(implementation, torch.tensor(batch).view(2, 1), running=running)
    assert (counted.mean.item(), counted.var.item(), counted.num_batches_tracked.item()) == (3.0, 2.0, 3)
    assert (uncounted.mean.item(), uncounted.var.item()) == (0.0, 1.0)  # as torch does


def test_autograd_learns_that_running_statistics_moved(implementation):
    """A graph that has saved one then refuses backward, where it would use values that have moved."""
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
    before = [buffer._version for buffer in running[:3]]
    normalized(implementation, torch.randn(4, 3), running=running)
    assert all(buffer._version > version for buffer, version in zip(running[:3], before, strict=True))


def test_buffers_of_inference_mode_move_too(implementation):
    """They have no version."""
    with torch.inference_mode():
        running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 0.1)
        normalized(implementation, torch.randn(4, 3), running=running)
    assert running.num_batches_tracked.item() == 1
    assert running.mean.all()
