import torch
from torch import nn

import syncbn

LENGTHS = [[5, 2], [3, 6]]  # of the sequences of rank 0 and of rank 1

world = syncbn.init()
torch.manual_seed(0)
sequences = [[torch.randn(4, n) + 1 for n in own] for own in LENGTHS]

# --8<-- [start:mask]
mine = sequences[world.rank]
longest = max(s.size(1) for s in mine)
x = torch.zeros(len(mine), 4, longest)  # (N, C, L)
mask = torch.zeros(len(mine), longest, dtype=torch.bool)  # (N, L)
for i, s in enumerate(mine):
    x[i, :, : s.size(1)] = s
    mask[i, : s.size(1)] = True

layer = syncbn.SyncBatchNorm(4)
y = layer(x, mask=mask)
loss = y.transpose(1, 2)[mask].sin().sum()  # of the unmasked values
# --8<-- [end:mask]
loss.backward()

plain = nn.BatchNorm1d(4)  # all values of both ranks, no padding
values = [torch.cat([s.T for s in own]) for own in sequences]
expected = plain(torch.cat(values)).split([len(v) for v in values])
output = torch.allclose(
    y.transpose(1, 2)[mask], expected[world.rank], atol=1e-6
)
var = torch.allclose(layer.running_var, plain.running_var)
if world.rank == 0:
    print("output, as without padding:", output)
    print("running statistics, as without padding:", var)
