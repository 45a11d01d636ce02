import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

world = syncbn.init()
torch.manual_seed(0)
block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
syncbn.convert_sync_batchnorm(block)
twin = copy.deepcopy(block)
x = torch.randn(2 * world.size, 3, 8, 8)[world.rank :: world.size]

y = checkpoint(block, x, use_reentrant=False)
y.square().mean().backward()
twin(x).square().mean().backward()

pairs = zip(block.parameters(), twin.parameters(), strict=True)
bits = all(torch.equal(p.grad, q.grad) for p, q in pairs)
if world.rank == 0:
    print("gradients have the same bits:", bits)
    print("batches counted:", block[1].num_batches_tracked.item())
