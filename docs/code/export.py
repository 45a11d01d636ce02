import torch
from torch import nn

import syncbn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
syncbn.convert_sync_batchnorm(model)
model(torch.randn(6, 3, 8, 8))  # training
x = torch.randn(2, 3, 8, 8)

model.eval()
batch = torch.export.Dim("batch", min=1, max=64)
program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
same = torch.equal(program.module()(x), model(x))
print("torch.export:", same)
for node in program.graph.nodes:
    if node.op == "call_function":
        print(" ", node.target)

syncbn.revert_sync_batchnorm(model)  # torch's layers again, in place
print(f"reverted: {type(model[1]).__name__}")
