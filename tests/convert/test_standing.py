# SPDX-License-Identifier: BSD-3-Clause
"""What a summary says of one module: by its class, its buffers, or its graph."""

import warnings

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, summary
from tests.convert.norms import Calls, EvoNorm2dB0, FrozenBatchNorm2d, only


class HeteroBatchNorm(nn.Module):
    """Has the name and the buffers of that of PyG."""

    def __init__(self, channels=4, *, track=True):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, channels) if track else None)
        self.register_buffer("running_var", torch.ones(2, channels) if track else None)

    def forward(self, x, kinds):
        return x - x.mean(0)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


def test_other_norms_are_not_listed():
    others = nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3), nn.RMSNorm(3))
    assert summary(others).rows == []


def test_an_instance_norm_with_running_statistics_is_listed_and_not_local():
    row = only(nn.InstanceNorm2d(3, track_running_stats=True))
    assert (row.channels, row.synchronised, row.local) == (3, False, False)
    assert row.reason.startswith("instance norm: each sample for itself")


@pytest.mark.parametrize(
    ("change", "synchronised", "local", "reason"),
    [
        (syncbn.freeze, False, False, "frozen by syncbn.freeze"),
        (lambda layer: convert_sync_batchnorm(layer, group_size=1), False, True, "group of 1 consecutive ranks"),
        (lambda layer: setattr(layer, "forward", lambda x: x), False, True, "its forward was replaced on the instance"),
        (lambda layer: layer.eval(), True, False, "synchronised over all ranks in training; it is in eval"),
        (
            lambda layer: setattr(layer, "process_group", syncbn.GroupSpec("blocks", (), size=2)),
            True,
            False,
            "synchronised over group of 2 consecutive ranks",
        ),
    ],
)
def test_what_a_layer_of_ours_does(change, synchronised, local, reason):
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    change(model[0])
    row = only(model)
    assert (row.synchronised, row.local) == (synchronised, local)
    assert reason in row.reason


def test_inside_no_sync_a_layer_is_local():
    layer = syncbn.SyncBatchNorm(3)
    with syncbn.no_sync(layer):
        assert "inside syncbn.no_sync" in only(layer).reason
        assert only(layer).local
    assert only(layer).synchronised


@pytest.mark.parametrize(
    ("layer", "channels"),
    [(EvoNorm2dB0(4), 4), (HeteroBatchNorm(5), 5), (HeteroBatchNorm(5, track=False), None)],
)
def test_an_unknown_class_with_running_statistics_is_local(layer, channels):
    row = only(layer)
    assert (row.channels, row.synchronised, row.local) == (channels, False, True)
    assert row.reason == "its class is unknown to syncbn; pass replace= to syncbn.convert_sync_batchnorm"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (FrozenBatchNorm2d(), "frozen: its class uses no batch statistics"),
        (NaiveSyncBatchNorm(4), "its class synchronises in its own way"),
    ],
)
def test_frozen_and_synchronising_classes_of_others_are_not_local(layer, reason):
    row = only(layer)
    assert (row.channels, row.synchronised, row.local) == (4, False, False)
    assert row.reason.startswith(reason)


def test_a_layer_that_conversion_refuses_has_the_reason():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    assert only(Activated(3)).local
    assert only(Activated(3)).reason.startswith("cannot be converted: its forward (")


@pytest.fixture
def exported():
    """Returns an exporter of a model with two batch norms, in training or eval."""

    def export(*, train, decompose=False):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))).train(train)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (torch.randn(2, 3, 4, 4),))
            return (program.run_decompositions() if decompose else program).module()

    return export


@pytest.mark.parametrize(
    ("decompose", "operator"), [(False, "aten.batch_norm"), (True, "aten._native_batch_norm_legit_functional")]
)
def test_an_exported_training_graph_is_local(exported, decompose, operator):
    row = only(exported(train=True, decompose=decompose))
    assert (row.kind, row.synchronised, row.local) == ("GraphModule", False, True)
    assert f"calls {operator} 2 times; convert before the export" in row.reason


@pytest.mark.parametrize("decompose", [False, True])
def test_a_graph_exported_in_eval_is_not_local(exported, decompose):
    row = only(exported(train=False, decompose=decompose))
    assert (row.synchronised, row.local) == (False, False)


def test_a_traced_graph_keeps_its_layers_and_shows_its_functions():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(3), Calls()))
    found = summary(model)
    assert [(row.name, row.kind) for row in found.rows] == [("", type(model).__name__), ("0", "BatchNorm1d")]
    assert "calls F.batch_norm 1 time;" in found.rows[0].reason


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_modules_are_local():
    found = summary(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), Calls())))
    assert [row.kind for row in found.rows] == ["BatchNorm2d", "RecursiveScriptModule"]
    assert all(row.local and "convert before torch.jit.script" in row.reason for row in found.rows)
