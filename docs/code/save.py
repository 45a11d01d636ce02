import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

world = syncbn.init(torch_distributed=True)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
model = DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rng = torch.Generator().manual_seed(world.rank)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8, generator=rng)).square().mean().backward()
    optimizer.step()

if world.rank == 0:  # alone: eval sends nothing
    inner = model.module.eval()
    with torch.no_grad():
        print(f"evaluated: {inner(torch.ones(1, 3, 8, 8)).mean():.4f}")
    torch.save(inner.state_dict(), "model.pt")
world.barrier()  # the others wait here, as long as it takes
