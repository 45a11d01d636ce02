# SPDX-License-Identifier: BSD-3-Clause
"""Code of model libraries that asks for a class of torch finds converted layers."""

import pytest
import timm
import torch
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, SplitBatchNorm2d
from timm.utils import freeze, unfreeze
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import DetectionModel

import syncbn
from tests.zoo.networks import CASES

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about themselves
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def groups(model):
    """The parameter names in each of the groups that ultralytics makes for an optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    trainer = BaseTrainer.__new__(BaseTrainer)  # whose constructor looks for data and a device
    trainer.args, trainer.data = type("Args", (), {"warmup_bias_lr": 0.0})(), {"nc": 4}
    optimizer = trainer.build_optimizer(model, name="SGD", lr=0.1, momentum=0.9, decay=0.01)
    return [(group["weight_decay"], sorted(names[id(p)] for p in group["params"])) for group in optimizer.param_groups]


def test_ultralytics_keeps_batch_norms_out_of_weight_decay():
    model = DetectionModel("yolov8n.yaml", nc=4, verbose=False)
    before = groups(model)
    decayed = {name for decay, names in before if decay for name in names}
    weights = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert len(weights) > 50
    assert not weights & decayed
    syncbn.convert_sync_batchnorm(model)
    assert groups(model) == before


def test_ultralytics_fuses_convolutions_with_converted_layers():
    model = DetectionModel("yolov8n.yaml", nc=4, verbose=False).eval()
    syncbn.convert_sync_batchnorm(model)
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)[0]
    fused = model.fuse(verbose=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=1e-3)


def frozen(convert):
    """The class and the running mean after a training step, of each layer of a network that timm froze."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=5).train()
    if convert:
        syncbn.convert_sync_batchnorm(model)
    freeze(model, ["conv_stem", "bn1", "blocks"])
    before = [layer.running_mean.clone() for layer in model.modules() if hasattr(layer, "running_mean")]
    model(torch.rand(4, 3, 32, 32))
    after = [layer.running_mean for layer in model.modules() if hasattr(layer, "running_mean")]
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return model, kinds, [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_timm_freezes_converted_layers_as_it_freezes_torchs():
    plain, kinds, still = frozen(convert=False)
    model, converted, stands = frozen(convert=True)
    assert stands == still
    assert sum(still) > 20
    assert [name for name, kind in converted.items() if "Frozen" in kind] == [
        name for name, kind in kinds.items() if "Frozen" in kind
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_every_converted_layer_is_an_instance_of_its_class():
    for name, case in CASES.items():
        model = case.build()
        before = {key: type(layer) for key, layer in model.named_modules() if isinstance(layer, BATCH_NORMS)}
        syncbn.convert_sync_batchnorm(model)
        assert before, name
        for key, cls in before.items():
            layer = model.get_submodule(key)
            assert isinstance(layer, cls), (name, key)
            assert isinstance(layer, syncbn.SyncBatchNorm), (name, key)


def test_a_class_that_would_lose_its_forward_is_refused():
    with pytest.raises(TypeError, match="SplitBatchNorm2d"):
        syncbn.convert_sync_batchnorm(nn.Sequential(SplitBatchNorm2d(4)))


@pytest.mark.parametrize("cls", [EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, FrozenBatchNorm2d])
def test_a_class_that_is_no_batch_norm_of_torch_stays(cls):
    model = nn.Sequential(cls(4))
    syncbn.convert_sync_batchnorm(model)
    assert type(model[0]) is cls
