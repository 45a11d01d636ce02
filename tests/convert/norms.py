# SPDX-License-Identifier: BSD-3-Clause
"""What normalises in another way than by a batch norm of torch, or only seems to, and what a summary says of it."""

import torch
from torch import nn
from torch.nn import functional as F

import syncbn
from syncbn import summary


class EvoNorm2dB0(nn.Module):
    """Has the name and the buffers of timm's."""

    def __init__(self, channels=4):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x / x.var((0, 2, 3), keepdim=True).sqrt()


class FrozenBatchNorm2d(EvoNorm2dB0):
    def forward(self, x):
        return F.batch_norm(x, self.running_var, self.running_var, training=True)


class Calls(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class LayerOfThatName(nn.Module):
    """Calls a submodule, not a function."""

    def __init__(self):
        super().__init__()
        self.batch_norm = syncbn.SyncBatchNorm(3)

    def forward(self, x):
        return self.batch_norm(x)


class StandardizesItsWeight(nn.Conv2d):
    """The way of timm's StdConv2d."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class CallsOurs(nn.Module):
    def forward(self, x):
        return syncbn.functional.sync_batch_norm(x)


def only(model):
    """The one row of a summary."""
    (row,) = summary(model).rows
    return row
