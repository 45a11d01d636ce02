import copy

import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
# fullgraph: a graph break would be an error. Leave backend out to get the
# default, inductor, which is faster and takes longer to compile.
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

for batch in torch.randn(3, 6, 3, 8, 8):
    mine = batch[:2] if world.rank == 0 else batch[2:]  # of unequal size
    model.zero_grad()
    loss = compiled(mine).square().mean() * world.loss_scale(len(mine))
    loss.backward()
    world.average_gradients(model)
    plain.zero_grad()
    plain(batch).square().mean().backward()  # in one process, eager

pairs = zip(model.parameters(), plain.parameters(), strict=True)
same = all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in pairs)
var = torch.allclose(model[1].running_var, plain[1].running_var)
if world.rank == 0:
    print("gradients of one process:", same)
    print("running statistics of one process:", var)
