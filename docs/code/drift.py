import copy

import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
)


def train(model, steps=20):
    """Some steps of your training; here one picture a process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        light = 0.5 + torch.rand(world.size, 1, 1, 1)
        pictures = light + 0.3 * torch.randn(world.size, 3, 24, 24)
        optimizer.zero_grad()
        model(pictures[world.rank :][:1]).square().mean().backward()
        world.average_gradients(model)
        optimizer.step()


# --8<-- [start:drift]
probe = syncbn.convert_sync_batchnorm(copy.deepcopy(model))
with syncbn.drift(probe) as report:
    train(probe)
layers = report.recommend(0.9)
syncbn.convert_sync_batchnorm(model, only=layers)
# --8<-- [end:drift]
if world.rank == 0:
    for row in report.rows:
        drift, noise = row.mean_drift, row.mean_expected
        print(f"{row.name}: drift {drift:.2f}, independent {noise:.2f}")
    print("synchronise", layers)
