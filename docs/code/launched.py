import torch

import syncbn

world = syncbn.init()  # reads what the launcher has set
torch.manual_seed(0)
batch = torch.randn(12, 3)  # of all ranks
layer = syncbn.SyncBatchNorm(3)
layer(batch[world.rank :: world.size])  # each rank takes its part

alone = torch.nn.BatchNorm1d(3)
alone(batch)  # one process with the whole batch
same = torch.allclose(layer.running_mean, alone.running_mean)
if world.rank == 0:
    print(f"{world.launcher}: {world.size} processes,", end=" ")
    print("the statistics of one process:", same)
