import torch

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
syncbn.convert_sync_batchnorm(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
steps = 3 if world.rank == 0 else 1  # this rank's batches
with syncbn.join(model, optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, 4)
        (model(x).square().mean() * world.loss_scale(len(x))).backward()
        world.average_gradients(model)
        optimizer.step()
if world.rank == 1:
    print(f"rank 1 made {steps} step and counted", end=" ")
    print(f"{model[1].num_batches_tracked.item()} batches")
world.check(model)  # raises if ranks have different models
