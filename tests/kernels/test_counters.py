# SPDX-License-Identifier: BSD-3-Clause
"""Every implementation counts batches in the dtype of num_batches_tracked."""

import pytest
import torch

from syncbn.kernels.base import Parameters
from syncbn.moments import Running
from tests.kernels.contract import message, moments_of

COUNTERS = [torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8]


@pytest.mark.parametrize("momentum", [None, 0.1])
@pytest.mark.parametrize("dtype", COUNTERS, ids=str)
@pytest.mark.parametrize("start", [2.5, 255, 0])
def test_a_counter_counts_on_in_its_own_dtype(implementation, dtype, momentum, start):
    x = torch.randn(6, 3)
    tracked = torch.tensor(start).to(dtype)
    expected = tracked + 1  # 255 + 1 is 0 in uint8, and 256 + 1 stays 256 in bfloat16
    running = Running(torch.zeros(3), torch.ones(3), tracked, momentum)
    implementation.normalize(x, moments_of(implementation, x), Parameters(running=running), message())
    assert tracked.dtype == dtype
    assert torch.equal(tracked, expected)
    factor = 1 / max(float(expected), 1.0) if momentum is None else momentum
    torch.testing.assert_close(running.mean, x.mean(0) * factor)
