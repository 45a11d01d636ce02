# SPDX-License-Identifier: BSD-3-Clause
"""``only`` selects layers by name or by a function; the others stay as they are."""

import copy

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.calls.sites import site_of
from syncbn.layer import SyncBatchNorm


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


def network():
    shared = nn.BatchNorm1d(3)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
            "body": nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())}),
            "head": shared,
        }
    )


def converted(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("stem.1", ["stem.1"]),
        ("stem.*", ["stem.1"]),
        ("*", ["stem.1", "body.a", "body.b.0"]),
        ("body.*", ["body.a", "body.b.0"]),
        ("head", ["body.a"]),  # the second name of a shared layer
        ("*.[01]", ["stem.1", "body.b.0"]),
        (["stem.*", "head"], ["stem.1", "body.a"]),
        (("body.b.?",), ["body.b.0"]),
        ([], []),
        (lambda name, layer: name.startswith("body") and layer.num_features == 3, ["body.a", "body.b.0"]),
        (lambda name, layer: False, []),
    ],
)
def test_conversion_and_its_reverse_change_what_is_selected(only, expected):
    model = convert_sync_batchnorm(network(), only=only)
    assert converted(model) == expected
    revert_sync_batchnorm(model)
    assert converted(model) == []
    whole = convert_sync_batchnorm(network())
    rest = [name for name in converted(whole) if name not in expected]
    assert converted(revert_sync_batchnorm(whole, only=only)) == rest


def test_a_layer_that_is_not_selected_keeps_group_and_name():
    model = convert_sync_batchnorm(nn.ModuleDict({"net": network()}), group_size=1, only="net.stem.*")
    group = model["net"]["stem"][1].process_group
    convert_sync_batchnorm(model["net"], only=lambda name, layer: name != "stem.1")
    assert model["net"]["stem"][1].process_group is group
    assert site_of(model["net"]["stem"][1]).name == "net.stem.1"
    assert model["net"]["body"]["b"][0].process_group is None
    assert site_of(model["net"]["body"]["b"][0]).name == "body.b.0"


def test_a_layer_that_cannot_convert_is_no_obstacle_unless_it_is_selected():
    model = network()
    model["own"] = OwnForward(3)
    with pytest.raises(TypeError, match=r"1 of 4 layers(?s:.*)own: .*OwnForward\) .*or leave it out by only="):
        convert_sync_batchnorm(model)
    with pytest.raises(TypeError, match=r"1 of 2 layers(?s:.*)own: "):
        convert_sync_batchnorm(model, only=["own", "stem.*"])
    assert converted(convert_sync_batchnorm(model, only=["stem.*", "body.*"])) == ["stem.1", "body.a", "body.b.0"]


@pytest.mark.parametrize("change", [convert_sync_batchnorm, revert_sync_batchnorm])
@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("body.c.0", r"received 'body\.c\.0', which matches none of 3\. Names that are close: 'body\.b\.0'"),
        ("stem", r"received 'stem', which matches none of .* close: 'stem\.1'.* \* also matches dots"),
        (["stem.*", "tail.*"], r"received 'tail\.\*', which matches none"),
    ],
)
def test_a_pattern_that_matches_no_batch_norm_is_an_error(change, only, words):
    model = network() if change is convert_sync_batchnorm else convert_sync_batchnorm(network())
    model["body"]["a2"] = nn.Linear(3, 3)
    del model["head"]
    before = converted(model)
    with pytest.raises(ValueError, match=words):
        change(model, only=only)
    assert converted(model) == before


def test_a_pattern_for_a_model_without_batch_norm_is_an_error():
    with pytest.raises(ValueError, match=r"matches none of 0\. The model has none"):
        convert_sync_batchnorm(nn.Linear(3, 3), only="*")


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (3, "received int"),
        ([3], "received 3 among them"),
        (nn.BatchNorm1d, r"received <class .*BatchNorm1d'>\. For a class, pass lambda"),
        (nn.BatchNorm1d(3), r"received BatchNorm1d\. For a part of the model, pass its name"),
    ],
)
def test_another_type_is_an_error(only, words):
    with pytest.raises(TypeError, match=rf"only= needs .*{words}"):
        convert_sync_batchnorm(network(), only=only)


def test_a_compiled_model_has_the_names_of_the_model():
    model = torch.compile(network()["stem"], backend="eager")
    convert_sync_batchnorm(model, only="1")
    assert isinstance(model._orig_mod[1], SyncBatchNorm)
    alone = torch.compile(nn.BatchNorm1d(3), backend="eager")
    convert_sync_batchnorm(alone, only="")
    assert isinstance(alone._orig_mod, SyncBatchNorm)


def test_the_module_itself_has_the_empty_name():
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm1d(3), only="*"), SyncBatchNorm)
    model = copy.deepcopy(syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3)))
    assert type(revert_sync_batchnorm(model, only=lambda name, _: name == "")) is nn.BatchNorm1d
