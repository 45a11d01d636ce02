# SPDX-License-Identifier: BSD-3-Clause
"""timm's own layers and functions; tests/convert/test_timm_layers.py tests the same on an imitation."""

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")


def step(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"act_layer": "silu"}, {"apply_act": False}, {"affine": False}])
def test_a_layer_with_activation_converts_and_comes_back(options, training):
    torch.manual_seed(0)
    layer = layers.BatchNormAct2d(4, **options).double().train(training)
    expected, x = copy.deepcopy(layer), torch.randn(4, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    convert_sync_batchnorm(layer)
    assert isinstance(layer, layers.BatchNormAct2d)
    for ours, theirs in zip(step(layer, x), step(expected, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is syncbn.SyncBatchNormAct2d
        assert type(revert_sync_batchnorm(copied)) is layers.BatchNormAct2d


def test_what_timms_conversion_makes_converts_and_trains_on_cpu():
    torch.manual_seed(0)
    plain = nn.Sequential(layers.BatchNormAct2d(4, act_layer="silu"), nn.BatchNorm2d(4)).double()
    model = convert_sync_batchnorm(layers.convert_sync_batchnorm(copy.deepcopy(plain)))
    assert [type(m) for m in model] == [syncbn.SyncBatchNormAct, syncbn.SyncBatchNorm]
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    for ours, theirs in zip(step(model, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert type(revert_sync_batchnorm(model)[0]) is layers.SyncBatchNormAct


def test_timms_conversion_is_refused():
    model = convert_sync_batchnorm(nn.Sequential(layers.BatchNormAct2d(4)))
    with pytest.raises(TypeError, match=r"of timm\.layers\.norm_act needs layers that are not synchronised yet; rec"):
        layers.convert_sync_batchnorm(model)
    assert type(model[0]) is syncbn.SyncBatchNormAct2d


def test_timms_freeze_finds_the_layers():
    from timm.utils.model import freeze_batch_norm_2d

    model = convert_sync_batchnorm(nn.Sequential(layers.BatchNormAct2d(4), nn.BatchNorm2d(4)))
    frozen = freeze_batch_norm_2d(model)
    assert [type(m).__name__ for m in frozen] == ["FrozenBatchNormAct2d", "FrozenBatchNorm2d"]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnetv2_18", "regnetx_002"])
def test_a_model_converts_and_trains_alike(name):
    torch.manual_seed(0)
    try:
        plain = timm.create_model(name, num_classes=3).double()
    except RuntimeError:
        pytest.skip(f"this timm has no {name}")
    model, x = convert_sync_batchnorm(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for seed, each in ((1, model), (1, plain)):
        torch.manual_seed(seed)
        each.outputs = each(x)
        each.outputs.square().sum().backward()
    torch.testing.assert_close(model.outputs, plain.outputs)
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: key + text)
    revert_sync_batchnorm(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_timms_feature_extractor_takes_a_model_in_training():
    pytest.importorskip("torchvision")
    from timm.layers import create_feature_extractor

    model = convert_sync_batchnorm(timm.create_model("mobilenetv3_small_050", num_classes=3))
    extractor = create_feature_extractor(model, ["blocks.1", "conv_head"])
    outputs = extractor(torch.randn(2, 3, 64, 64))
    assert len(outputs) == 2
    assert any(isinstance(m, syncbn.SyncBatchNormAct2d) for m in extractor.modules())
