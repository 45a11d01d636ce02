# SPDX-License-Identifier: BSD-3-Clause
"""The wire form: additive, of one size and dtype, and never NaN."""

import pytest
import torch

from syncbn import moments
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Running, Status

EPS = 1e-5


def wire_of(x, status=Status()):  # noqa: B008 - a NamedTuple of zeros is immutable
    return TorchKernels().local_moments(x, status)


def test_pack_and_unpack_are_inverse():
    sums = torch.arange(6, dtype=torch.float64)
    count, sum_x, sum_x2 = moments.unpack(moments.pack(4.0, sums[:3], sums[3:], Status(float32=1.0)))
    assert count.item() == 4.0
    assert torch.equal(torch.cat((sum_x, sum_x2)), sums)


@pytest.mark.parametrize("dtype", moments.DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_size_and_dtype_of_the_wire_depend_on_c_alone(dtype, n):
    wire = wire_of(torch.ones(n, 3, 2, dtype=dtype))
    assert wire.shape == (2 * 3 + 8,)
    assert wire.dtype == torch.float64


def test_wires_of_shares_add_up_to_the_wire_of_the_whole():
    x = torch.randn(9, 4, 5)
    parts = [wire_of(part) for part in x.split([0, 1, 5, 3])]
    torch.testing.assert_close(sum(parts), wire_of(x), rtol=1e-15, atol=1e-13)


def test_status_becomes_numbers_of_ranks():
    votes = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[torch.float32])
    other = Status(1.0, 1.0, 0.0, *moments.DTYPE_VOTES[torch.bfloat16])
    x = torch.zeros(2, 3)
    count, status = moments.read_status(wire_of(x, votes) + wire_of(x, votes) + wire_of(x, other))
    assert count == 6.0
    assert status == Status(1.0, 3.0, 2.0, 0.0, 1.0, 2.0, 0.0)
    assert status.dtypes == 2


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
    mean, var = torch.tensor([3.0]).double(), torch.tensor([2.0]).double()
    moments.update_running(running, mean, var, 5.0)
    assert running.mean.item() == 1.5
    assert running.var.item() == 0.75 + 0.25 * 2.5
    assert running.num_batches_tracked.item() == 1


def test_momentum_none_averages_over_all_batches():
    running = Running(torch.zeros(1), torch.ones(1), torch.tensor(0), None)
    for batch in (1.0, 2.0, 6.0):
        moments.update_running(running, torch.tensor([batch]).double(), torch.tensor([1.0]).double(), 1e9)
    assert running.mean.item() == 3.0
