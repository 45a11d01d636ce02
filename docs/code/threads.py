import threading

import torch
from torch import nn

import syncbn


def build(seed, group=None):
    torch.manual_seed(seed)
    norm = syncbn.SyncBatchNorm(8, process_group=group)
    return nn.Sequential(nn.Linear(6, 8), norm)


def train(model):
    rng = torch.Generator().manual_seed(world.rank)
    for _ in range(20):
        model(torch.randn(4, 6, generator=rng)).sin().mean().backward()


world = syncbn.init(device="cpu")
# --8<-- [start:threads]
groups = [world.subgroup(world.size) for _ in range(2)]  # on one thread
models = [build(seed, group) for seed, group in enumerate(groups)]
threads = [threading.Thread(target=train, args=(m,)) for m in models]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
# --8<-- [end:threads]

alone = [build(seed) for seed in range(2)]
for model in alone:  # one after the other
    train(model)
pairs = zip(models, alone, strict=True)
same = all(torch.equal(a[1].running_var, b[1].running_var) for a, b in pairs)
if world.rank == 0:
    print("as one after the other:", same)
