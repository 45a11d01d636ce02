# SPDX-License-Identifier: BSD-3-Clause
"""A model and its batches, for ranks that make different numbers of steps."""

import torch
from torch import nn

from tests.conftest import DEVICE


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
    ).double()


def batch(step, rank):
    """Shares of different sizes."""
    rng = torch.Generator(DEVICE).manual_seed(100 * step + rank)
    return torch.randn(2 + (step + rank) % 3, 2, 7, 6, generator=rng, dtype=torch.float64)


def loss(model, x):
    return (model(x) - x.flatten(1)[:, :18]).square().mean()
