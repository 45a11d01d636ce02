# SPDX-License-Identifier: BSD-3-Clause
"""In eval a layer leaves as one batch norm operator, by every way out that torch has; checkpoints go both ways."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn
from tests.multiprocess.batches import torchs

RETIRED = pytest.mark.filterwarnings("ignore:.torch.jit")  # torch says so at each use, as a warning of changing kind
TREESPEC = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # torch's own code
CONVS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}


def trained(*, dims=3, **options):
    """A converted model that has seen a batch, in eval; an input; and what it makes of it."""
    torch.manual_seed(0)
    model = nn.Sequential(CONVS[dims](3, 4, 1), NORMS[dims](4, **options), nn.ReLU())
    syncbn.convert_sync_batchnorm(model)
    model(torch.randn(6, 3, *[5] * (dims - 1)) + 1)
    for parameter in model[1].parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    x = torch.randn(2, 3, *[5] * (dims - 1))
    return model.eval(), x, model(x).detach()


def operators(graph, kind="call_function"):
    return [str(node.target) for node in graph.nodes if node.op == kind]


@TREESPEC
@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_export_makes_one_operator_of_it_for_any_batch_size(options):
    model, x, expected = trained(**options)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("N", min=1, max=64)},))
    assert operators(program.graph) == ["aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default"]
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.module()(x[:1]), model(x[:1]))
    core = operators(program.run_decompositions().graph)
    assert sum("batch_norm" in op for op in core) == 1
    assert "aten._native_batch_norm_legit_no_training.default" in core


@TREESPEC
@pytest.mark.cpu("the other runtime takes arrays of the CPU")
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_onnx_runs_elsewhere_and_gives_the_same(tmp_path, optimize, dims):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, expected = trained(dims=dims)
    file = tmp_path / "model.onnx"
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: "N"},), optimize=optimize)
    program.save(file)
    kinds = [node.op_type for node in program.model.graph]
    assert kinds == (["Conv", "Relu"] if optimize else ["Conv", "BatchNormalization", "Relu"])  # folded, or as it is
    session = runtime.InferenceSession(file)
    name = session.get_inputs()[0].name
    torch.testing.assert_close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), expected)
    one = torch.from_numpy(session.run(None, {name: x[:1].numpy()})[0])
    torch.testing.assert_close(one, expected[:1])


@RETIRED
def test_a_trace_is_one_operator_and_takes_any_batch_size():
    model, x, expected = trained()
    traced = torch.jit.trace(model, x)
    assert str(traced.inlined_graph).count("aten::batch_norm") == 1
    assert torch.equal(traced(x), expected)
    assert torch.equal(traced(x[:1]), model(x[:1]))


@RETIRED
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_a_reverted_model_scripts_to_one_operator(options):
    model, x, expected = trained(**options)
    scripted = torch.jit.script(syncbn.revert_sync_batchnorm(model))
    assert str(scripted.inlined_graph).count("aten::batch_norm") == 1
    assert torch.equal(scripted(x), expected)


@RETIRED
@pytest.mark.parametrize("layer", [syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3).eval(), syncbn.LazySyncBatchNorm()])
def test_scripting_refuses_a_model_that_was_not_reverted(layer):
    with pytest.raises(TypeError, match=r"torch\.jit\.script .* Call syncbn\.revert_sync_batchnorm\(model\) first"):
        torch.jit.script(nn.Sequential(layer))


def test_fx_records_the_layer_as_one_node():
    model, x, expected = trained()
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * len(model), "output"]
    assert torch.equal(graph(x), expected)


@RETIRED  # importing torch.fx.experimental.optimization uses it
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_reverted_layers_fuse_with_their_convolution(dims):
    from torch.fx.experimental.optimization import fuse

    model, x, expected = trained(dims=dims)
    syncbn.revert_sync_batchnorm(model)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(x).relu(), expected)
    fused = fuse(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
    torch.testing.assert_close(fused(x), expected)


@pytest.mark.parametrize("theirs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}])
def test_checkpoints_load_both_ways(theirs, options):
    def filled(cls):
        layer = torchs(cls, 4, **options)
        for i, value in enumerate(layer.state_dict().values()):
            value.fill_(i + 3)
        return layer

    for source, target in ((theirs, syncbn.SyncBatchNorm), (syncbn.SyncBatchNorm, theirs)):
        file, saved, loaded = io.BytesIO(), filled(source), torchs(target, 4, **options)
        torch.save(saved.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert loaded.state_dict().keys() == saved.state_dict().keys()
        assert all(torch.equal(v, saved.state_dict()[k]) for k, v in loaded.state_dict().items())
