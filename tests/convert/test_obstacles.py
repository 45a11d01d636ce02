# SPDX-License-Identifier: BSD-3-Clause
"""Conversion, or its reverse, refuses what it would lose, and says what that is."""

import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from tests.processes import run


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnMethod(nn.BatchNorm2d):
    def describe(self):
        return "mine"


@pytest.mark.parametrize("cls", [OwnForward, OwnMethod])
def test_a_subclass_is_refused_by_path_and_reason_and_nothing_changes(cls):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"head": cls(3)}))
    lost = "forward" if cls is OwnForward else "class and methods"
    with pytest.raises(TypeError, match=rf"1 of 2 layers(?s:.*)1\.head: its {lost} \(.*{cls.__name__}\)"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("method", ["forward", "train", "reset_parameters", "_check_input_dim"])
def test_a_method_replaced_on_the_instance_is_refused_if_ours_differs(method):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    setattr(model[1], method, lambda *_: None)
    with pytest.raises(TypeError, match=rf"1 of 2 layers(?s:.*)1: its {method} was replaced on the instance"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("method", ["_call_impl", "reset_running_stats", "_load_from_state_dict", "extra_repr"])
def test_a_method_replaced_on_the_instance_stays_if_ours_is_the_same(method):
    layer = nn.BatchNorm2d(3)
    replacement = mock.Mock(side_effect=getattr(layer, method))
    setattr(layer, method, replacement)
    convert_sync_batchnorm(layer)
    layer(torch.randn(2, 3, 4, 4))
    layer.reset_running_stats()
    layer.load_state_dict(layer.state_dict())
    repr(layer)
    assert replacement.called
    assert vars(revert_sync_batchnorm(layer))[method] is replacement


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (nn.BatchNorm2d, "forward"),
        (_BatchNorm, "forward"),
        (_BatchNorm, "reset_parameters"),
        (nn.BatchNorm2d, "_check_input_dim"),
        (nn.BatchNorm2d, "reset_parameters"),
    ],
)
def test_a_class_patched_with_what_ours_does_not_use_is_refused(monkeypatch, cls, method):
    monkeypatch.setattr(cls, method, lambda self, *args: None, raising=False)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
    reason = rf"1: its class is patched \({cls.__name__}\.{method}\), and SyncBatchNorm2d would not use the patch"
    with pytest.raises(TypeError, match=reason):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (nn.Module, "__call__"),
        (nn.Module, "train"),
        (_BatchNorm, "train"),
        (nn.BatchNorm2d, "__call__"),
        (nn.BatchNorm2d, "train"),
        (nn.BatchNorm2d, "_load_from_state_dict"),
        (nn.BatchNorm2d, "reset_running_stats"),
        (_NormBase, "_load_from_state_dict"),
        (_NormBase, "reset_running_stats"),
    ],
)
def test_a_class_patched_with_what_ours_inherits_converts(monkeypatch, cls, method):
    calls, original = [], getattr(cls, method)

    def patch(self, *args, **options):
        calls.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(cls, method, patch)
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    layer(torch.randn(2, 3, 4, 4))
    layer.train()
    layer.load_state_dict(layer.state_dict())
    layer.reset_running_stats()
    assert layer in calls
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm2d


def test_a_forward_patched_before_syncbn_is_imported_is_refused():
    program = """
import functools, torch
from torch.nn.modules.batchnorm import _BatchNorm
original = _BatchNorm.forward
_BatchNorm.forward = functools.wraps(original)(lambda self, x: original(self, x).relu())
import syncbn
try:
    syncbn.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))
except TypeError as error:
    print(error)
"""
    done = run(sys.executable, "-c", program)
    assert "its class is patched (_BatchNorm.forward)" in done.stdout, done.stderr


OWN = sorted(vars(syncbn.SyncBatchNorm(1)).keys() - vars(nn.BatchNorm1d(1)).keys())
"""What a layer holds beside what torch's hold."""


@pytest.mark.parametrize("name", ["process_group", "renorm_limits", "converted_from", "settings", *OWN])
@pytest.mark.parametrize("kind", ["attribute", "buffer", "parameter", "module"])
def test_an_attribute_with_a_name_of_ours_is_refused(name, kind):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
    value = {
        "attribute": "mine",
        "buffer": nn.Buffer(torch.ones(1)),
        "parameter": nn.Parameter(torch.ones(1)),
        "module": nn.ReLU(),
    }[kind]
    setattr(model[1], name, value)
    with pytest.raises(
        TypeError, match=rf"1: SyncBatchNorm2d uses the names of its attributes {name}; rename or delete"
    ):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert getattr(model[1], name) is value


@pytest.mark.parametrize("kind", ["attribute", "buffer", "parameter", "module"])
def test_an_attribute_named_frozen_is_the_users_and_freezes_nothing(kind):
    layer = nn.BatchNorm2d(3)
    layer.frozen = {
        "attribute": True,
        "buffer": nn.Buffer(torch.ones(1)),
        "parameter": nn.Parameter(torch.ones(1)),
        "module": nn.ReLU(),
    }[kind]
    value = layer.frozen
    convert_sync_batchnorm(layer)
    assert layer.eval().train().training
    layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 1
    assert not syncbn.freeze(layer).train().training
    assert syncbn.unfreeze(layer).train().training
    assert revert_sync_batchnorm(layer).frozen is value


def test_every_name_that_conversion_adds_is_refused_as_an_attribute_of_the_user():
    layer = nn.BatchNorm2d(3)
    converted = syncbn.freeze(convert_sync_batchnorm(nn.BatchNorm2d(3)))
    for name in vars(converted).keys() - vars(layer).keys():
        users = nn.BatchNorm2d(3)
        setattr(users, name, "mine")
        with pytest.raises(TypeError, match=rf"uses the names of its attributes {name};"):
            convert_sync_batchnorm(users)


@pytest.mark.parametrize("bad", ["garbage", torch.distributed.GroupMember.NON_GROUP_MEMBER])
def test_a_group_that_cannot_be_kept_is_an_error_before_anything_is_changed(bad):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=bad))
    with pytest.raises((TypeError, ValueError), match="process_group must"):
        convert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert model[1].process_group is bad


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def test_a_parametrized_layer_is_refused_until_the_parametrization_is_removed():
    layer = parametrized(nn.BatchNorm2d(3))
    reason = r"it is parametrized, which changed its class \(.*ParametrizedBatchNorm2d\); convert before that, or after"
    with pytest.raises(TypeError, match=reason):
        convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(convert_sync_batchnorm(layer)) is syncbn.SyncBatchNorm2d


def test_a_parametrized_layer_of_ours_is_not_reverted_and_still_trains():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    parametrized(model[1])
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    reason = r"1 of 2 layers(?s:.*)1: it is parametrized.*ParametrizedSyncBatchNorm2d\); revert before that, or after"
    with pytest.raises(TypeError, match=reason):
        revert_sync_batchnorm(model)
    assert type(model[0]) is syncbn.SyncBatchNorm2d
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(revert_sync_batchnorm(model)[1]) is nn.BatchNorm2d


class Activated(syncbn.SyncBatchNorm):
    def forward(self, input, mask=None):
        return super().forward(input, mask).relu()


class Described(syncbn.SyncBatchNorm):
    def describe(self):
        return "mine"


@pytest.mark.parametrize(("cls", "lost"), [(Activated, "forward"), (Described, "class and methods")])
def test_a_subclass_of_ours_is_not_reverted(cls, lost):
    model = nn.Sequential(convert_sync_batchnorm(nn.BatchNorm2d(3)), cls(3))
    with pytest.raises(TypeError, match=rf"1 of 2 layers(?s:.*)1: its {lost} \(.*{cls.__name__}\) would be lost"):
        revert_sync_batchnorm(model, otherwise=nn.BatchNorm2d)
    assert [type(layer) for layer in model] == [syncbn.SyncBatchNorm2d, cls]


@pytest.mark.parametrize("method", ["forward", "train"])
def test_a_layer_of_ours_with_a_method_replaced_is_not_reverted(method):
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    original = getattr(layer, method)
    setattr(layer, method, mock.Mock(side_effect=original))
    with pytest.raises(TypeError, match=rf"its {method} was replaced on the instance, and would not fit BatchNorm2d"):
        revert_sync_batchnorm(layer)
    delattr(layer, method)
    assert type(revert_sync_batchnorm(layer)) is nn.BatchNorm2d


def test_a_patch_on_our_class_is_not_lost_when_reverting(monkeypatch):
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    monkeypatch.setattr(syncbn.SyncBatchNorm, "forward", lambda self, x: x)
    with pytest.raises(TypeError, match=r"patched \(SyncBatchNorm\.forward\), and BatchNorm2d would not use the patch"):
        revert_sync_batchnorm(layer)


def test_a_group_that_torch_cannot_have_is_not_lost_when_reverting():
    layer = convert_sync_batchnorm(nn.SyncBatchNorm(3), group_size=1)
    with pytest.raises(TypeError, match=r"cannot have its process_group \(group of 1 consecutive ranks\); assign None"):
        revert_sync_batchnorm(layer)
    layer.process_group = None
    assert type(revert_sync_batchnorm(layer)) is nn.SyncBatchNorm


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_layer_is_refused():
    with pytest.raises(TypeError, match=r"0: it is a compiled ScriptModule; convert before"):
        convert_sync_batchnorm(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))))


def test_a_layer_created_as_ours_reverts_to_what_is_asked():
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    with pytest.raises(
        TypeError,
        match=r"0: it was created as SyncBatchNorm, and which class it was to be is not known; pass otherwise=",
    ):
        revert_sync_batchnorm(model)
    revert_sync_batchnorm(model, otherwise=nn.BatchNorm2d)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_lazy_layer_is_not_reverted_to_a_class_that_is_not():
    model = nn.Sequential(syncbn.LazySyncBatchNorm())
    with pytest.raises(TypeError, match=r"0: it is lazy and BatchNorm2d is not; run one batch first, or pass"):
        revert_sync_batchnorm(model, otherwise=nn.BatchNorm2d)
    assert type(revert_sync_batchnorm(model, otherwise=nn.LazyBatchNorm2d)[0]) is nn.LazyBatchNorm2d
