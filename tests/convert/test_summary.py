# SPDX-License-Identifier: BSD-3-Clause
"""A summary lists what normalises over the batch and says why it is not synchronised; conversion warns of the rest."""

import functools
import json
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.functional import batch_norm as imported_batch_norm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import convert_sync_batchnorm, summary
from syncbn.convert.summary import Row, warn_of_local

NOT_YET = "not converted yet: call syncbn.convert_sync_batchnorm"


class EvoNorm2dB0(nn.Module):
    """Has the name and the buffers of timm's."""

    def __init__(self, channels=4):
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x / x.var((0, 2, 3), keepdim=True).sqrt()


class HeteroBatchNorm(nn.Module):
    """Has the name and the buffers of that of PyG."""

    def __init__(self, channels=4, *, track=True):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2, channels) if track else None)
        self.register_buffer("running_var", torch.ones(2, channels) if track else None)

    def forward(self, x, kinds):
        return x - x.mean(0)


class FrozenBatchNorm2d(EvoNorm2dB0):
    def forward(self, x):
        return F.batch_norm(x, self.running_var, self.running_var, training=True)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class Calls(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Inherits(Calls):
    pass


class CallsSuper(Calls):
    def forward(self, x):
        return super().forward(x).relu()


class CallsByImportedName(nn.Module):
    def forward(self, x):
        return imported_batch_norm(x, None, None, training=self.training)


class CallsByLocalImport(nn.Module):
    def forward(self, x):
        import torch.nn.functional as local

        return local.batch_norm(x, None, None, training=self.training)


class CallsInNested(nn.Module):
    def forward(self, x):
        def inner():
            return F.batch_norm(x, None, None, training=True)

        return inner()


def helper(x):
    return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class CallsHelper(nn.Module):
    def forward(self, x):
        return self.normalise(x)

    def normalise(self, x):
        return helper(x)


class CallsDecorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return torch.ops.aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class CallsHeldFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.batch_norm, training=True)

    def forward(self, x):
        return self.function(x, None, None)


class LayerOfThatName(nn.Module):
    """Calls a submodule, not a function."""

    def __init__(self):
        super().__init__()
        self.batch_norm = syncbn.SyncBatchNorm(3)

    def forward(self, x):
        return self.batch_norm(x)


class OverridesWithoutSuper(Calls):
    def forward(self, x):
        return x.relu()


class StandardizesItsWeight(nn.Conv2d):
    """The way of timm's StdConv2d."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class UsesGivenStatistics(nn.Module):
    """The way of PyG's BatchNorm for a single element."""

    def forward(self, x, mean, var):
        x = F.batch_norm(x.reshape(2, -1), mean, var, None, None, False, 0.0, len(x.shape))
        return F.batch_norm(x, mean, running_var=var, training=False) + F.batch_norm(x, mean, var)


class CallsOurs(nn.Module):
    def forward(self, x):
        return syncbn.functional.sync_batch_norm(x)


class HoldsAList(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.layers = list(layers)
        self.by_name = {"deep": [nn.Sequential(nn.BatchNorm1d(7))]}


def only(model):
    (row,) = summary(model).rows
    return row


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


@pytest.mark.parametrize(
    ("cls", "function"),
    [
        (Calls, "F.batch_norm"),
        (Inherits, "F.batch_norm"),
        (CallsSuper, "F.batch_norm"),
        (CallsByImportedName, "F.batch_norm"),
        (CallsByLocalImport, "F.batch_norm"),
        (CallsInNested, "F.batch_norm"),
        (CallsHelper, "torch.batch_norm"),
        (CallsDecorated, "aten.batch_norm"),
        (CallsHeldFunction, "F.batch_norm"),
    ],
)
def test_a_forward_that_calls_a_batch_norm_function_is_local(cls, function):
    row = only(cls())
    assert (row.kind, row.channels, row.synchronised, row.local) == (cls.__name__, None, False, True)
    assert row.reason.startswith(f"its forward calls {function};")


def test_a_forward_replaced_on_the_instance_is_read():
    layer = nn.Identity()
    layer.forward = lambda x: F.batch_norm(x, None, None, training=True)
    assert only(layer).local


@pytest.mark.parametrize(
    "module",
    [OverridesWithoutSuper(), StandardizesItsWeight(2, 3, 1), UsesGivenStatistics()],
    ids=lambda module: type(module).__name__,
)
def test_no_false_alarm(module):
    assert summary(module).rows == []


def test_a_submodule_with_the_name_of_the_function_is_no_call_of_it():
    assert only(LayerOfThatName()).name == "batch_norm"


def test_a_forward_that_calls_ours_is_synchronised():
    row = only(CallsOurs())
    assert (row.synchronised, row.local) == (True, False)


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
