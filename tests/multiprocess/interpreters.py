# SPDX-License-Identifier: BSD-3-Clause
"""Two ways to run a random program: our layers on one rank, and torch's in one process on the rows of all ranks.

N batch, C channels, L length, W ranks.
"""

import collections
import contextlib
import copy
import zlib
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.conftest import DEVICE
from tests.multiprocess import programs


def noise(program, key, *shape):
    """Random values of the global batch, the same on every rank."""
    rng = torch.Generator(DEVICE).manual_seed(program.seed * 4096 + zlib.crc32(key.encode()) % 4096)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def weights(program, key, length):
    """A mask of the global batch, (N, L), with two values in each row at least."""
    mask = noise(program, key, sum(program.sizes), length)
    mask[:, :2] = 1.0
    return mask > 0 if program.seed % 2 else mask.clamp(min=0.0)


def interpret(program, steps, machine):
    """Runs steps; ``machine`` knows which rows of the global batch are there, and how to call a layer."""
    N, C, rows = sum(program.sizes), program.C, machine.rows
    inputs = {k: noise(program, k, N, C, L)[rows].requires_grad_() for k, L in program.inputs.items()}
    values, losses = dict(inputs), {}
    machine.inputs = inputs
    for step in steps:
        if step.op == "forward":
            x = values[step.args[0]]
            y = machine.forward(step, x)
            values[step.out] = machine.outputs[step.out] = y
        elif step.op == "join":
            a, b = (values[name] for name in step.args)
            L = min(a.size(2), b.size(2))
            values[step.out] = torch.tanh(torch.cat((a, b), 2) if step.how == "cat" else a[..., :L] + b[..., :L])
        elif step.op == "loss":
            y = values[step.args[0]]
            factors = noise(program, step.out, N, C, y.size(2))[rows]
            scale = machine.scale() if step.how == "scaled" else 1.0
            losses[step.out] = ((factors * y + 0.1 * y * y) * scale).sum()
        elif step.op == "penalty":
            (loss,) = (losses[name] for name in step.args)
            slopes = torch.autograd.grad(loss, list(inputs.values()), create_graph=True, allow_unused=True)
            losses[step.out] = sum(slope.square().sum() for slope in slopes if slope is not None)
        elif step.op == "backward":
            losses[step.args[0]].backward(retain_graph=True)
        else:
            getattr(machine, step.op)(step)


class Ours:
    """Our layers on one rank."""

    def __init__(self, program, ranks):
        self.program, self.ranks, self.outputs = program, ranks, {}
        self.calls, self.in_forward = (
            collections.Counter(),
            False,
        )  # finished ones in training, without those that checkpointing repeats
        self.rows = program.rows([ranks.rank])
        self.model = nn.ModuleDict({name: self.make(name) for name in program.settings})
        self.layers = dict(self.model)
        if program.named:
            syncbn.name_layers(self.model)
        self.warm(self.layers.values())

    def warm(self, layers):
        """Uses layers once before a fault may: the comparison of settings has another length than a forward."""
        for layer in layers if self.program.warm else ():
            kept = {name: buffer.clone() for name, buffer in layer.named_buffers()}
            layer(torch.eye(self.program.C + 1, self.program.C, dtype=torch.float64))
            for name, buffer in layer.named_buffers():
                buffer.copy_(kept[name])

    def make(self, name):
        program, options = self.program, self.program.settings[name]
        size = None if program.group == self.ranks.size else program.group
        layer = syncbn.SyncBatchNorm(program.C, dtype=torch.float64, group_size=size, **options)
        return randomize(program, layer, name)

    def forward(self, step, x):
        layers = [self.layers[name] for name in step.layers]
        mask = weights(self.program, step.out, x.size(2))[self.rows] if self.ranks.rank in step.masked else None

        def run(x):
            for name, layer in zip(step.layers, layers, strict=True):
                x = layer(torch.tanh(x), mask)
                self.calls[name] += self.in_forward and layer.training
            return x

        self.in_forward = True

        with contextlib.ExitStack() as stack:
            if step.how in programs.NO_GRAD:
                stack.enter_context(torch.no_grad())
            for layer in layers:
                layer.train(step.how not in programs.EVAL)
                if step.how == "no_sync":
                    stack.enter_context(syncbn.no_sync(layer))
            y = checkpoint(run, x, use_reentrant=False) if step.checkpointed else run(x)
        for layer in layers:
            layer.train()
        self.in_forward = False
        return y

    def scale(self):
        return self.ranks.world.loss_scale(self.program.sizes[self.ranks.rank])

    def copy(self, step):
        self.calls.update({f"copy.{name}": calls for name, calls in self.calls.items()})
        copied = copy.deepcopy(self.model)
        self.layers |= {f"copy.{name}": layer for name, layer in copied.items()}
        self.warm(copied.values())

    def average_gradients(self, step):
        self.ranks.world.average_gradients(self.model)

    def raise_together(self, step):
        self.ranks.world.raise_together(None)

    def set(self, step):
        setattr(self.layers[step.layers[0]], step.how, step.value)


class Exact:
    """Torch's batch norm in one process, on the rows of all ranks of a group; running statistics of each of them."""

    def __init__(self, program, rank):
        self.program, self.outputs = program, {}
        self.members = program.members(rank)
        self.rows = program.rows(self.members)
        ends = [program.rows([r]) for r in self.members]
        self.parts = [slice(part.start - self.rows.start, part.stop - self.rows.start) for part in ends]
        self.layers = {name: self.make(name) for name in program.settings}

    def make(self, name):
        program, options = self.program, self.program.settings[name]
        one = nn.BatchNorm1d(program.C, dtype=torch.float64, **options)
        fresh = (0, torch.zeros(program.C, dtype=torch.float64), torch.ones(program.C, dtype=torch.float64))
        return SimpleNamespace(one=randomize(program, one, name), history=[[fresh] for _ in self.members])

    def forward(self, step, x):
        everyone, mask = range(len(self.parts)), None
        if step.masked:
            mask = weights(self.program, step.out, x.size(2)).double()
            for rank in set(range(len(self.program.sizes))) - set(step.masked):
                mask[self.program.rows([rank])] = 1.0
            mask = mask[self.rows]
        with torch.set_grad_enabled(step.how not in programs.NO_GRAD):
            for name in step.layers:
                layer, x = self.layers[name], torch.tanh(x)
                if step.how in programs.SYNCHRONISED:
                    x = self.normalize(layer, x, mask, everyone)
                    continue
                parts = []
                for place, part in enumerate(self.parts):
                    if step.how == "no_sync":
                        own = None if mask is None else mask[part]
                        parts.append(self.normalize(layer, x[part], own, [place]))
                    else:
                        _, mean, var = layer.history[place][-1]
                        w, b, eps = layer.one.weight, layer.one.bias, layer.one.eps
                        parts.append(F.batch_norm(x[part], mean, var, w, b, eps=eps))
                x = torch.cat(parts)
        return x

    def normalize(self, layer, x, mask, places):
        """Normalises x by its own statistics, and moves those of some ranks: one entry of their history a call."""
        one = layer.one
        if len(x) == 0:  # counted, as torch does, and no more
            count, *before = layer.history[places[0]][-1]
            layer.history[places[0]].append((count + 1, *before))
            return x
        if mask is None:
            mean, var = (torch.zeros(self.program.C, dtype=torch.float64) for _ in range(2))
            y = F.batch_norm(x, mean, var, one.weight, one.bias, training=True, momentum=1.0, eps=one.eps)
        else:
            y, mean, var = weighted(x, mask.unsqueeze(1), one)
        for place in places if one.track_running_stats else ():
            count, *before = layer.history[place][-1]
            factor = 1.0 / (count + 1) if one.momentum is None else one.momentum
            moved = (old + factor * (new - old) for old, new in zip(before, (mean, var), strict=True))
            layer.history[place].append((count + 1, *moved))
        return y

    def scale(self):
        counts = torch.tensor(self.program.sizes, dtype=torch.float64)
        return (counts * len(counts) / counts.sum()).repeat_interleave(counts.long()).view(-1, 1, 1)

    def copy(self, step):
        self.layers |= {f"copy.{name}": copy.deepcopy(layer) for name, layer in self.layers.items()}

    def average_gradients(self, step):
        """The sum over the ranks, which is compared, stays the same."""

    def raise_together(self, step):
        """There is no error."""


def weighted(x, mask, one):
    """Output, mean and unbiased variance where values count as often as the mask says."""
    count = mask.sum()
    mean = (x * mask).sum((0, 2), keepdim=True) / count
    var = ((x - mean).square() * mask).sum((0, 2), keepdim=True) / count
    y = (x - mean) / (var + one.eps).sqrt()
    if one.affine:
        y = y * one.weight.view(-1, 1) + one.bias.view(-1, 1)
    return y, mean.detach().flatten(), var.detach().flatten() * count / (count - 1)


def randomize(program, layer, name):
    with torch.no_grad():
        for kind, parameter in layer.named_parameters():
            parameter.copy_(1.0 + 0.3 * noise(program, name + kind, program.C))
    return layer
