import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.utils.data import DataLoader

import syncbn


# --8<-- [start:plugin]
class SyncBatchNormSync(LayerSync):
    """Converts the model when the fit begins, and back when it ends."""

    def apply(self, model):
        return syncbn.convert_sync_batchnorm(model)

    def revert(self, model):
        return syncbn.revert_sync_batchnorm(model)


# --8<-- [end:plugin]


class Autoencoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def training_step(self, batch, index):
        if index == 0:
            print("in the fit:", type(self.model[1]).__name__)
        return (self.model(batch) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
options |= {"enable_progress_bar": False, "enable_model_summary": False}
# --8<-- [start:change]
trainer = pl.Trainer(
    accelerator="cpu",
    devices=1,  # as many as you start
    strategy="ddp",
    plugins=[SyncBatchNormSync()],
    **options,
)
# --8<-- [end:change]
lit = Autoencoder()
trainer.fit(lit, DataLoader(torch.randn(8, 4), batch_size=4))
print("after the fit:", type(lit.model[1]).__name__)
