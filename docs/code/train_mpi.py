import torch
from torch import nn

import syncbn


def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 6 * 6, 10))


def batches():
    rng = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(8, 3, 8, 8, generator=rng)
        yield x, torch.randint(10, (8,), generator=rng)


# --8<-- [start:change]
world = syncbn.init()
model = syncbn.convert_sync_batchnorm(build())
world.broadcast(model)  # all ranks start with the values of rank 0
# --8<-- [end:change]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
# --8<-- [start:loop]
for images, labels in batches():
    x, y = images[world.rank :: world.size], labels[world.rank :: world.size]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    world.average_gradients(model)
    optimizer.step()
# --8<-- [end:loop]

alone = build()  # in one process, to compare
optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
for x, y in batches():
    optimizer.zero_grad()
    nn.functional.cross_entropy(alone(x), y).backward()
    optimizer.step()
ours, theirs = model.state_dict(), alone.state_dict()
same = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
if world.rank == 0:
    print(f"{world.size} processes, 10 steps, as one process: {same}")
