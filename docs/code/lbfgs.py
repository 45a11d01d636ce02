import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU())
model = syncbn.convert_sync_batchnorm(model).append(nn.Linear(8, 1))
world.broadcast(model)
data = torch.randn(24, 7)
mine = data[:8] if world.rank == 0 else data[8:]
x, target = mine[:, :6], mine[:, 6:]


# --8<-- [start:closure]
def closure():
    optimizer.zero_grad()
    loss = (model(x) - target).square().mean()
    (loss * world.loss_scale(len(x))).backward()
    world.average_gradients(model)
    return world.average(loss, weight=len(x))


# --8<-- [end:closure]
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
best, epochs = float("inf"), 0
while (loss := optimizer.step(closure)) < 0.9 * best:
    best, epochs = loss, epochs + 1  # all ranks stop at the same epoch
world.check(model)  # one model on all ranks
together = world.average(epochs) == epochs
if world.rank == 0:
    print("all ranks stopped at the same epoch:", together)
