# SPDX-License-Identifier: BSD-3-Clause
"""Small networks of model libraries, with random weights, and global batches for them.

A batch is a list of samples. ``collate`` makes the network's arguments of any part of it, the input that gets a
gradient first; ``call`` runs the network on them and returns one tensor.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and the shape of one sample of its input."""

    family: str
    build: Callable[[], torch.nn.Module]
    shape: tuple[int, ...] = (3, 32, 32)

    def samples(self, rng, count):
        return [torch.randn(self.shape, generator=rng, dtype=torch.float64) for _ in range(count)]

    def collate(self, samples):
        return (torch.stack(samples),)

    def call(self, model, arguments):
        return flat(model(*arguments))


class Graphs(Case):
    """A sample is a ring of nodes; no two are of one size."""

    def samples(self, rng, count):
        return [torch.randn(5 + i, *self.shape, generator=rng, dtype=torch.float64) for i in range(count)]

    def collate(self, samples):
        from torch_geometric.data import Batch, Data

        def ring(x):
            nodes = torch.arange(len(x))
            return Data(x=x, edge_index=torch.stack((nodes, (nodes + 1) % len(x))))

        batch = Batch.from_data_list([ring(x) for x in samples])
        return batch.x, batch.edge_index


def flat(output: Any) -> torch.Tensor:
    """One row for each sample, of all tensors that a network returns."""
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(part) for part in parts], 1)


def timm(name, **options):
    def build():
        import timm as library

        return library.create_model(name, pretrained=False, num_classes=5, **options)

    return build


def torchvisions(name):
    def build():
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=5)

    return build


def smp():
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet(
        "resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(32, 16, 8)
    )


def monai():
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm="batch")


def pyg():
    from torch_geometric.nn import BatchNorm, GCNConv, Sequential

    layers = [(GCNConv(6, 8), "x, edges -> x"), BatchNorm(8), torch.nn.ReLU(), (GCNConv(8, 4), "x, edges -> x")]
    return Sequential("x, edges", [*layers, BatchNorm(4)])


def yolo():
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", nc=4, verbose=False)


CASES = {
    "resnet50": Case("timm", timm("resnet50", channels=(16, 32, 64, 128), stem_width=16)),
    "efficientnet_b0": Case("timm", timm("efficientnet_b0")),
    "mobilenetv3_small": Case("timm", timm("mobilenetv3_small_050")),
    "regnetx_002": Case("timm", timm("regnetx_002")),
    "densenet121": Case("timm", timm("densenet121", growth_rate=8)),
    "ghostnet_050": Case("timm", timm("ghostnet_050", drop_rate=0.0)),
    "hrnet_w18_small": Case("timm", timm("hrnet_w18_small")),
    "shufflenet": Case("torchvision", torchvisions("shufflenet_v2_x0_5")),
    "U-Net, ResNet-18": Case("segmentation-models-pytorch", smp),
    "3d UNet": Case("MONAI", monai, (1, 16, 16, 16)),
    "GCN": Graphs("PyG", pyg, (6,)),
    "yolov8n": Case("ultralytics", yolo, (3, 64, 64)),
}
