import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 6 * 6, 10))


def train(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()

model = build()
# --8<-- [start:change]
syncbn.convert_sync_batchnorm(model)
ddp = DistributedDataParallel(model)
# --8<-- [end:change]

images, labels = torch.randn(10, 8, 3, 8, 8), torch.randint(10, (10, 8))
train(ddp, images[:, rank::size], labels[:, rank::size])

theirs = train(build(), images, labels)  # in one process, to compare
ours = model.state_dict()
same = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
if rank == 0:
    print(f"{size} processes, 10 steps, as one process: {same}")
dist.destroy_process_group()
