import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import syncbn


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU()
        self.model = nn.Sequential(*layers, nn.Linear(8, 3))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


rng = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(80, 4, generator=rng), torch.arange(80) % 3)
options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
options |= {"enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", **options)
# --8<-- [start:change]
model = syncbn.convert_sync_batchnorm(Classifier())
trainer.fit(model, DataLoader(data, batch_size=4))
# --8<-- [end:change]

alone = Classifier()  # in one process, to compare: Lightning's order of data
order = DistributedSampler(data, num_replicas=1, rank=0)
optimizer = alone.configure_optimizers()
for step, batch in enumerate(DataLoader(data, batch_size=8, sampler=order)):
    optimizer.zero_grad()
    alone.training_step(batch, step).backward()
    optimizer.step()
ours, theirs = model.state_dict(), alone.state_dict()
same = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)
if trainer.global_rank == 0:
    print(f"{trainer.world_size} processes, as one process: {same}")
