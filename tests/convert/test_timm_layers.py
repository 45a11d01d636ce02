# SPDX-License-Identifier: BSD-3-Clause
"""timm's batch norms convert with drop and activation. Here timm is an imitation; tests/zoo has the real one."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from tests import fake_timm


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    return fake_timm.install(monkeypatch)


def network():
    torch.manual_seed(0)
    half = lambda: nn.Dropout(0.5)  # noqa: E731
    norm = fake_timm.BatchNormAct2d(4, drop_layer=half, act_layer=nn.SiLU, momentum=0.3)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.BatchNorm2d(4))


def step(model, x):
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_does_all_that_it_did(training):
    model, x = network().double().train(training), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)
    layer, act = model[1], model[1].act
    assert convert_sync_batchnorm(model)[1] is layer
    assert type(layer) is syncbn.SyncBatchNormAct2d
    assert isinstance(layer, fake_timm.BatchNormAct2d)
    assert layer.act is act
    for ours, theirs in zip(step(model, x), step(expected, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert type(revert_sync_batchnorm(model)[1]) is fake_timm.BatchNormAct2d
    with pytest.raises(ValueError, match=r"SyncBatchNorm2d needs input\.dim\(\) == 4"):
        convert_sync_batchnorm(model)[1](torch.ones(4, 4))


def test_a_mask_passes():
    layer, x = convert_sync_batchnorm(network())[1], torch.randn(4, 4, 5, 5)
    mask = torch.rand(4, 5, 5) > 0.5
    plain = syncbn.SyncBatchNorm(4)
    torch.manual_seed(1)
    y = layer(x, mask)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer.act(layer.drop(plain(x, mask))))


def test_their_synchronised_layer_converts_and_comes_back():
    theirs, x = fake_timm.SyncBatchNormAct(4), torch.randn(4, 4, 5)
    assert convert_sync_batchnorm(theirs)(x).min() < 0  # nothing has given it an activation
    revert_sync_batchnorm(theirs).act = nn.ReLU()
    layer = convert_sync_batchnorm(theirs, group_size=1)
    assert type(layer) is syncbn.SyncBatchNormAct
    assert not isinstance(layer, nn.SyncBatchNorm)  # DDP refuses that class on CPU
    assert layer(x).min() == 0
    layer.process_group = None
    assert type(revert_sync_batchnorm(layer)) is fake_timm.SyncBatchNormAct
    assert layer.process_group is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_come_back(copied):
    model = convert_sync_batchnorm(nn.Sequential(fake_timm.BatchNormAct2d(4)))
    other = copied(model)
    assert type(other[0]) is syncbn.SyncBatchNormAct2d
    assert b"timm_layers" not in pickle.dumps(model)
    assert type(revert_sync_batchnorm(other)[0]) is fake_timm.BatchNormAct2d


def test_a_layer_made_by_hand_reverts_to_their_class():
    layer = syncbn.SyncBatchNormAct2d(4, act_layer=nn.SiLU, group_size=1, renorm_limits=(2.0, 1.0))
    assert isinstance(layer.act, nn.SiLU)
    assert layer.renorm_limits == (2.0, 1.0)
    assert layer(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)
    assert type(revert_sync_batchnorm(layer, otherwise=nn.BatchNorm2d)) is fake_timm.BatchNormAct2d


def test_a_patch_of_their_forward_is_refused(monkeypatch):
    convert_sync_batchnorm(fake_timm.BatchNormAct2d(4))  # their classes are known from here on
    monkeypatch.setattr(fake_timm.BatchNormAct2d, "forward", lambda self, x: x)
    with pytest.raises(TypeError, match=r"its class is patched \(BatchNormAct2d\.forward\)"):
        convert_sync_batchnorm(fake_timm.BatchNormAct2d(4))


def test_a_subclass_of_theirs_is_refused():
    class Own(fake_timm.BatchNormAct2d):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"its forward .*Own\) would be lost; pass replace=\{Own: function\}"):
        convert_sync_batchnorm(Own(4))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_graph_activates_once(hooked):
    model, x = nn.Sequential(fake_timm.BatchNormAct2d(4, act_layer=nn.SELU)), torch.randn(4, 4, 5, 5)
    convert_sync_batchnorm(model)
    if hooked:
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    for ours, theirs in zip(step(graph, x), step(model, x), strict=True):
        assert torch.equal(ours, theirs)


def test_without_timm_their_names_are_an_error_and_conversion_is_not(monkeypatch):
    for name in ("timm.layers.norm_act", "timm.layers", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ImportError, match="timm"):
        syncbn.SyncBatchNormAct2d  # noqa: B018
    with pytest.raises(AttributeError, match="module 'syncbn' has no attribute 'SyncBatchNormAct4d'"):
        syncbn.SyncBatchNormAct4d  # noqa: B018
    assert type(convert_sync_batchnorm(nn.BatchNorm2d(3))) is syncbn.SyncBatchNorm2d
