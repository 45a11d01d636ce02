import torch
from torch import nn

import syncbn

state = torch.load("model.pt", weights_only=True)
print(*(f"{name} {tuple(t.shape)}" for name, t in state.items()), sep="\n")

plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
plain.load_state_dict(state)  # torch's layers: syncbn is not needed
own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
syncbn.convert_sync_batchnorm(own).load_state_dict(state)
for model in (plain, own):
    with torch.no_grad():
        y = model.eval()(torch.ones(1, 3, 8, 8)).mean()
    print(f"evaluated: {y:.4f} with {type(model[1]).__name__}")
