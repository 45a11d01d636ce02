import copy

import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
first, last = nn.Linear(6, 8, bias=False), nn.Linear(8, 1)
plain = nn.Sequential(first, nn.BatchNorm1d(8), nn.SiLU(), last)
model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
parts = torch.randn(16, 7).split([4, 4, 4, 3, 1])  # 6 features, a target
batches = [parts[:3], parts[3:]][world.rank]  # 3 of them, and 2 shorter ones
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

# --8<-- [start:loop]
with syncbn.join(model, optimizer):
    for batch in batches:
        x, target = batch[:, :6], batch[:, 6:]
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        (loss * world.loss_scale(len(x))).backward()
        world.average_gradients(model)
        optimizer.step()
# --8<-- [end:loop]

one = torch.optim.Adam(plain.parameters(), lr=0.01)  # all in one process
for own in ((parts[0], parts[3]), (parts[1], parts[4]), (parts[2],)):
    x, target = torch.cat(own)[:, :6], torch.cat(own)[:, 6:]
    one.zero_grad()
    (plain(x) - target).square().mean().backward()
    one.step()
pairs = zip(model.parameters(), plain.parameters(), strict=True)
same = all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)
state = optimizer.state[model[0].weight]
world.check(model)  # the same on every rank, bit for bit
if world.rank == world.size - 1:
    print("batches of the last rank:", len(batches))
    print("steps of its optimizer:", int(state["step"]))
    print("parameters of one process:", same)
