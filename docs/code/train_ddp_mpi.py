import copy

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

# --8<-- [start:change]
world = syncbn.init(torch_distributed=True)
# --8<-- [end:change]
torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
ddp = DistributedDataParallel(model)

images = torch.randn(8, 3, 8, 8)  # of all ranks
ddp(images[world.rank :: world.size]).square().mean().backward()

plain(images).square().mean().backward()  # in one process, to compare
gradients = model[0].weight.grad, plain[0].weight.grad
same = torch.allclose(*gradients, atol=1e-6)
if world.rank == 0:
    print(f"{world.size} processes, gradient of one process: {same}")
