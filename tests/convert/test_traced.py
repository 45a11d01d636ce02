# SPDX-License-Identifier: BSD-3-Clause
"""A layer is one node of a torch.fx graph, in training and in eval, and does there what it does in the model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm


class Network(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm is None else norm

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(3)

    def forward(self, x, mask):
        return self.norm(x, mask=mask > 0.5)


class Doubled(syncbn.SyncBatchNorm):
    """The graph records what this adds, so the node must not add it again."""

    def forward(self, input, mask=None):
        return 2 * super().forward(input, mask)


def step(model, *inputs):
    y = model(*inputs)
    y.square().sum().backward()
    return [y, *(p.grad for p in model.parameters()), *model.buffers()]


def agree(model, graph, *inputs):
    """Checks that both compute the same, from equal states."""
    model = copy.deepcopy(model)
    for ours, theirs in zip(step(graph, *inputs), step(model, *inputs), strict=True):
        assert torch.equal(ours, theirs)


def nodes(graph):
    return [(node.op, node.target) for node in graph.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_one_node(training):
    model = convert_sync_batchnorm(Network()).train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    plain = torch.fx.symbolic_trace(Network().train(training))
    assert nodes(graph) == nodes(plain)
    assert ("call_module", "norm") in nodes(graph)
    agree(model, graph, torch.randn(2, 3, 5, 5))
    x = torch.randn(2, 3, 5, 5)
    agree(model.train(not training), torch.fx.symbolic_trace(copy.deepcopy(model)).train(not training), x)


def test_a_mask_is_an_input_of_the_node():
    model, x, mask = Masked(), torch.randn(4, 3, 5), torch.rand(4, 5)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert nodes(graph)[-1] == ("call_module", "norm")
    agree(model, graph, x, mask)
    assert not torch.equal(graph(x, mask), graph(x, torch.ones(4, 5)))


def test_a_graph_converts_and_reverts():
    model = Network()
    graph = convert_sync_batchnorm(torch.fx.symbolic_trace(copy.deepcopy(model)))
    assert type(graph.norm) is syncbn.SyncBatchNorm2d
    agree(convert_sync_batchnorm(model), graph, torch.randn(2, 3, 5, 5))
    traced = torch.fx.symbolic_trace(convert_sync_batchnorm(Network()))
    assert type(revert_sync_batchnorm(traced).norm) is nn.BatchNorm2d
    assert traced(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_graph_copies_and_pickles(copied):
    model = convert_sync_batchnorm(Network())
    graph = copied(torch.fx.symbolic_trace(copy.deepcopy(model)))
    agree(model, graph, torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("training", [True, False])
def test_hooks_run_once(training):
    model = convert_sync_batchnorm(Network()).train(training)
    model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    agree(model, graph, torch.randn(2, 3, 5, 5))
    revert_sync_batchnorm(graph)
    with pytest.raises(TypeError, match=r"holds the hooks of a SyncBatchNorm needs that layer; received a BatchNorm2d"):
        graph(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_subclass_adds_is_added_once(training):
    model = Network(Doubled(4)).train(training)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    agree(model, graph, torch.randn(2, 3, 5, 5))


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.filterwarnings("ignore:.*observers have been enabled.*")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*")
def test_quantization_aware_training_keeps_the_layer():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model, x = convert_sync_batchnorm(Network()), torch.randn(2, 3, 5, 5)
    prepared = prepare_qat_fx(copy.deepcopy(model), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    assert type(prepared.norm) is syncbn.SyncBatchNorm2d
    prepared(x).sum().backward()
    assert prepared.norm.num_batches_tracked == 1
    assert prepared.norm.weight.grad is not None
