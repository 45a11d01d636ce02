import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
syncbn.convert_sync_batchnorm(model)
averaged = AveragedModel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.randn(30, 3, 8, 8)
mine = data.tensor_split([20])[world.rank]  # 20 images and 10
for batch in mine[:8].split(4):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    world.average_gradients(model)
    optimizer.step()
    averaged.update_parameters(model)

# --8<-- [start:recalibrate]
averaged.eval()  # turns dropout off; the layers sum all the same
syncbn.recalibrate(averaged, mine.split(4))  # 5 batches, and 3
# --8<-- [end:recalibrate]

conv, norm, _ = averaged.module
with torch.no_grad():
    inputs = conv(data).transpose(0, 1).flatten(1)  # of all ranks
mean = torch.allclose(norm.running_mean, inputs.mean(1), atol=1e-6)
var = torch.allclose(norm.running_var, inputs.var(1))
if world.rank == 0:
    print("batches counted:", norm.num_batches_tracked.item())
    print("mean and variance of all the data:", mean and var)
