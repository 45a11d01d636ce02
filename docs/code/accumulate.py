import copy
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

MICRO = 4  # micro batches of one step

world = syncbn.init(torch_distributed=True)
torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
batches = torch.randn(MICRO, 2 * world.size, 3, 8, 8)  # of all ranks

model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
model = DistributedDataParallel(model)
# --8<-- [start:step]
for i, batch in enumerate(batches):
    last = i == MICRO - 1
    with nullcontext() if last else model.no_sync():
        loss = model(batch[world.rank :: world.size]).square().mean()
        (loss / MICRO).backward()
# --8<-- [end:step]

for batch in batches:  # the same in one process
    (plain(batch).square().mean() / MICRO).backward()
(conv, norm, _), (one_conv, one_norm, _) = model.module, plain
statistics = torch.allclose(norm.running_var, one_norm.running_var)
gradient = torch.allclose(conv.weight.grad, one_conv.weight.grad, atol=1e-6)
if world.rank == 0:
    print("batches counted:", norm.num_batches_tracked.item())
    print("running statistics of one process:", statistics)
    print("gradient of one process:", gradient)
