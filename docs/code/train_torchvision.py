# needs: torchvision
import copy

import torch
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def train(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


world = syncbn.init()
torch.manual_seed(0)
model = torchvision.models.shufflenet_v2_x0_5(num_classes=10).double()
images = torch.randn(3, 4, 3, 64, 64, dtype=torch.float64)  # 3 steps
labels = torch.randint(10, (3, 4))
mine = slice(world.rank, None, world.size)
plain = copy.deepcopy(model)

# --8<-- [start:change]
syncbn.convert_sync_batchnorm(model)
ddp = DistributedDataParallel(model)
# --8<-- [end:change]
train(ddp, images[:, mine], labels[:, mine])

theirs = train(plain, images, labels)  # in one process, to compare
ours = model.state_dict()
same = all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in theirs)
if world.rank == 0:
    print(f"{world.size} processes, 3 steps, as one process: {same}")
