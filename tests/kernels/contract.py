# SPDX-License-Identifier: BSD-3-Clause
"""The four steps on one tensor alone, for the tests that every implementation passes."""

import pytest
import torch

from syncbn import kernels, moments, reference
from syncbn.kernels import dispatch
from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda.launch import AbstractLauncher
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import Message, Status
from tests.tolerances import FLOOR

EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, *moments.DTYPE_VOTES[torch.float32])
NUMBERS = (1, 7, moments.LIMIT - 1, 3)
SHAPES = [(5, 3), (4, 1, 7), (2, 5, 3, 4), (3, 17, 1, 1), (2, 64, 9, 5), (2, 3, 2, 3, 2), (1, 2, 33, 31)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class ArithmeticLauncher(AbstractLauncher):
    """The launcher of a GPU, and a chosen arithmetic for the sums: any GPU runs both.

    Args:
        inner: launches.
        slow: whether to say that float64 is slow here.
    """

    def __init__(self, inner, *, slow):
        self.inner, self.slow = inner, slow

    def launch(self, kernel, grid, block, layout, values, x):
        self.inner.launch(kernel, grid, block, layout, values, x)

    def slow_float64(self, x):
        return self.slow

    def scratch(self, x, partials, groups):
        return self.inner.scratch(x, partials, groups)

    def deferred_errors(self, x):
        return self.inner.deferred_errors(x)


def kernels_of_gpu(*, slow, host_synchronous):
    """The kernels of a GPU in one arithmetic. Skips where CUDA tensors get other kernels."""
    if kernels.explain_device().name != "cupy":
        pytest.skip(kernels.explain_device().reason)
    return CupyKernels(ArithmeticLauncher(dispatch.launcher(), slow=slow), host_synchronous=host_synchronous)


def exact(x, grad_y, weight, bias):
    """y and grad_x by the definition, in float64."""
    x = x.double().requires_grad_()
    stats = torch.zeros(x.size(1), dtype=torch.float64, device=x.device)
    y = reference.batch_norm(x, weight.double(), bias.double(), stats, stats, eps=EPS).y
    y.backward(grad_y.double())
    return y.detach(), x.grad


def message(direction=0, numbers=NUMBERS):
    return Message(numbers, 1, "a layer", direction, NUMBERS[1])


def moments_of(implementation, x, status=STATUS):
    return implementation.local_moments(x, None, NUMBERS, status)


def normalized(implementation, x, wire=None, **parameters):
    """y and the statistics for backward; of this tensor alone where no wire is given."""
    wire = moments_of(implementation, x) if wire is None else wire
    return implementation.normalize(x, wire, Parameters(eps=EPS, **parameters), message())


def sums_of(implementation, grad_y, x, stats):
    return implementation.backward_sums(grad_y, x, stats, NUMBERS)[0]


def grad_of(implementation, grad_y, x, stats, *, sums=None, weight=None):
    """grad_x; of this tensor alone where no sums are given."""
    sums = sums_of(implementation, grad_y, x, stats) if sums is None else sums
    return implementation.backward_input(grad_y, x, None, sums, weight, stats, message(1))


def bound(dtype, scale):
    """One rounding of the largest value, and what the elementwise arithmetic in float32 may add."""
    return FLOOR[dtype] * max(1.0, scale) * 2


def moved(x, offset):
    """Copies a tensor, strides included, to a place that begins ``offset`` bytes behind a multiple of 16."""
    first = offset // x.element_size()
    memory = torch.empty(x.numel() + first, dtype=x.dtype, device=x.device)
    copy = torch.as_strided(memory, x.shape, x.stride(), first).copy_(x)
    assert copy.data_ptr() % 16 == offset
    return copy
