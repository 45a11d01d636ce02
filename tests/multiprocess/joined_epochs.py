# SPDX-License-Identifier: BSD-3-Clause
"""A model, its batches in several epochs, and its optimizers, for ranks that make different numbers of steps."""

import torch
from torch import nn

from tests.conftest import DEVICE

LR = 0.05
OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),  # has state before its first step
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3)
    ).double()


def batch(epoch, step, rank):
    rng = torch.Generator(DEVICE).manual_seed(1000 * epoch + 100 * step + rank)
    return torch.randn(2 + (step + rank) % 3, 2, 7, 6, generator=rng, dtype=torch.float64)


def loss(model, x):
    return (model(x).flatten(1) - x.flatten(1)[:, :18]).square().mean()
