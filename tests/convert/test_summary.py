# SPDX-License-Identifier: BSD-3-Clause
"""A summary lists what normalises over the batch and says why it is not synchronised; conversion warns of the rest."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import convert_sync_batchnorm, summary
from syncbn.convert.summary import Row, warn_of_local
from tests.convert.norms import (
    Calls,
    CallsOurs,
    EvoNorm2dB0,
    FrozenBatchNorm2d,
    LayerOfThatName,
    StandardizesItsWeight,
    only,
)

NOT_YET = "not converted yet: call syncbn.convert_sync_batchnorm"


class HoldsAList(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.layers = list(layers)
        self.by_name = {"deep": [nn.Sequential(nn.BatchNorm1d(7))]}


def test_layers_before_and_after_conversion():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Sequential(nn.LazyBatchNorm1d()))
    before = summary(model)
    assert before.rows == [
        Row("1", "BatchNorm1d", 3, False, True, NOT_YET),
        Row("2.0", "LazyBatchNorm1d", None, False, True, NOT_YET),
    ]
    assert before.unsynchronised == before.rows
    after = summary(convert_sync_batchnorm(model))
    assert after.rows == [
        Row("1", "SyncBatchNorm1d", 3, True, False, "synchronised over all ranks"),
        Row("2.0", "LazySyncBatchNorm1d", None, True, False, "synchronised over all ranks"),
    ]
    assert after.unsynchronised == []


def test_the_table_and_the_json_say_the_same():
    found = summary(nn.Sequential(syncbn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), FrozenBatchNorm2d()))
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert lines[0].split() == ["name", "class", "C", "synchronised", "why"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["0", "SyncBatchNorm", "3", "yes"],
        ["1", "LazyBatchNorm2d", "?", "NO"],
        ["2", "FrozenBatchNorm2d", "4", "-"],
    ]
    assert lines[5] == "3 in all: 1 synchronised, 1 not."
    assert json.loads(found.to_json()) == found.to_dicts()
    assert found.to_dicts()[1] == {
        "name": "1",
        "kind": "LazyBatchNorm2d",
        "channels": None,
        "synchronised": False,
        "local": True,
        "reason": NOT_YET,
    }


def test_a_model_without_batch_norm_is_one_line():
    assert str(summary(nn.Linear(1, 1))) == "No module of Linear normalises over the batch or holds running statistics."


def test_layers_in_python_containers_are_found_by_path():
    inner = nn.Sequential(HoldsAList(nn.BatchNorm1d(3), nn.ReLU(), syncbn.SyncBatchNorm(5)))
    rows = {row.name: row for row in summary(inner).rows}
    assert list(rows) == ["0.norm", "0.layers[0]", "0.layers[2]", "0.by_name['deep'][0].0"]
    reason = "not registered (in the Python list `layers` of 0), so neither conversion nor an optimizer sees it"
    assert rows["0.layers[0]"].reason.startswith(reason)
    assert rows["0.layers[0]"].local
    assert rows["0.layers[2]"].synchronised
    assert "so no optimizer sees it" in rows["0.layers[2]"].reason
    assert "Python dict `by_name`" in rows["0.by_name['deep'][0].0"].reason


def test_a_list_of_registered_layers_is_no_finding():
    layer = syncbn.SyncBatchNorm(3)
    model = HoldsAList(layer)
    model.by_name, model.registered = {}, layer
    assert [row.name for row in summary(model).rows] == ["norm", "registered"]


def test_a_reference_to_the_parent_is_not_followed():
    child = nn.Sequential(syncbn.SyncBatchNorm(3))
    child.parent = [nn.Sequential(child, nn.BatchNorm1d(3))]
    assert [row.name for row in summary(child).rows] == ["0"]


def test_a_teacher_hidden_in_a_list_and_in_eval_is_not_local():
    model = nn.Sequential(syncbn.SyncBatchNorm(3))
    model.teacher = [nn.Sequential(nn.BatchNorm1d(3)).eval()]
    row = summary(model).rows[1]
    assert (row.name, row.synchronised, row.local) == ("teacher[0].0", False, False)
    assert row.reason.startswith("in eval: uses its running statistics; not registered")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_has_the_names_of_the_model():
    assert only(torch.compile(nn.Sequential(nn.BatchNorm1d(3)))).name == "0"
    assert only(torch.compile(nn.BatchNorm1d(3))).name == ""


def test_a_model_on_meta_has_a_summary():
    model = nn.Sequential(nn.BatchNorm1d(3, device="meta"), EvoNorm2dB0().to("meta"))
    assert [row.channels for row in summary(model).rows] == [3, 4]


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.cpu("gloo, and FSDP has streams of its own")
def test_wrapped_models_have_a_summary(mesh):
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), syncbn.SyncBatchNorm(3), Calls()))
    assert [(row.name, row.synchronised) for row in summary(ddp).rows] == [("module.1", True), ("module.2", False)]
    model = nn.Sequential(nn.Linear(3, 3), fully_shard(syncbn.SyncBatchNorm(3), mesh=mesh), Calls())
    found = summary(fully_shard(model, mesh=mesh))
    assert [(row.name, row.kind) for row in found.rows] == [("1", "FSDPSyncBatchNorm"), ("2", "Calls")]
    assert [row.synchronised for row in found.rows] == [True, False]


def test_conversion_warns_once_with_names_and_reasons():
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "evo": EvoNorm2dB0(), "calls": Calls()})
    with pytest.warns(UserWarning, match="left 2 modules that use the local batch alone") as caught:
        convert_sync_batchnorm(model)
    (warning,) = caught
    lines = str(warning.message).splitlines()
    assert lines[1] == (
        "  evo (EvoNorm2dB0): its class is unknown to syncbn; pass replace= to syncbn.convert_sync_batchnorm"
    )
    assert lines[2].startswith("  calls (Calls): its forward calls F.batch_norm;")
    assert warning.filename == __file__
    assert isinstance(model["norm"], syncbn.SyncBatchNorm)


def test_a_warning_names_ten_modules_at_most():
    with pytest.warns(UserWarning, match="left 13 modules") as caught:
        convert_sync_batchnorm(nn.Sequential(*(EvoNorm2dB0() for _ in range(13))))
    lines = str(caught[0].message).splitlines()
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[-2:] == ["  and 3 more", "syncbn.summary(model) lists all."]


def test_modules_left_out_on_purpose_do_not_warn():
    model = nn.Sequential(EvoNorm2dB0(), Calls())
    with pytest.warns(UserWarning, match=r"left 1 module that uses(?s:.*)1 \(Calls\)"):
        warn_of_local(model, ignore={model[0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_local(model, ignore=set(model))


@pytest.mark.filterwarnings("error")
def test_a_model_that_conversion_covers_does_not_warn():
    convert_sync_batchnorm(
        nn.Sequential(
            nn.BatchNorm2d(3),
            LayerOfThatName(),
            FrozenBatchNorm2d(),
            StandardizesItsWeight(2, 3, 1),
            nn.InstanceNorm2d(3, track_running_stats=True),
            CallsOurs(),
        )
    )
