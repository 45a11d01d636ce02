import textwrap

import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(world.rank)  # a mistake: another model on each rank
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
syncbn.convert_sync_batchnorm(model)
try:
    world.check(model)
except ValueError as error:
    if world.rank == 0:
        print(textwrap.fill(str(error), 78))

world.broadcast(model)  # that of rank 0. DDP does it when it is made
world.check(model)  # and once an epoch, for example
