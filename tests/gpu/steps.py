# SPDX-License-Identifier: BSD-3-Clause
"""A layer on the GPU, and a step of it."""

import torch

import syncbn
from syncbn.moments import Message

MESSAGE = Message((1, 3, 200_000, 77), 1, "'layer'", 0, 3)


def random(shape, rng, dtype=torch.float32):
    return torch.randn(shape, generator=rng, device="cuda").to(dtype)


def make(shape=(4, 8, 16, 16), dtype=torch.float32):
    x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
    layer = syncbn.SyncBatchNorm(shape[1]).cuda()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer, x, torch.randn(shape, device="cuda", dtype=dtype)


def step(layer, x, grad_y):
    """y and the gradients of input, weight and bias.

    y comes without its autograd graph, which would keep the AccumulateGrad nodes of x and of the parameters. A node
    belongs to the stream of its making; on another stream, as in a capture, torch waits for that one and warns.
    """
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad_y)


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
