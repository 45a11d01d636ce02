# SPDX-License-Identifier: BSD-3-Clause
"""What the GPU kernels do with a call that is to be refused: nothing but to note it, for the host to say later."""

import pytest
import torch

from syncbn import moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda.errors import DeferredErrors
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import ABSTAINS, LIMIT, Message, Running, Status
from tests.cuda_on_cpu import EmulatedLauncher
from tests.kernels.cuda.calls import EPS, MESSAGE, NUMBERS, STATUS, batch, forward, reduced, step

REFUSED = {
    "received a wrong one on 2 of 3 ranks": Status(2.0, 3.0, 3.0, 0, 0, 1.0, 0),
    "received float16 on 1, float32 on 2 of 3 ranks": Status(0.0, 3.0, 3.0, 1.0, 0, 2.0, 0),
    "received True on 2 of 3 ranks": Status(0.0, 2.0, 2.0, 0, 0, 3.0, 0),
    "received 1 over 3 ranks": Status(0.0, 3.0, 3.0, 0, 0, 1.0, 0),
}
OF_3 = MESSAGE._replace(ranks=3)


def untouched(running):
    return (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 0)


@pytest.fixture
def running():
    return Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.1)


@pytest.mark.parametrize("text", REFUSED)
def test_a_refused_call_is_nan_touches_nothing_and_is_told_at_the_next_call(running, text):
    k = CupyKernels(EmulatedLauncher())
    x = batch((1 if "received 1 over" in text else 4, 5))[0]
    wire = reduced(k.local_moments(x, None, NUMBERS, REFUSED[text]), 3)
    assert k.read_counters(wire, OF_3) is None, "the host has read nothing, and says nothing"
    y, stats = k.normalize(x, wire, Parameters(eps=EPS, running=running), OF_3)
    assert y.isnan().all()
    assert stats[:10].isnan().all()
    assert untouched(running)
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        k.read_counters(wire, OF_3._replace(serial=4))
    assert f"This rank was in forward of 'layer' (call 3), with input float32 {tuple(x.shape)}." in str(caught.value)
    k.read_counters(wire, OF_3)  # once


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("slot", range(3))
def test_a_forward_of_another_call_is_nan_touches_nothing_and_names_the_call_of_this_rank(running, slot, momentum):
    k, x = CupyKernels(EmulatedLauncher()), batch((40, 5))[0]
    other = [v + (i == slot) for i, v in enumerate(NUMBERS)]
    wire = reduced(k.local_moments(x, None, NUMBERS, Status(0.0, 3.0, 3.0, 0, 0, 3.0, 0)), 3, other)
    y, stats = k.normalize(x, wire, Parameters(eps=EPS, running=running._replace(momentum=momentum)), OF_3)
    assert y.isnan().all()
    assert stats[:10].isnan().all()
    assert untouched(running)
    expected = (
        r"received forward of 'layer' \(call 3\) here and another one on some of 3 ranks.*input float32 \(40, 5\)"
    )
    with pytest.raises(ValueError, match=expected):
        k.check_sums(wire, OF_3)


@pytest.mark.parametrize("shape", [(40, 5), (0, 5), (3, 5, 9, 8), (4, 0)], ids=str)
def test_a_backward_of_another_call_is_nan_and_names_the_call_of_this_rank(shape):
    k = CupyKernels(EmulatedLauncher())
    x, grad_y = batch(shape)
    stats = forward(k, x)[1]
    message = OF_3._replace(direction=1)
    wire, grad_weight, _ = k.backward_sums(grad_y, x, stats, NUMBERS, torch.float32)
    wire = reduced(wire, 3, (1, NUMBERS[1], NUMBERS[2] + 1, NUMBERS[3]))
    assert k.check_sums(wire, message), "the host has compared nothing"
    assert k.backward_input(grad_y, x, None, wire, None, stats, message).isnan().all()
    assert grad_weight.isfinite().all(), "it is of this rank alone"
    with pytest.raises(ValueError, match=r"received backward of 'layer' \(call 3\) here .* some of 3 ranks") as caught:
        k.read_counters(wire, OF_3)
    assert f"with input float32 {shape}." in str(caught.value)
    k.read_counters(wire, OF_3)


def test_sums_that_agree_by_chance_are_no_agreement():
    """1 and 3 have the sum of 2 and 2, but not its squares."""
    k, x = CupyKernels(EmulatedLauncher()), batch((4, 5))[0]
    message = MESSAGE._replace(numbers=(1, 2, 0, 0), ranks=2)
    wire = k.local_moments(x, None, (1, 1, 0, 0), STATUS) + k.local_moments(x, None, (1, 3, 0, 0), STATUS)
    assert wire[: moments.CALL].tolist() == [2, 4, 0, 0, 10, 0, 0]
    assert k.normalize(x, wire, Parameters(eps=EPS), message)[0].isnan().all()


MOST = (1, LIMIT - 1, LIMIT - 1, LIMIT - 1)


@pytest.mark.parametrize("last", [MOST, (1, LIMIT - 2, LIMIT - 1, LIMIT - 1), (1, LIMIT - 1, LIMIT - 1, 0)])
def test_the_largest_numbers_on_the_most_ranks_are_compared_exactly(last):
    numbers, ranks = MOST, 65_536
    message = Message(numbers, ranks, "'layer'", 0, LIMIT - 1)
    k = CupyKernels(EmulatedLauncher())
    x, grad_y = batch((4, 5))
    stats = forward(k, x)[1]
    status = Status(0.0, ranks, ranks, 0, 0, ranks, 0)
    wire = reduced(k.local_moments(x, None, numbers, status), ranks, last)
    y, _ = k.normalize(x, wire, Parameters(eps=EPS), message)
    sums = reduced(k.backward_sums(grad_y, x, stats, numbers)[0], ranks, last)
    grad_x = k.backward_input(grad_y, x, None, sums, None, stats, message)
    expected = torch.isfinite if last == numbers else torch.isnan
    assert expected(y).all()
    assert expected(grad_x).all()


@pytest.mark.parametrize("one", [True, False])
def test_a_rank_that_abstains_compares_the_others(one):
    """Exactly, where n * sum(v^2) and (sum v)^2 are beyond 2^53."""
    k, (x, grad_y), ranks = CupyKernels(EmulatedLauncher()), batch((4, 5)), 65_536
    message = Message(ABSTAINS, ranks, "'layer'", 0, 0)
    stats = forward(k, x)[1]
    sums = reduced(k.backward_sums(grad_y, x, stats, MOST)[0], ranks - 1, MOST if one else (*MOST[:3], LIMIT - 2))
    assert k.backward_input(grad_y, x, None, sums, None, stats, message).isnan().all() == (not one)


def test_the_first_of_several_errors_is_kept():
    """Those behind it follow from it: ranks that are one call apart stay so."""
    k, x = CupyKernels(EmulatedLauncher()), batch((4, 5))[0]
    for serial in (5, 6):
        wire = k.local_moments(x, None, (1, serial + 1, 0, 0), STATUS)
        k.normalize(x, wire, Parameters(eps=EPS), Message((1, serial, 0, 0), 1, "'layer'", 0, serial))
    with pytest.raises(ValueError, match=r"forward of 'layer' \(call 5\) here"):
        k.read_counters(wire, MESSAGE)


def test_a_group_without_a_sample_counts_the_batch_and_leaves_the_statistics_alone(running):
    k, x = CupyKernels(EmulatedLauncher()), torch.empty(0, 5, 2, 2)
    forward(k, x, running)
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 1)
    forward(k, x, running._replace(momentum=None))
    assert (running.mean.sum(), running.var.sum(), running.num_batches_tracked) == (0, 5, 2)
    k.read_counters(k.local_moments(x, None, NUMBERS, STATUS), MESSAGE)  # and nothing is wrong


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(4, 0), (3, 0, 2, 5), (0, 0)], ids=str)
def test_an_input_without_channels_is_a_launch_a_step_and_no_error(shape, channels_last):
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher)
    found = step(k, *batch(shape, channels_last=channels_last and len(shape) > 2))
    assert found["wire"].tolist() == [*moments.head(NUMBERS), shape[0] * (10 if len(shape) > 2 else 1), *STATUS]
    assert found["y"].shape == found["grad_x"].shape == shape
    assert len(launcher.launches) == 4
    k.read_counters(found["wire"], MESSAGE)


@pytest.mark.parametrize("weights", [0.5, 1.0])
def test_weights_of_other_ranks_masks_are_too_few_for_a_rank_without_samples_too(weights):
    k = CupyKernels(EmulatedLauncher())
    x = torch.empty(0, 5, 2, 2)
    wire = reduced(k.local_moments(x, None, NUMBERS, Status(0, 3.0, 3.0)), 3)
    wire[moments.CALL] = weights
    k.normalize(x, wire, Parameters(eps=EPS), OF_3)
    with pytest.raises(ValueError, match=f"received {weights:g} over 3 ranks"):
        k.read_counters(wire, OF_3)


def test_where_the_host_waits_anyway_it_compares_there():
    launcher = EmulatedLauncher()
    k = CupyKernels(launcher, host_synchronous=True)
    assert CupyKernels(launcher).deferred
    assert not k.deferred
    x, grad_y = batch((4, 5))
    status = REFUSED["received True on 2 of 3 ranks"]
    wire = reduced(k.local_moments(x, None, NUMBERS, status), 3)
    assert k.read_counters(wire, OF_3) == (True, 4.0, status)
    assert not k.read_counters(wire, OF_3._replace(numbers=(1, 4, *NUMBERS[2:]))).same_call
    stats = k.normalize(x, wire, Parameters(eps=EPS), OF_3)[1]
    sums = k.backward_sums(grad_y, x, stats, NUMBERS)[0]
    assert k.check_sums(sums, MESSAGE)
    assert not k.check_sums(sums, OF_3._replace(numbers=(1, 4, *NUMBERS[2:])))
    k.backward_input(grad_y, x, None, sums, None, stats, OF_3)
    assert not launcher.errors.memory.any()
    before = len(launcher.launches)
    k.backward_input(x[:0], x[:0], None, sums, None, stats, MESSAGE)
    assert len(launcher.launches) == before, "nothing is left to compare"


def test_a_call_long_gone_is_not_named():
    memory = torch.zeros(DeferredErrors.SIZE, dtype=torch.float64)
    errors = DeferredErrors(memory)
    for _ in range(600):
        errors.number(MESSAGE, torch.float32, torch.Size((3,)))
    memory[:4] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"at least 2 values.* in a call too long ago to be named.* Found at a later call"
    ):
        errors.look()
    errors.look()


def test_parameters_elsewhere_are_refused_before_a_pointer_is_used():
    k = CupyKernels(EmulatedLauncher())
    x = batch((4, 5))[0]
    wire = k.local_moments(x, None, NUMBERS, STATUS)
    for wrong in (torch.ones(4), torch.ones(5, device="meta"), torch.ones(5, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match=r"must be floating-point of shape \(5,\) on cpu; received .* Move the layer"
        ):
            k.normalize(x, wire, Parameters(wrong, eps=EPS), MESSAGE)
