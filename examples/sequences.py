# SPDX-License-Identifier: BSD-3-Clause
"""Padded sequences of different lengths: with a mask, padding of any length counts in no statistic.

Each process pads its own sequences to its own longest; the last of several has nothing but padding. Every process
checks its layer against the values of all sequences, end to end and without padding, in one process.

    $ NPROC=3 launch/mpirun.sh examples/sequences.py
    lengths: rank 0: 5, 2 | rank 1: 3, 6 | rank 2: none
    with the mask, as without padding: output True, gradient True, running statistics True
    without the mask: output False, gradient False, running statistics False

    $ python examples/sequences.py
    lengths: rank 0: 5, 2, 3, 6
    with the mask, as without padding: output True, gradient True, running statistics True
    without the mask: output False, gradient False, running statistics False

`NPROC=3 launch/torchrun.sh examples/sequences.py` prints the same.
"""

import torch
from torch import nn

import syncbn

LENGTHS = [5, 2, 3, 6]
C = 4
ROUNDING = 1e-12  # float64


def share(world):
    """Which sequences this process holds; the last process of several holds none."""
    holders = max(1, world.size - 1)
    return [
        torch.arange(len(LENGTHS)).tensor_split(holders)[r].tolist() if r < holders else [] for r in range(world.size)
    ]


def pad(sequences, lengths):
    """(N, C, L) with zeros after each sequence, and the mask (N, L); one row of padding if there is no sequence."""
    longest = max(lengths, default=3)
    x = torch.zeros(max(1, len(sequences)), C, longest, dtype=torch.float64)
    mask = torch.zeros(len(x), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        x[row, :, : sequence.size(1)] = sequence
        mask[row, : sequence.size(1)] = True
    return x.requires_grad_(), mask


def loss_of(y):
    return (y.sin() * y).sum()


def compare(layer, x, mask, exact, mine):
    """Runs one training step. Returns whether output, gradient and statistics are those without padding."""
    y = layer(x) if mask is None else layer(x, mask=mask)
    valid = mask if mask is not None else x.detach().abs().sum(1) > 0
    values = y.transpose(1, 2)[valid]  # (all lengths, C)
    (gradient,) = torch.autograd.grad(loss_of(values), x)
    pairs = (
        (values, exact["y"][mine]),
        (gradient.transpose(1, 2)[valid], exact["gradient"][mine]),
        (torch.stack((layer.running_mean, layer.running_var)), exact["statistics"]),
    )
    return [torch.allclose(ours, right, rtol=0, atol=ROUNDING) for ours, right in pairs]


def main():
    world = syncbn.init(device="cpu")
    torch.manual_seed(0)
    sequences = [3 + 2 * torch.randn(C, length, dtype=torch.float64) for length in LENGTHS]

    together = torch.cat([s.T for s in sequences]).requires_grad_()  # (16, C): no padding at all
    plain = nn.BatchNorm1d(C, dtype=torch.float64)
    y = plain(together)
    (gradient,) = torch.autograd.grad(loss_of(y), together)
    exact = {"y": y, "gradient": gradient, "statistics": torch.stack((plain.running_mean, plain.running_var))}

    held = share(world)
    lengths = [[LENGTHS[i] for i in own] for own in held]
    before = sum(sum(own) for own in lengths[: world.rank])
    mine = slice(before, before + sum(lengths[world.rank]))
    x, mask = pad([sequences[i] for i in held[world.rank]], lengths[world.rank])

    lines = []
    for name, own in (("with the mask, as without padding", mask), ("without the mask", None)):
        layer = syncbn.SyncBatchNorm(C, dtype=torch.float64)
        same = torch.tensor(compare(layer, x, own, exact, mine), dtype=torch.float64)
        # It must hold on every rank. A rank without values finds no difference.
        everywhere = (world.transport.all_reduce(same) == world.size).tolist()
        lines.append(f"{name}: " + ", ".join(
            f"{what} {ok}" for what, ok in zip(("output", "gradient", "running statistics"), everywhere, strict=True)
        ))  # fmt: skip
    if world.rank == 0:
        texts = (f"rank {r}: {', '.join(map(str, own)) or 'none'}" for r, own in enumerate(lengths))
        print("lengths: " + " | ".join(texts), *lines, sep="\n")


if __name__ == "__main__":
    main()
