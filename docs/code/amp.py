import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
syncbn.convert_sync_batchnorm(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler(world.device.type, init_scale=1024.0)
rng = torch.Generator().manual_seed(world.rank)
dtypes = []
model[1].register_forward_hook(lambda _, x, y: dtypes.extend((x[0], y)))

# --8<-- [start:step]
for step in range(3):
    x = torch.randn(2, 3, 8, 8, generator=rng)
    optimizer.zero_grad()
    with torch.autocast(world.device.type, torch.float16):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    if step == 1 and world.rank == 1:  # an overflow on one rank
        model[0].weight.grad[0] = float("inf")
    world.average_gradients(model)  # before the scaler sees them
    scaler.step(optimizer)
    scaler.update()
    # --8<-- [end:step]
    scale = scaler.get_scale()
    same = world.average(scale) == scale
    if world.rank == 0:
        print(f"step {step}: scale {scale:.0f}, on all ranks: {same}")
if world.rank == 0:
    x, y = dtypes[:2]
    print(f"input {x.dtype}, output {y.dtype}")
    print(f"running_var {model[1].running_var.dtype}")
