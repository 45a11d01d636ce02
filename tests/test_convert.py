# SPDX-License-Identifier: BSD-3-Clause
"""Conversion loses nothing, both ways, or refuses and says what it would lose."""

import copy

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnMethod(nn.BatchNorm2d):
    def describe(self):
        return "mine"


def network():
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False)), nn.Flatten()
    )


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_torch_class_converts_and_comes_back(cls):
    layer = cls(4, eps=1e-3, momentum=None)
    state = list(layer.__dict__)
    assert convert_sync_batchnorm(layer) is layer
    assert type(layer) is syncbn.SyncBatchNorm
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


@pytest.mark.parametrize("cls", [OwnForward, OwnMethod])
def test_a_subclass_is_refused_by_path_and_reason_and_nothing_changes(cls):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"head": cls(3)}))
    lost = "forward" if cls is OwnForward else "class and methods"
    with pytest.raises(TypeError, match=rf"1 of 2 layers(?s:.*)1\.head: its {lost} \(.*{cls.__name__}\)"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_forward_replaced_on_the_instance_is_refused():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="replaced on the instance"):
        convert_sync_batchnorm(nn.Sequential(layer))


def test_a_parametrized_layer_is_refused():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(TypeError, match="ParametrizedBatchNorm2d"):
        convert_sync_batchnorm(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_layer_is_refused():
    with pytest.raises(TypeError, match=r"0: it is a compiled ScriptModule; convert before"):
        convert_sync_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))


@pytest.mark.parametrize("cls", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
@pytest.mark.parametrize("used", [False, True])
def test_a_lazy_layer_stays_lazy_and_comes_back(cls, used):
    dims = int(cls.__name__[-2])
    layer = convert_sync_batchnorm(cls(momentum=0.2))
    assert type(layer) is syncbn.LazySyncBatchNorm
    x = torch.randn(4, 6, *[2] * dims)
    if used:
        layer(x)
        assert type(layer) is syncbn.SyncBatchNorm
    revert_sync_batchnorm(layer)
    assert type(layer) is (cls.cls_to_become if used else cls)
    layer(x)
    assert layer.num_features == 6
    assert type(layer) is cls.cls_to_become


def test_a_layer_created_as_ours_reverts_to_what_is_asked():
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    with pytest.raises(TypeError, match=r"0: it was created as SyncBatchNorm; pass otherwise="):
        revert_sync_batchnorm(model)
    revert_sync_batchnorm(model, otherwise=nn.BatchNorm2d)
    assert type(model[0]) is nn.BatchNorm2d


def test_other_norms_are_left_alone():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    kinds = [type(layer) for layer in model]
    assert [type(layer) for layer in convert_sync_batchnorm(model)] == kinds


def test_the_classmethod_of_torch_is_there():
    assert (
        type(syncbn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))[0]) is syncbn.SyncBatchNorm
    )


def test_converting_twice_is_converting_once():
    model = convert_sync_batchnorm(convert_sync_batchnorm(network()))
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm1d


def test_a_converted_model_copies_and_pickles():
    model = copy.deepcopy(convert_sync_batchnorm(network()))
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm1d
