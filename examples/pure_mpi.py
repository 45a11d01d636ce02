# SPDX-License-Identifier: BSD-3-Clause
"""Data-parallel training with MPI alone: no torch.distributed, no DDP, and uneven local batches, one of them empty.

Eleven samples a step are spread unevenly, and the weights stay those of one process that sees all eleven.

    $ NPROC=5 launch/mpirun.sh examples/pure_mpi.py
    torch.distributed initialised: False
    local batches: 6, 3, 1, 1, 0
    10 steps, as in one process with the whole batch: True

With one process (`python examples/pure_mpi.py`) there is one local batch of 11.
"""

import torch
from torch import nn

import syncbn

BATCH = 11
ROUNDING = 1e-12  # float64, after ten steps


def build(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.Tanh(), nn.Linear(8, 8), norm(8), nn.Linear(8, 1)).double()


def main():
    world = syncbn.init(device="cpu")
    assert not torch.distributed.is_initialized()

    # Each local batch is half of the rest, and the last takes what is left: uneven, and empty on many ranks.
    sizes, left = [], BATCH
    for _ in range(world.size - 1):
        sizes.append((left + 1) // 2)
        left -= sizes[-1]
    sizes.append(left)

    model = build(syncbn.SyncBatchNorm)
    if world.rank > 0:
        nn.init.zeros_(model[0].weight)  # as if this rank had other weights
    world.broadcast(model)
    alone = build(nn.BatchNorm1d)  # what one process computes, for comparison
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, alone)]

    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(BATCH, 4, dtype=torch.float64, generator=generator)
        y = x.prod(dim=1, keepdim=True)
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Every sample has the weight 1 / BATCH in the loss. A mean over each local batch would give more weight to
        # the samples of a small one. Weights after backward cannot correct that, since the layers sum over all ranks
        # in backward. So: the sum over the local batch, times size / BATCH, as average_gradients divides by the size.
        loss = (model(x.split(sizes)[world.rank]) - y.split(sizes)[world.rank]).square().sum()
        (loss * world.size / BATCH).backward()
        world.average_gradients(model)
        (alone(x) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    pairs = zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
    same = all(torch.allclose(ours, expected, rtol=0, atol=ROUNDING) for ours, expected in pairs)
    world.raise_together(None if same else RuntimeError("The model left the one-process run."))
    if world.rank == 0:
        print(f"torch.distributed initialised: {torch.distributed.is_initialized()}")
        print(f"local batches: {', '.join(map(str, sizes))}")
        print(f"10 steps, as in one process with the whole batch: {same}")


if __name__ == "__main__":
    main()
