import torch

import syncbn

world = syncbn.init()
torch.manual_seed(world.rank)  # ranks begin with different weights
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
syncbn.convert_sync_batchnorm(model)


def say(words):
    if world.rank == 0:
        print(words)


# --8<-- [start:broadcast]
world.broadcast(model)  # every rank has the model of rank 0 now
# --8<-- [end:broadcast]
# --8<-- [start:check]
remarks = world.check(model)  # raises if ranks have different models
say(f"check: {remarks}")
# --8<-- [end:check]
# --8<-- [start:loss_scale]
count = 3 if world.rank == 0 else 1  # local batches of unequal size
loss = model(torch.randn(count, 4)).square().mean()
scale = world.loss_scale(count)
(loss * scale).backward()
say(f"loss_scale: {scale}")  # 3 * 2 / (3 + 1)
# --8<-- [end:loss_scale]
# --8<-- [start:average_gradients]
world.average_gradients(model)  # between backward() and step()
# --8<-- [end:average_gradients]
# --8<-- [start:average]
rank = world.average(world.rank, weight=count)  # the same on every rank
say(f"average: {rank}")  # (0 * 3 + 1 * 1) / (3 + 1)
# --8<-- [end:average]
# --8<-- [start:subgroup]
group = world.subgroup(1)  # groups of one rank; 2 would be both ranks
# --8<-- [end:subgroup]
# --8<-- [start:within]
own = world.within(group)
say(f"within: rank {own.rank} of {own.size}")
# --8<-- [end:within]
# --8<-- [start:free]
world.free(group)  # after the last use of the group
# --8<-- [end:free]
# --8<-- [start:raise_together]
error = ValueError("no such image") if world.rank == 1 else None
try:
    world.raise_together(error)  # in place of raising on one rank
except ValueError as raised:
    say(f"raise_together: {raised}")
# --8<-- [end:raise_together]
# --8<-- [start:barrier]
world.barrier(timeout=60)  # waits until every rank is here
# --8<-- [end:barrier]
