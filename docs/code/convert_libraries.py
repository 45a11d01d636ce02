# needs: segmentation_models_pytorch, monai, torch_geometric
import segmentation_models_pytorch as smp
from monai.networks.nets import UNet
from torch_geometric.nn import GCN

import syncbn

models = {
    "smp.Unet": smp.Unet("resnet18", encoder_weights=None),
    "monai UNet": UNet(
        3, 1, 2, channels=(4, 8, 16), strides=(2, 2), norm="batch"
    ),
    "PyG GCN": GCN(6, 8, num_layers=3, norm="BatchNorm"),
}
for name, model in models.items():
    syncbn.convert_sync_batchnorm(model)
    rows = syncbn.summary(model).rows
    kinds = {row.kind for row in rows if row.synchronised}
    left = sum(row.local for row in rows)
    print(f"{name}: {len(rows)} of {kinds}, {left} left")
