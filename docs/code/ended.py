import torch

import syncbn

world = syncbn.init()
layer = syncbn.SyncBatchNorm(4)
layer(torch.randn(2, 4))
if world.rank == 1:
    raise SystemExit(0)  # this rank leaves early
try:
    layer(torch.randn(2, 4))
except syncbn.RankEndedError as error:
    print(type(error).__name__)
    print(str(error).partition(", while")[0])
