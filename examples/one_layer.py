# SPDX-License-Identifier: BSD-3-Clause
"""The guarantee in a few lines: five samples are one batch, for any split of them over the processes.

Their mean is 3 and their variance 2, so 1 becomes (1 - 3) / sqrt(2) = -1.414. A torch.nn.BatchNorm1d on each
process would give other values, and raise an error where a process has a single sample.

    $ NPROC=3 launch/mpirun.sh examples/one_layer.py
    rank 0 of 3: 1, 2 -> -1.414, -0.707
    rank 1 of 3: 3, 4 -> 0.000, 0.707
    rank 2 of 3: 5 -> 1.414

    $ python examples/one_layer.py
    rank 0 of 1: 1, 2, 3, 4, 5 -> -1.414, -0.707, 0.000, 0.707, 1.414

    $ NPROC=6 launch/mpirun.sh examples/one_layer.py
    rank 0 of 6: 1 -> -1.414
    rank 1 of 6: 2 -> -0.707
    rank 2 of 6: 3 -> 0.000
    rank 3 of 6: 4 -> 0.707
    rank 4 of 6: 5 -> 1.414
    rank 5 of 6: nothing -> nothing

`NPROC=3 launch/torchrun.sh examples/one_layer.py` prints the same.
"""

import time

import torch

import syncbn

world = syncbn.init(device="cpu")
layer = syncbn.SyncBatchNorm(1)

batch = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
x = batch.tensor_split(world.size)[world.rank]  # the local batch: uneven, and empty on a sixth process
y = layer(x)

before = ", ".join(f"{value:g}" for value in x.flatten().tolist()) or "nothing"
after = ", ".join(f"{value:.3f}" for value in (y.flatten() + 0.0).tolist()) or "nothing"
for rank in range(world.size):
    if rank == world.rank:
        print(f"rank {rank} of {world.size}: {before} -> {after}", flush=True)
        time.sleep(0.05)  # the launcher collects the lines: give it time to take this one before the next
    world.barrier()
