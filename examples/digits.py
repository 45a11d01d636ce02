# SPDX-License-Identifier: BSD-3-Clause
"""Train a residual network on real images, the batch of 8 processed in three ways.

The same weights, images, order and SGD each time:

    one process    rank 0 computes the whole batch with torch.nn.BatchNorm2d; the others sleep in a barrier
    BatchNorm2d    each process normalises its own 2 images; gradients are averaged
    SyncBatchNorm  the same, after syncbn.convert_sync_batchnorm

    $ NPROC=4 launch/mpirun.sh examples/digits.py
    | arm           |   test accuracy |   difference, step 20 |   step 300 |   s / step |
    |---------------|-----------------|-----------------------|------------|------------|
    | one process   |           0.978 |               0.0e+00 |    0.0e+00 |     0.0020 |
    | BatchNorm2d   |           0.939 |               6.1e-02 |    3.0e-01 |     0.0044 |
    | SyncBatchNorm |           0.978 |               1.2e-07 |    7.2e-07 |     0.0120 |
    Batch of 8 on 4 processes (shm), float32; difference: the largest of any parameter to the one-process run
    curves: out/digits.png
    SyncBatchNorm tracks the one-process run to rounding: 1.2e-07. BatchNorm2d: 6.1e-02.

Also `python examples/digits.py` (one process) and `NPROC=4 launch/torchrun.sh examples/digits.py`. Your own
images: `--data FILE.npz` with x (N, H, W) or (N, C, H, W) and y (N,) integers; a fifth, at most 1000, is kept
for the test. Exit code 1 if SyncBatchNorm leaves the one-process run, 2 if an option or the data is wrong.
"""

import copy
import itertools
import time

import digits_model
import digits_options
import torch
from digits_report import Arm, show
from together import agree
from torch.nn import functional as F
from tqdm import tqdm

import syncbn


def shuffled(count, batch_size, seed):
    """Whole batches of indices without end, the same on every rank."""
    order = torch.Generator().manual_seed(seed)
    while True:
        batches = torch.randperm(count, generator=order).split(batch_size)
        yield from (batch for batch in batches if len(batch) == batch_size)


def train(world, arm, model, data, args, reference, *, alone=False):
    """Trains one arm: one step of SGD per batch, on this rank's local batch or, if ``alone``, on the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    batches = itertools.islice(shuffled(len(data.x), args.batch, args.seed), args.steps)
    progress = tqdm(batches, arm.name, args.steps, ncols=79, disable=world.rank > 0)
    for step, batch in enumerate(progress, 1):
        began = time.perf_counter()
        mine = batch if alone else batch.tensor_split(world.size)[world.rank]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.x[mine]), data.y[mine], reduction="sum")
        if alone:
            (loss / len(batch)).backward()
        else:
            # Every sample must have the same weight before backward, which communicates in SyncBatchNorm. A mean over
            # each local batch would be wrong for local batches of 3, 3 and 2.
            (loss * world.size / len(batch)).backward()
            world.average_gradients(model)
        optimizer.step()
        arm.seconds.append(time.perf_counter() - began)
        if world.rank == 0:
            arm.observe(step, args.steps, model, data, reference)


def main():
    world = syncbn.init(device="cpu")
    args, data = digits_options.read(world)
    torch.set_num_threads(1)  # there is at least one process per core
    model = digits_model.build(data.x.size(1), data.classes, seed=args.seed, dtype=data.x.dtype)
    world.broadcast(model)

    arms = [Arm("one process"), Arm("BatchNorm2d"), Arm("SyncBatchNorm")]
    reference = {}  # step -> parameters of the one-process run, on rank 0
    if world.rank == 0:
        train(world, arms[0], copy.deepcopy(model), data, args, reference, alone=True)
    world.barrier()
    train(world, arms[1], copy.deepcopy(model), data, args, reference)
    train(world, arms[2], syncbn.convert_sync_batchnorm(model), data, args, reference)

    processes = f"{world.size} process{'es' if world.size > 1 else ''} ({world.transport.name})"
    error = show(arms, args, processes) if world.rank == 0 else None
    agree(world, error, exit_code=1)


if __name__ == "__main__":
    main()
