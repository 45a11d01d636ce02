# SPDX-License-Identifier: BSD-3-Clause
"""The network, its batches, and the same steps on several processes, in one, and without synchronisation.

B global batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.world.world import World

STEPS = 4
LAYERS = 3
"""Batch norms in the network."""
_CLASSES, _SIZE, _SEED = 5, 8, 20
_RATE, _MOMENTUM = 0.05, 0.9


class Batch(NamedTuple):
    """A global batch: (B, 3, 8, 8), and the class of each sample."""

    x: Tensor
    target: Tensor


class Trained(NamedTuple):
    """What a training has left: to be compared."""

    parameters: list[Tensor]
    statistics: list[Tensor]
    """Of the batch norms: mean, variance, number of batches."""
    output: Tensor
    """Of the last step, in train mode."""
    evaluated: Tensor
    """The output for the last global batch in eval mode."""


def local_batches(W: int) -> list[int]:
    """Returns how many samples each rank has: uneven, and the last one has none if there are more than two."""
    counts = [4 + 2 * (3 * rank % 4) for rank in range(W)]
    return [*counts[:-1], 0] if W > 2 else counts


def batches(B: int, device: torch.device) -> list[Batch]:
    """Makes a global batch for each step, the same on every rank. Samples differ in mean and scale along the batch."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    along = torch.linspace(-1.0, 1.0, B, device="cpu").view(B, 1, 1, 1)
    made = []
    for _ in range(STEPS):
        x = torch.randn(B, 3, _SIZE, _SIZE, generator=generator, device="cpu") * (1.5 + along) + along
        target = torch.randint(_CLASSES, (B,), generator=generator, device="cpu")
        made.append(Batch(x.to(device), target.to(device)))
    return made


def network(device: torch.device) -> nn.Module:
    """Makes the network, the same on every rank. It is smooth: a ReLU would turn a last bit into a whole gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False, device="cpu"),
            nn.BatchNorm2d(8, device="cpu"),
            nn.SiLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False, device="cpu"),
            nn.BatchNorm2d(16, device="cpu"),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16 * (_SIZE // 2) ** 2, 12, device="cpu"),
            nn.BatchNorm1d(12, device="cpu"),
            nn.SiLU(),
            nn.Linear(12, _CLASSES, device="cpu"),
        ).to(device)


def in_this_job(world: World, data: list[Batch], *, ddp: bool, tick: Callable[[], object]) -> Trained:
    """Trains on this rank's local batches, with every rank of the job.

    Args:
        world: the job.
        data: global batches.
        ddp: whether DistributedDataParallel averages the gradients, or World.average_gradients.
        tick: called after every step.

    Communication:
        That of a training.
    """
    counts = local_batches(world.size)
    first = sum(counts[: world.rank])
    mine = slice(first, first + counts[world.rank])
    model = syncbn.convert_sync_batchnorm(network(world.device))
    called = nn.parallel.DistributedDataParallel(model, **_devices(world)) if ddp else model
    scale = world.loss_scale(counts[world.rank]) / max(counts[world.rank], 1)

    def backward(batch: Batch) -> Tensor:
        output: Tensor = called(batch.x[mine])
        torch.autograd.backward(F.cross_entropy(output, batch.target[mine], reduction="sum") * scale)
        if not ddp:
            world.average_gradients(model)
        tick()
        return output

    return _train(model, data, backward)


def _devices(world: World) -> dict[str, Any]:
    return {} if world.device.type == "cpu" else {"device_ids": [world.device.index]}


def in_one_process(data: list[Batch], device: torch.device) -> Trained:
    """Trains on the global batches with torch's own layers."""
    model = network(device)

    def backward(batch: Batch) -> Tensor:
        output: Tensor = model(batch.x)
        torch.autograd.backward(F.cross_entropy(output, batch.target))
        return output

    return _train(model, data, backward)


def unsynchronised(data: list[Batch], device: torch.device, counts: list[int]) -> Trained:
    """Trains in one process as ranks would whose batch norms use their local batches alone."""
    model = network(device)

    def backward(batch: Batch) -> Tensor:
        outputs = []
        for x, target in zip(torch.split(batch.x, counts), torch.split(batch.target, counts), strict=True):
            if len(x):
                outputs.append(model(x))
                torch.autograd.backward(F.cross_entropy(outputs[-1], target, reduction="sum") / len(batch.x))
        return torch.cat(outputs)

    return _train(model, data, backward)


def _train(model: nn.Module, data: list[Batch], backward: Callable[[Batch], Tensor]) -> Trained:
    """Takes a step for each batch. ``backward`` computes the gradients and returns the output.

    The steps are those of torch.optim.SGD, which imports torch's compiler: that takes seconds.
    """
    parameters = list(model.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in data:
        model.zero_grad()
        output = backward(batch)
        with torch.no_grad():
            for parameter, velocity in zip(parameters, velocities, strict=True):
                assert parameter.grad is not None
                parameter.sub_(velocity.mul_(_MOMENTUM).add_(parameter.grad), alpha=_RATE)
    with torch.no_grad():
        evaluated = model.eval()(data[-1].x)
    return Trained([p.detach() for p in parameters], list(model.buffers()), output.detach(), evaluated)
