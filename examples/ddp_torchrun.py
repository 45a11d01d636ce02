# SPDX-License-Identifier: BSD-3-Clause
"""DistributedDataParallel around a converted model, over gloo: what to change in a script that uses DDP already.

Every process checks its copy of the model against training on the whole batch in one process.

    $ NPROC=2 launch/torchrun.sh examples/ddp_torchrun.py
    2 processes, statistics over shm, gradients over DDP
    10 steps, as in one process with the whole batch: True
    without the conversion: False

    $ NPROC=2 launch/mpirun.sh examples/ddp_torchrun.py
    2 processes, statistics over shm, gradients over DDP
    10 steps, as in one process with the whole batch: True
    without the conversion: False
"""

import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

ROUNDING = 1e-12  # float64, after ten steps


def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)]
    return nn.Sequential(*layers).double()


def train(model, batches):
    """Ten steps of SGD on a sum of squares; returns the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main():
    # Under torchrun that connects torch.distributed by itself; under mpirun DDP must be asked for.
    world = syncbn.init(torch_distributed=True, device="cpu")
    torch.set_num_threads(1)
    start = build()
    whole = torch.randn(10, 4 * world.size, 3, 8, 8, dtype=torch.float64)  # the same on every rank: build() seeds
    mine = whole.chunk(world.size, dim=1)[world.rank]  # equal local batches: DDP averages without weights

    expected = train(copy.deepcopy(start), whole)
    plain = train(DistributedDataParallel(copy.deepcopy(start)), mine)
    synchronised = train(DistributedDataParallel(syncbn.convert_sync_batchnorm(start)), mine)  # the one change

    difference = torch.stack([(synchronised - expected).abs().max(), -(plain - expected).abs().max()])
    torch.distributed.all_reduce(difference, torch.distributed.ReduceOp.MAX)  # of all ranks, the largest
    if world.rank == 0:
        print(f"{world.size} processes, statistics over {world.transport.name}, gradients over DDP")
        print(f"10 steps, as in one process with the whole batch: {difference[0].item() < ROUNDING}")
        print(f"without the conversion: {-difference[1].item() < ROUNDING}")


if __name__ == "__main__":
    main()
