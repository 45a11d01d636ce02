import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import syncbn


def build():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU()
    return nn.Sequential(*layers, nn.Linear(8, 4))


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


world = syncbn.init()
batches = torch.randn(10, 8, 4, generator=torch.Generator().manual_seed(1))
model = build()
# --8<-- [start:change]
syncbn.convert_sync_batchnorm(model)
mesh = init_device_mesh("cpu", (world.size,))
fully_shard(model, mesh=mesh)
# --8<-- [end:change]
state = train(model, batches[:, world.rank :: world.size])

theirs = train(build(), batches)  # in one process, to compare
ours = {name: whole(value) for name, value in state.items()}
same = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
if world.rank == 0:
    print("weights:", type(state["1.weight"]).__name__)
    print("running statistics:", type(state["1.running_var"]).__name__)
    print(f"{world.size} processes, 10 steps, as one process: {same}")
