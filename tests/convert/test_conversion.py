# SPDX-License-Identifier: BSD-3-Clause
"""Conversion loses nothing, both ways."""

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.calls.sites import site_of

OURS = {
    nn.BatchNorm1d: syncbn.SyncBatchNorm1d,
    nn.BatchNorm2d: syncbn.SyncBatchNorm2d,
    nn.BatchNorm3d: syncbn.SyncBatchNorm3d,
    nn.SyncBatchNorm: syncbn.SyncBatchNorm,
    nn.LazyBatchNorm1d: syncbn.LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: syncbn.LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: syncbn.LazySyncBatchNorm3d,
}


def network():
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False)), nn.Flatten()
    )


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_torch_class_converts_and_comes_back(cls):
    layer = cls(4, eps=1e-3, momentum=None)
    state = list(layer.__dict__)
    assert convert_sync_batchnorm(layer) is layer
    assert type(layer) is OURS[cls]
    assert isinstance(layer, cls) == (cls is not nn.SyncBatchNorm)  # DDP refuses that class on CPU
    assert (layer.eps, layer.momentum) == (1e-3, None)
    assert revert_sync_batchnorm(layer) is layer
    assert type(layer) is cls
    assert sorted(layer.__dict__) == sorted(state)


def test_outputs_are_the_same_after_each_way():
    model = network()
    x = torch.randn(5, 2, 4)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(convert_sync_batchnorm(copy.deepcopy(model))(x), expected)
    assert torch.equal(revert_sync_batchnorm(convert_sync_batchnorm(model))(x), expected)


def test_parameters_buffers_hooks_and_flags_stay():
    model = network()
    layer = model[1]
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.weight.register_hook(lambda grad: calls.append("weight"))
    layer.bias.requires_grad_(False)
    layer.eval()
    layer.note = "a user's own attribute"
    before = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    convert_sync_batchnorm(model)
    after = {**dict(model[1].named_parameters()), **dict(model[1].named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model[1] is layer
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.note == "a user's own attribute"
    layer(torch.randn(2, 3)).sum().backward()
    assert calls == ["forward", "weight"]


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    convert_sync_batchnorm(model)
    assert model["a"] is model["b"][0]
    revert_sync_batchnorm(model)
    assert model["a"] is model["b"][0] is shared


def test_the_optimizer_stays_valid():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_batchnorm(model)
    before = model[1].weight.detach().clone()
    model(torch.randn(5, 2, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_a_patch_of_torchs_own_conversion_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", convert_sync_batchnorm)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.SyncBatchNorm(3))) is syncbn.SyncBatchNorm


@pytest.mark.parametrize("cls", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
@pytest.mark.parametrize("used", [False, True])
def test_a_lazy_layer_stays_lazy_and_comes_back(cls, used):
    dims = int(cls.__name__[-2])
    layer = convert_sync_batchnorm(cls(momentum=0.2))
    assert type(layer) is OURS[cls]
    assert isinstance(layer, cls)
    x = torch.randn(4, 6, *[2] * dims)
    if used:
        layer(x)
        assert type(layer) is OURS[cls.cls_to_become]
    revert_sync_batchnorm(layer)
    assert type(layer) is (cls.cls_to_become if used else cls)
    layer(x)
    assert layer.num_features == 6
    assert type(layer) is cls.cls_to_become


def test_other_norms_are_left_alone():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    kinds = [type(layer) for layer in model]
    assert [type(layer) for layer in convert_sync_batchnorm(model)] == kinds


def test_the_classmethod_of_torch_is_there():
    assert (
        type(syncbn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))[0]) is syncbn.SyncBatchNorm2d
    )


def test_converting_twice_is_converting_once():
    model = convert_sync_batchnorm(convert_sync_batchnorm(network()))
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm1d


def test_a_converted_model_copies_and_pickles():
    model = copy.deepcopy(convert_sync_batchnorm(network()))
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm1d


def test_a_pickle_names_no_file_of_ours():
    """So that it survives every move of a file. The attributes are plain values."""
    group = syncbn.GroupSpec("blocks", (), size=1)
    layers = [convert_sync_batchnorm(nn.BatchNorm1d(3), group), convert_sync_batchnorm(nn.LazyBatchNorm1d())]
    layers.append(syncbn.SyncBatchNorm(3, renorm_limits=syncbn.RenormLimits(2.0, 1.0)))
    named = [getattr(syncbn, name) for name in syncbn.__all__]
    assert {each.__module__ for each in named if isinstance(each, type)} == {"syncbn"}
    assert b"syncbn." not in pickle.dumps([*layers, syncbn.RenormLimits()])


def names(model):
    return [site_of(layer).name for layer in model.modules() if isinstance(layer, syncbn.SyncBatchNorm)]


def test_conversion_names_the_layers_as_the_model_does():
    assert names(convert_sync_batchnorm(network())) == ["1", "2.1"]
    assert names(convert_sync_batchnorm(nn.BatchNorm2d(3))) == [""]
    shared = nn.BatchNorm1d(3)
    assert names(convert_sync_batchnorm(nn.ModuleDict({"a": shared, "b": shared}))) == ["a"]
    assert names(convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))) == ["0"]


def test_name_layers_names_those_that_were_created_as_ours():
    model = nn.ModuleDict({"stem": syncbn.SyncBatchNorm(3), "rest": nn.Sequential(syncbn.SyncBatchNorm(3))})
    assert names(model) == ["", ""]
    assert syncbn.name_layers(model) is model
    assert names(model) == ["stem", "rest.0"]
    syncbn.name_layers(nn.ModuleDict({"net": model}))
    assert names(model) == ["net.stem", "net.rest.0"]


def test_a_compiled_model_has_the_names_of_the_model():
    model = network()
    model[2] = torch.compile(model[2], backend="eager")
    assert names(convert_sync_batchnorm(model)) == ["1", "2.1"]
    assert names(syncbn.name_layers(torch.compile(model, backend="eager"))) == ["1", "2.1"]


def test_copies_keep_their_names():
    model = convert_sync_batchnorm(network())
    model(torch.randn(5, 2, 4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert names(other) == ["1", "2.1"]
        assert site_of(other[1]).number != site_of(model[1]).number


def test_an_error_calls_the_layer_by_its_name():
    """Where ranks would differ a person reads it; one process shows the words."""
    model = convert_sync_batchnorm(network())
    model(torch.randn(5, 2, 4))
    assert [site_of(layer).label for layer in (model[1], model[2][1])] == ["'1'", "'2.1'"]
    alone = syncbn.SyncBatchNorm(3)
    alone(torch.randn(4, 3))
    assert site_of(alone).label == "SyncBatchNorm(3)"
