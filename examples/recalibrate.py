# SPDX-License-Identifier: BSD-3-Clause
"""Averaged weights need their own statistics: accuracy before and after `syncbn.recalibrate`, on digits.

An average of the weights of many steps (SWA, EMA) often generalises better than the last ones, but no batch has
ever been through it: the running statistics in it are those of the last weights. One pass over the training images,
of which every process takes its part, makes them its own.

    $ NPROC=2 launch/mpirun.sh examples/recalibrate.py
    last weights                                   0.90
    averaged weights, statistics of the last ones  0.47
    averaged weights, recalibrated                 0.98
    statistics of 1438 images on 2 processes

`python examples/recalibrate.py` and `NPROC=3 launch/torchrun.sh examples/recalibrate.py` print the same numbers.
"""

import digits_data
import digits_model
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import syncbn

STEPS, BATCH, AVERAGE_FROM = 80, 60, 5


def train(world, model, data):
    """Trains on batches of which each rank takes a part, and averages the weights of the later steps."""
    averaged = AveragedModel(model)  # averages parameters, and copies the running statistics of the last ones
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)  # the same batches on every rank
    for step in range(STEPS):
        batch = torch.randint(len(data.x), (BATCH,), generator=generator).tensor_split(world.size)[world.rank]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.x[batch]), data.y[batch]) * world.loss_scale(len(batch))
        loss.backward()
        world.average_gradients(model)
        optimizer.step()
        if step >= AVERAGE_FROM:
            averaged.update_parameters(model)
    return averaged


def accuracy(model, data):
    """Eval does not communicate, so every rank may call this alone."""
    with torch.no_grad():
        return (model.eval()(data.test_x).argmax(1) == data.test_y).double().mean().item()


def main():
    world = syncbn.init(device="cpu")
    torch.set_num_threads(1)
    data = digits_data.load(None, smallest_batch=BATCH, seed=0)
    model = syncbn.convert_sync_batchnorm(digits_model.build(1, data.classes, seed=0, dtype=torch.float32))
    world.broadcast(model)
    averaged = train(world, model, data)

    results = {
        "last weights": accuracy(model, data),
        "averaged weights, statistics of the last ones": accuracy(averaged, data),
    }
    mine = data.x.tensor_split(world.size)[world.rank]  # sizes and numbers of batches may differ
    syncbn.recalibrate(averaged.eval(), mine.split(128), progress=True)
    results["averaged weights, recalibrated"] = accuracy(averaged, data)

    if world.rank == 0:
        for name, value in results.items():
            print(f"{name:46} {value:.2f}")
        print(f"statistics of {len(data.x)} images on {world.size} process{'es' if world.size > 1 else ''}")


if __name__ == "__main__":
    main()
