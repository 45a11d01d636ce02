import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn


def build():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU()
    return nn.Sequential(*layers, nn.Linear(8, 3))


rng = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(80, 4, generator=rng), torch.arange(80) % 3)
accelerator = Accelerator(cpu=True)

# --8<-- [start:change]
model = syncbn.convert_sync_batchnorm(build())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=4)  # of each rank
ddp, optimizer, loader = accelerator.prepare(model, optimizer, loader)
# --8<-- [end:change]
for x, y in loader:
    optimizer.zero_grad()
    accelerator.backward(nn.functional.cross_entropy(ddp(x), y))
    optimizer.step()

alone = build()  # in one process, to compare
optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
for x, y in DataLoader(data, batch_size=8):
    optimizer.zero_grad()
    nn.functional.cross_entropy(alone(x), y).backward()
    optimizer.step()
ours, theirs = model.state_dict(), alone.state_dict()
same = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
size = accelerator.num_processes
accelerator.print(f"{size} processes, 10 steps, as one process: {same}")
accelerator.end_training()
