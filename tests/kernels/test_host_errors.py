# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that the compiled kernels refuse."""

import pytest
import torch

from syncbn.kernels.base import Parameters
from syncbn.moments import Running
from tests.kernels.test_host import HOST, MESSAGE, NUMBERS, STATUS, X, compiled

WIRE, SUMS, STATS, C3 = (torch.zeros(length).double() for length in (21, 13, 7, 3))


def local_moments(x, wire=WIRE, numbers=NUMBERS, status=STATUS):
    return compiled.local_moments(x, wire, numbers, status, 1)


def normalize(wire=WIRE, **parameters):
    return HOST.normalize(X, wire, Parameters(**parameters), MESSAGE)


def backward_input(sums=SUMS, stats=STATS):
    return HOST.backward_input(X, X, None, sums, None, stats, MESSAGE)


REFUSED = {
    "x must be float16, bfloat16, float32 or float64": lambda: local_moments(X.int()),
    "x must be a strided CPU tensor": lambda: local_moments(X.to("meta")),
    "x must be a torch.Tensor": lambda: local_moments([1.0]),
    "x must have at least 2 dims": lambda: local_moments(C3),
    "x must have at least 1 channel": lambda: local_moments(X[:, :0]),
    "wire must be contiguous float64 .21,": lambda: local_moments(X, WIRE[:20]),
    "wire must be contiguous float64, of 15 values or more": lambda: HOST.read_counters(WIRE.float(), MESSAGE),
    "wire must be contiguous float64, of 7 values or more": lambda: HOST.check_sums(SUMS.float(), MESSAGE),
    "status must be a tuple of 7": lambda: local_moments(X, status=STATUS[:6]),
    "numbers must be a tuple of 4": lambda: local_moments(X, numbers=NUMBERS[:3]),
    "expected 5 arguments, received 4": lambda: compiled.local_moments(X, WIRE, NUMBERS, STATUS),
    "wire must be contiguous float64 .21,.*": lambda: normalize(WIRE[:19]),
    "weight must have shape .3,": lambda: normalize(weight=torch.ones(2)),
    "x must be a strided CPU tensor of": lambda: local_moments(X[0].to_sparse()),
    "bias must be a strided CPU tensor": lambda: normalize(bias=torch.ones(3, device="meta")),
    "running_mean and running_var must both": lambda: normalize(running=Running(C3, None, None, 0.1)),
    "num_batches_tracked must be int64": lambda: normalize(
        running=Running(C3, C3, torch.zeros(2, dtype=torch.int64), 0.1)
    ),
    "grad_y must have the shape and dtype of x": lambda: HOST.backward_sums(X[:1], X, STATS, NUMBERS),
    "stats must be contiguous float64": lambda: HOST.backward_sums(X, X, STATS.float(), NUMBERS),
    "stats must be contiguous float64 .7,": lambda: backward_input(stats=STATS[:6]),
    "wire must be contiguous float64 .13,": lambda: backward_input(SUMS[7:]),
    "grad_weight must have shape": lambda: compiled.parameter_gradients(SUMS, torch.ones(2), None),
    "grad_bias must have shape": lambda: compiled.parameter_gradients(SUMS, None, torch.ones(2)),
    "this machine does not run pentium": lambda: compiled.use_instruction_set("pentium"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_tensors_are_refused_before_a_pointer_is_used(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()
