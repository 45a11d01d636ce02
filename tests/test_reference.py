# SPDX-License-Identifier: BSD-3-Clause
"""The oracle itself: torch's BatchNorm and finite differences check it."""

import pytest
import torch

from syncbn import reference


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 2), (2, 3, 2, 2, 3)], ids=str)
def test_reference_equals_torch(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    weight, bias = torch.rand(3).double(), torch.randn(3).double()
    mean, var = torch.randn(3).double(), torch.rand(3).double()
    out = reference.batch_norm(x, weight, bias, mean, var, momentum=0.3, eps=1e-3)
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-3)
    torch.testing.assert_close(out.y, y)
    torch.testing.assert_close(out.running_mean, mean)  # moved in place by torch
    torch.testing.assert_close(out.running_var, var)


def test_reference_has_the_right_gradients():
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, dtype=torch.float64)

    def function(*inputs):
        return reference.batch_norm(*inputs, zeros, zeros).y

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
