# SPDX-License-Identifier: BSD-3-Clause
"""Calls of the four steps, and what the tests of the GPU kernels compare."""

import torch

from syncbn import moments
from syncbn.kernels.base import Parameters
from syncbn.kernels.torch_ops import TorchKernels
from syncbn.moments import Message, Status

TORCH = TorchKernels()
EPS = 1e-5
STATUS = Status(0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
MESSAGE = Message((1, 3, 200_000, 77), 1, "'layer'", 0, 3)
NUMBERS = MESSAGE.numbers


def batch(shape, dtype=torch.float32, *, channels_last=False, offset=0):
    """Input and gradient, ``offset`` elements behind an address that is as aligned as memory gets."""
    generator = torch.Generator().manual_seed(0)
    pair = []
    for mean in (1.0, 0.0):
        values = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype)
        values = values.movedim(1, -1) if channels_last else values
        place = torch.empty(values.numel() + offset, dtype=dtype)[offset:].view(values.shape).copy_(values)
        pair.append(place.movedim(-1, 1) if channels_last else place)
    return pair


def step(implementation, x, grad_y, weight=None, bias=None):
    """Every number that the four steps make."""
    wire = implementation.local_moments(x, None, NUMBERS, STATUS)
    y, stats = implementation.normalize(x, wire, Parameters(weight, bias, EPS), MESSAGE)
    sums = implementation.backward_sums(grad_y, x, stats, NUMBERS)[0]
    grad_x = implementation.backward_input(grad_y, x, None, sums, weight, stats, MESSAGE)
    return {"wire": wire, "y": y, "stats": stats, "sums": sums, "grad_x": grad_x}


def forward(implementation, x, running=None, message=MESSAGE):
    """A forward over one rank, or over ranks of which this one alone has samples."""
    wire = implementation.local_moments(x, None, message.numbers, STATUS)
    return implementation.normalize(x, wire, Parameters(eps=EPS, running=running), message)


def reduced(wire, ranks, last=NUMBERS):
    """The sums over ``ranks`` ranks in one call, but for the last, and of which this one alone has samples."""
    wire = wire.clone()
    wire[: moments.CALL] = (ranks - 1) * wire[: moments.CALL] + wire.new_tensor(moments.head(last))
    return wire


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]
