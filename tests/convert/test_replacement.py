# SPDX-License-Identifier: BSD-3-Clause
"""``replace`` puts a module of the caller in the place of a layer that cannot convert, and back."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.calls.sites import site_of
from syncbn.convert import replacement


class Leaky(nn.BatchNorm2d):
    """Like many: a batch norm with something after it."""

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), 0.1)


class SyncLeaky(syncbn.SyncBatchNorm):
    def forward(self, input, mask=None):
        return nn.functional.leaky_relu(super().forward(input, mask), 0.1)


class Wrapper(nn.Module):
    """No batch norm itself; conversion does not see what it does."""

    def __init__(self, C):
        super().__init__()
        self.inner = Leaky(C)

    def forward(self, x):
        return self.inner(x)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)


def synchronised(old):
    new = SyncLeaky(old.num_features, old.eps, old.momentum)
    new.weight, new.bias = old.weight, old.bias
    new.load_state_dict(old.state_dict())
    return new


def parts(old):
    """Other names of parameters, so there is no way back."""
    norm = nn.BatchNorm2d(old.num_features, old.eps, old.momentum)
    norm.load_state_dict(old.state_dict())
    return nn.Sequential(norm, nn.LeakyReLU(0.1))


def network():
    torch.manual_seed(0)
    shared = Leaky(3)
    return nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), shared), "b": shared}).eval()


def run(model, x):
    y = model["b"](model["a"](x))
    return y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("function", [synchronised, parts])
@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_model_computes_the_same_and_synchronises(function, training):
    model = network().train(training)
    expected = copy.deepcopy(model)
    assert convert_sync_batchnorm(model, replace={Leaky: function}) is model
    assert model["a"][2] is model["b"]
    assert not any(isinstance(m, Leaky) for m in model.modules())
    assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(m) for m in norms] == [
        syncbn.SyncBatchNorm2d,
        SyncLeaky if function is synchronised else type(norms[0]),
    ]
    assert [site_of(m).name for m in norms] == ["a.1", "a.2" if function is synchronised else "a.2.0"]
    x = torch.randn(4, 3, 5, 5)
    for ours, theirs in zip(run(model, x), run(expected, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_reverse_puts_the_old_layer_back_with_what_was_learnt():
    model = network().train()
    old, keys = model["b"], list(model.state_dict())
    old.note = "mine"
    convert_sync_batchnorm(model, replace={Leaky: synchronised})
    assert list(model.state_dict()) == keys
    run(model, torch.randn(4, 3, 5, 5))
    model["b"].weight = nn.Parameter(torch.full((3,), 7.0))  # another object, as load_state_dict(assign=True) makes
    model.eval()
    new, var = model["b"], model["b"].running_var.clone()
    assert revert_sync_batchnorm(model) is model
    assert model["b"] is model["a"][2] is old
    assert old.weight is new.weight
    assert torch.equal(old.running_var, var)
    assert not torch.equal(var, torch.ones(3))
    assert not old.training
    assert old.note == "mine"
    assert type(model["a"][1]) is nn.BatchNorm2d
    assert replacement.original(new) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_comes_back_too(copied):
    model = copied(convert_sync_batchnorm(network(), replace={Leaky: synchronised}))
    assert type(revert_sync_batchnorm(model)["b"]) is Leaky


def test_the_module_itself_is_replaced_and_comes_back():
    old = Leaky(3)
    new = convert_sync_batchnorm(old, replace={Leaky: synchronised})
    assert type(new) is SyncLeaky
    assert revert_sync_batchnorm(new) is old


def test_a_replacement_with_other_names_does_not_come_back_and_says_so():
    model = convert_sync_batchnorm(network(), replace={Leaky: parts})
    reason = r"1 of 3 layers(?s:.*)a\.2: it replaces a Leaky, and its parameters and buffers have other names"
    with pytest.raises(TypeError, match=reason):
        revert_sync_batchnorm(model)
    assert type(model["a"][1]) is syncbn.SyncBatchNorm2d
    revert_sync_batchnorm(model, only=["a.1", "a.2.0"])
    assert [type(m) for m in (model["a"][1], model["b"][0])] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_a_replacement_may_hold_the_old_layers_parts():
    model = nn.Sequential(Holder())
    holder = model[0]
    convert_sync_batchnorm(model, replace={Holder: lambda old: nn.Sequential(OrderedDict(bn=old.bn))})
    assert type(model[0].bn) is syncbn.SyncBatchNorm2d
    revert_sync_batchnorm(model)
    assert model[0] is holder
    assert type(holder.bn) is nn.BatchNorm2d


def test_a_class_that_is_no_batch_norm_is_replaced_with_all_that_is_in_it():
    model = nn.Sequential(Wrapper(3), nn.BatchNorm2d(3))
    inner = lambda old: (_ for _ in ()).throw(AssertionError)  # noqa: E731
    convert_sync_batchnorm(model, replace={Wrapper: lambda old: synchronised(old.inner), Leaky: inner})
    assert [type(m) for m in model] == [SyncLeaky, syncbn.SyncBatchNorm2d]


def test_only_selects_what_is_replaced():
    model = nn.Sequential(Leaky(3), nn.BatchNorm2d(3), Leaky(3))
    convert_sync_batchnorm(model, only="2", replace={Leaky: parts})
    assert [type(m) for m in model] == [Leaky, nn.BatchNorm2d, nn.Sequential]
    assert type(model[2][0]) is syncbn.SyncBatchNorm2d


def test_a_class_of_torch_may_be_replaced():
    model = convert_sync_batchnorm(
        nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4)),
        replace={nn.BatchNorm2d: lambda old: nn.GroupNorm(2, old.num_features)},
    )
    assert [type(m) for m in model] == [nn.GroupNorm, syncbn.SyncBatchNorm1d]


KEPT = nn.Identity()


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda old: None, TypeError, r"a new module for each Leaky; received NoneType for 'a\.2'"),
        (lambda old: old, ValueError, r"received for 'a\.2' one that the model has already"),
        (lambda old: KEPT, ValueError, r"received for 'c' one that the model has already"),
        (lambda old: Own(3), TypeError, r"2 of 3 layers(?s:.*)a\.2: its forward .*Own\) would be lost; pass replace="),
    ],
)
def test_a_wrong_replacement_is_an_error_and_nothing_changes(function, kind, words):
    model = network()
    model["c"] = Leaky(3)
    before = list(model.named_modules())
    with pytest.raises(kind, match=words):
        convert_sync_batchnorm(model, replace={Leaky: function})
    assert list(model.named_modules()) == before
    assert type(model["a"][1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ([Leaky], r"received list\. For example"),
        ({"Leaky": synchronised}, r"received the key 'Leaky'\. Pass a class"),
        ({int: synchronised}, r"received the key <class 'int'>"),
        ({Leaky: 3}, r"received int for Leaky\. Pass a function"),
        ({Leaky: nn.Identity()}, r"received Identity for Leaky\. Pass a function"),
    ],
)
def test_another_type_is_an_error(replace, words):
    with pytest.raises(TypeError, match=rf"replace= needs a dict of \{{class: function\}}.*{words}"):
        convert_sync_batchnorm(network(), replace=replace)


class Graphs(nn.Module):
    """The BatchNorm of torch_geometric has these names."""

    def __init__(self, allow_single_element):
        super().__init__()
        self.module = nn.BatchNorm1d(3)
        self.allow_single_element = allow_single_element


def test_a_batch_norm_that_its_owner_skips_on_some_ranks_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3), Graphs(True))
    with pytest.raises(TypeError, match=r"1 of 2 layers(?s:.*)1\.module: its owner, .*Graphs, skips it .*=False there"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    model[1].allow_single_element = False
    convert_sync_batchnorm(model)
    assert type(model[1].module) is syncbn.SyncBatchNorm1d


class OtherHolder(Holder):
    pass


def plain(old):
    new = SyncLeaky(old.num_features)
    new.load_state_dict(old.state_dict())
    return new


def test_a_replacement_inside_another_hands_over_what_was_learnt():
    model = nn.Sequential(Holder())
    convert_sync_batchnorm(model, replace={Holder: lambda old: OtherHolder()})
    convert_sync_batchnorm(model, replace={syncbn.SyncBatchNorm2d: plain})
    weight = model[0].bn.weight
    with torch.no_grad():
        weight.fill_(7.0)
        model[0].bn.running_mean.fill_(5.0)
    revert_sync_batchnorm(model)
    assert type(model[0]) is Holder
    assert type(model[0].bn) is nn.BatchNorm2d
    assert model[0].bn.weight is weight
    assert model[0].bn.running_mean.tolist() == [5.0] * 3


def test_a_replacement_of_a_replacement_gives_the_first_layer_back():
    model = nn.Sequential(Leaky(3))
    convert_sync_batchnorm(model, replace={Leaky: plain})
    convert_sync_batchnorm(model, replace={SyncLeaky: plain})
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    revert_sync_batchnorm(model)
    assert type(model[0]) is Leaky
    assert model[0].weight.tolist() == [7.0] * 3


def test_an_error_of_the_function_says_for_which_layer():
    def fails(old):
        raise KeyError("eps")

    with pytest.raises(KeyError) as caught:
        convert_sync_batchnorm(nn.Sequential(Leaky(3)), replace={Leaky: fails})
    assert caught.value.__notes__ == ["raised by the function of replace= for '0', a Leaky"]


def test_what_is_no_model_is_refused_by_name():
    for function in (convert_sync_batchnorm, revert_sync_batchnorm, syncbn.name_layers, syncbn.summary):
        with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module; received list"):
            function([nn.BatchNorm2d(3)])


def test_otherwise_is_a_class_that_has_no_more_than_the_layer():
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    for otherwise in (Leaky, nn.Linear, "BatchNorm2d"):
        with pytest.raises(TypeError, match="otherwise= needs a batch norm class of torch"):
            revert_sync_batchnorm(model, otherwise=otherwise)
    assert type(model[0]) is syncbn.SyncBatchNorm
