import copy

import torch
from torch import nn

import syncbn

world = syncbn.init()
torch.manual_seed(0)
plain = nn.Sequential(
    nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1)
)
critic = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
batch = torch.randn(4 * world.size, 6)


# --8<-- [start:penalty]
def penalty(critic, x):
    x = x.requires_grad_()
    scores = critic(x)
    (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return scores.mean() + (slope.norm(dim=1) - 1).square().mean()


penalty(critic, batch[world.rank :: world.size].clone()).backward()
world.average_gradients(critic)
# --8<-- [end:penalty]

penalty(plain, batch.clone()).backward()  # in one process
pairs = zip(critic.parameters(), plain.parameters(), strict=True)
same = all(torch.allclose(p.grad, q.grad, atol=1e-6) for p, q in pairs)
if world.rank == 0:
    print("gradient of the penalty, as in one process:", same)
