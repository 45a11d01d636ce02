# SPDX-License-Identifier: BSD-3-Clause
"""Compiled graphs keep one order of collectives on all ranks, whatever their local batches.

Inductor schedules branches that do not depend on each other by the size of their tensors, and sizes differ between
ranks. Each collective depends by data on the one before it, so no pass can exchange two.
"""

import copy
import itertools
import os
import shutil

import pytest
import torch
from torch import nn

import syncbn
from syncbn.transports import gather
from tests.calls.test_compile import pytestmark as warnings_of_torch
from tests.multiprocess import batches

pytestmark = [
    pytest.mark.ranks(2),
    pytest.mark.timeout(900),
    *warnings_of_torch,
    pytest.mark.filterwarnings("default"),  # inductor imports parts of torch that torch itself has deprecated
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"),
    pytest.mark.cpu("torch generates no code for the device of host memory"),
]
N, C = 7, 4
MOST = int(os.environ.get("SYNCBN_TEST_COMPILE", "2"))


@pytest.fixture(autouse=True)
def _few_ranks_and_a_fresh_compiler(ranks):
    if ranks.size > MOST:
        pytest.skip("every rank compiles, and cores are few; SYNCBN_TEST_COMPILE=3 runs it on 3")
    torch._dynamo.reset()


@pytest.fixture
def sent(monkeypatch):
    """The identity of every message of this rank, in order."""
    order, original = [], gather.all_reduce

    def all_reduce(wire, transport, message, *notes):
        order.append(str(message))
        return original(wire, transport, message, *notes)

    monkeypatch.setattr(gather, "all_reduce", all_reduce)
    return order


class Block(nn.Module):
    """A residual block with a downsample branch, as in ResNet: two batch norms of one width that are independent."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(C, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(C, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


def models(width=4):
    torch.manual_seed(2)
    one = Block(width).double()
    return one, syncbn.convert_sync_batchnorm(copy.deepcopy(one))


def check_step(ranks, run, model, one, sizes, side=4):
    """A training step of a compiled model on local batches of these sizes, against one process."""
    x = torch.randn(sum(sizes), C, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    mine = ranks.shares(sizes)[ranks.rank]
    whole, own = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    expected, y = one(whole), run(own)
    expected.pow(3).sum().backward()
    y.pow(3).sum().backward()
    ranks.check_close(y.detach(), expected.detach()[mine], 1e-10, f"{sizes} output")
    ranks.check_close(own.grad, whole.grad[mine], 1e-9, f"{sizes} input gradient")
    for (name, ours), theirs in zip(model.state_dict().items(), one.state_dict().values(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, f"{sizes} {name}")
    for (name, ours), theirs in zip(model.named_parameters(), one.parameters(), strict=True):
        gradient = ranks.transport.all_reduce(ours.grad.clone())
        ranks.check_close(gradient, theirs.grad, 1e-9 * (1.0 + theirs.grad.abs().max().item()), f"{sizes} {name}")
        ours.grad = theirs.grad = None


def check_one_order(ranks, sent):
    rows = gather.gather_notes(" | ".join(sent[-12:]), ranks.transport)
    ranks.check(len(set(rows)) == 1, f"{rows}")


@pytest.mark.parametrize(("backend", "least"), [("inductor", 2), ("aot_eager", 0)])
def test_every_split_of_a_batch_equals_one_process(ranks, sent, backend, least):
    """One graph for any size; local batches of 0 and of 1 get graphs of their own, whose order aot_eager shows.

    Without samples inductor fails on the convolution, with the strides of its gradient.
    """
    one, model = models()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    splits = [sizes for sizes in itertools.product(range(least, N + 1), repeat=ranks.size) if sum(sizes) == N]
    for sizes in splits[:: 5 if ranks.size > 2 and backend == "inductor" else 1]:
        sent.clear()
        check_step(ranks, run, model, one, sizes)
        check_one_order(ranks, [text for text in sent if "of '" in text])
        labels = [text.split(" (")[0] for text in sent if "forward of '" in text and "first" not in text]
        expected = [f"forward of '{name}'" for name in ("bn1", "bn2", "downsample.1")]
        ranks.check(labels[-3:] == expected, f"the order of the program: {labels}")


def test_graphs_and_models_by_turns_and_a_graph_break_between_layers(ranks, sent):
    pairs = [models(4), models(6)]
    runs = [torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") for _, model in pairs]

    def broken(x, model=pairs[0][1]):
        y = torch.relu(model.bn1(model.conv1(x)))
        torch._dynamo.graph_break()
        return torch.relu(model.bn2(model.conv2(y)) + model.downsample(x))

    runs[0] = torch.compile(broken, dynamic=True, backend="aot_eager")
    sizes = [5, 2] if ranks.size == 2 else [3, 2, 2]
    for turn in range(3):
        one, model = pairs[turn % 2]
        check_step(ranks, runs[turn % 2], model, one, sizes, side=4 + turn)
    check_one_order(ranks, [text for text in sent if "of '" in text])


def test_reduce_overhead_falls_back_on_a_cpu(ranks, sent):
    one = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)).double()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(one))
    run = torch.compile(model, mode="reduce-overhead")
    for _ in range(2):
        check_step(ranks, run, model, one, [5, 2] if ranks.size == 2 else [3, 2, 2])
    check_one_order(ranks, [text for text in sent if "of '" in text])


def test_the_order_is_one_of_data(ranks):
    """In the graphs that a compiler gets each collective takes what the one before it returned, backward as well."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def look(graph, inputs):
        graphs.append([n for n in graph.graph.nodes if "with_effects" in str(n.target) and "chained" in str(n.args[1])])
        return make_boxed_func(graph.forward)

    _, model = models()
    x = torch.randn(3, C, 4, 4, dtype=torch.float64)
    torch.compile(model, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(x).sum().backward()
    ranks.check([len(nodes) for nodes in graphs] == [3, 3], f"{graphs}")
    for nodes in graphs:
        for earlier, later in itertools.pairwise(nodes):
            ranks.check(depends(later.args[-1], earlier), f"{later.format_node()} does not depend on {earlier}")


def depends(node, on):
    """Whether a node is made of another one by views and choices alone."""
    while node is not None and node is not on:
        node = node.args[0] if node.op == "call_function" else None
    return node is on


def test_batches_of_the_control_differ(ranks):
    """The negative control: without synchronisation the same comparison fails."""
    one, model = models()
    syncbn.revert_sync_batchnorm(model)
    x = torch.randn(N, C, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = ranks.shares(batches.SHARES["uneven"](ranks.size))[ranks.rank]
    ranks.check(not torch.allclose(model(x[mine]), one(x)[mine], atol=1e-3))
