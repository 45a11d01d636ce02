import torch
from torch import nn

import syncbn

world = syncbn.init()  # of 4 ranks
values = torch.tensor([[0.0], [1.0]]) + 10 * world.rank

blocks = syncbn.SyncBatchNorm(1, momentum=None, group_size=2)
everyone = syncbn.SyncBatchNorm(1, momentum=None)

group = world.subgroup(2)  # ranks 0 and 1, and ranks 2 and 3
own = world.within(group)  # a World of two ranks
torch.manual_seed(world.rank // 2)  # a model for each group
model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4))
syncbn.convert_sync_batchnorm(model, group)
model(values).sin().sum().backward()
own.average_gradients(model)  # among the ranks of the group
own.check(model)

for name, layer in (("blocks", blocks), ("everyone", everyone)):
    layer(values)
    first = world.average(layer.running_mean, weight=world.rank < 2)
    last = world.average(layer.running_mean, weight=world.rank >= 2)
    if world.rank == 0:
        print(f"{name}: {first:.1f} on ranks 0-1, {last:.1f} on ranks 2-3")
