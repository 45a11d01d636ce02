import torch

import syncbn

# --8<-- [start:init]
world = syncbn.init()  # under mpirun, srun, torchrun, or alone
# --8<-- [end:init]
torch.manual_seed(0)
conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
model = torch.nn.Sequential(conv, norm, torch.nn.ReLU())
# --8<-- [start:convert]
syncbn.convert_sync_batchnorm(model)
# --8<-- [end:convert]
x = torch.randn(12, 3, 8, 8)  # the global batch; each rank takes a part
model(x[world.rank :: world.size]).square().mean().backward()
# --8<-- [start:average]
world.average_gradients(model)  # or wrap the model in DDP
# --8<-- [end:average]
if world.rank == 0:
    print(f"running variance {model[1].running_var[0]:.4f}")
    print(f"gradient         {conv.weight.grad.norm():.4f}")
