# SPDX-License-Identifier: BSD-3-Clause
"""Global batches, ways to share them out, and ways to lay them out in memory."""

from types import SimpleNamespace

import torch

import syncbn
from syncbn import reference

SHARES = {
    "even": lambda W: [2] * W,
    "uneven": lambda W: [r + 1 for r in range(W)],
    "one sample a rank": lambda W: [1] * W,
    "an empty rank": lambda W: [0] + [2] * (W - 1) if W > 1 else [2],
    "all on the last rank": lambda W: [0] * (W - 1) + [3],
}

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack((x, x + 1), dim=-1)[..., 0],
}


def make(shape, rng, dtype=torch.float32, mean=1.0, std=2.0):
    """Input, output gradient, weight and bias of a global batch: the same on every rank."""
    C = shape[1]
    return SimpleNamespace(
        x=(torch.randn(shape, generator=rng, dtype=torch.float64) * std + mean).to(dtype),
        grad_y=torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype),
        weight=torch.rand(C, generator=rng) + 0.5,
        bias=torch.randn(C, generator=rng),
    )


def run(layer, x, grad_y):
    """Forward and backward; returns what the promise is about."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad_y)
    return SimpleNamespace(y=y.detach(), grad_x=x.grad, mean=layer.running_mean, var=layer.running_var)


def load(layer, batch):
    """Gives a layer the batch's weight and bias."""
    with torch.no_grad():
        layer.weight.copy_(batch.weight)
        layer.bias.copy_(batch.bias)
    return layer


def exact(batch):
    """The definition, over the global batch, in float64."""
    C = batch.weight.numel()
    x = batch.x.double().requires_grad_()
    w, b = batch.weight.double(), batch.bias.double()
    zeros, ones = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)
    out = reference.batch_norm(x, w, b, zeros, ones)
    out.y.backward(batch.grad_y.double())
    return SimpleNamespace(y=out.y.detach(), grad_x=x.grad, mean=out.running_mean, var=out.running_var)


def torch_layer(dims, C, **options):
    """torch's own layer for an input of this many dims."""
    classes = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    return torchs(classes[dims], C, **options)


def torchs(cls, C, *, bias=True, **options):
    """A layer of torch's, with or without a bias: torch 2.11 has no such argument."""
    layer = cls(C, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def ours(batch, **options):
    """Our layer with the batch's parameters."""
    return load(syncbn.SyncBatchNorm(batch.weight.numel(), **options), batch)
