import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
syncbn.convert_sync_batchnorm(model)
batches = torch.randn(10, 8, 4)[:, world.rank :: world.size]

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
# --8<-- [start:ema]
average = get_ema_multi_avg_fn(0.9)
ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
for x in batches:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    world.average_gradients(model)
    optimizer.step()
    ema.update_parameters(model)
# --8<-- [end:ema]
world.check(ema)  # raises where the average differs between ranks

# --8<-- [start:call]
state = {name: value.clone() for name, value in model.state_dict().items()}
y = functional_call(model, state, batches[0])
# --8<-- [end:call]
moved = not torch.equal(state["1.running_var"], model[1].running_var)
if world.rank == 0:
    print("the EMA has a layer of its own:", type(ema.module[1]).__name__)
    print("the given buffers moved, those of the model did not:", moved)
