# SPDX-License-Identifier: BSD-3-Clause
"""The registered operators keep torch's contract, and a compiled layer in one process is the eager one."""

import copy

import pytest
import torch
from torch.library import opcheck

import syncbn
from syncbn import collective, functional
from syncbn.moments import Status
from syncbn.transports.single import SingleTransport
from tests.conftest import DEVICE

# torch's compiler, as it traces, does what torch warns of: it makes an instance of an autograd function, looks at
# the .grad of inner tensors, and imports what is older.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

C = 3
KEY = collective.key_for(None, DEVICE.type)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def wire():
    status = Status(grad_enabled=1.0, needs_grad=1.0, float32=1.0)
    return torch.tensor([4.0, *range(2 * C), *status], dtype=torch.float64)


@pytest.mark.parametrize("anchor", [None, collective.ANCHOR])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_all_reduce_is_a_proper_operator(anchor, requires_grad):
    values = torch.randn(2 * C, dtype=torch.float64, requires_grad=requires_grad)
    opcheck(torch.ops.syncbn.all_reduce.default, (values, anchor, KEY))


@pytest.mark.parametrize("agreed", [None, torch.zeros((), dtype=torch.int64)])
def test_the_all_reduce_of_moments_is_a_proper_operator(agreed):
    settings = [float(C), 1e-5, 0.1, 1.0]
    opcheck(torch.ops.syncbn.all_reduce_moments.default, (wire(), agreed, None, KEY, "", settings))


def test_both_operators_are_ordered():
    """Without it a compiler may give branches that do not depend on each other another order on another rank."""
    from torch._higher_order_ops.effects import has_effects

    assert has_effects(torch.ops.syncbn.all_reduce.default)
    assert has_effects(torch.ops.syncbn.all_reduce_moments.default)


def test_a_number_stands_for_a_group():
    assert collective.key_for(None, DEVICE.type) == KEY
    few, others = (collective.key_for(syncbn.GroupSpec("mpi", ranks), DEVICE.type) for ranks in ((0, 1), (0, 2)))
    assert few != others
    transport = SingleTransport()
    assert collective.key_of(transport) == collective.key_of(transport) != KEY


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_options_equal_the_eager_layer(options):
    eager = syncbn.SyncBatchNorm(C, **options)
    layer = copy.deepcopy(eager)
    run = compiled(layer)
    for n in (4, 6, 6):
        x = torch.randn(n, C, 5)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        torch.testing.assert_close(run(ours), eager(theirs), rtol=1e-6, atol=1e-6)
        run(ours).square().sum().backward()
        eager(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    for p, q in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


def test_the_function_compiles_too():
    mean, var, x = torch.zeros(C), torch.ones(C), torch.randn(4, C)
    run = compiled(lambda x: functional.sync_batch_norm(x, mean, var, eps=1e-3))
    torch.testing.assert_close(run(x), functional.sync_batch_norm(x, eps=1e-3))
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


def test_no_gradient_reaches_the_anchor():
    compiled(syncbn.SyncBatchNorm(C))(torch.randn(4, C)).sum().backward()
    assert collective.ANCHOR.grad is None


def test_eval_compiles_without_a_collective():
    layer = syncbn.SyncBatchNorm(C).eval()
    names = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(4, C)
    torch.testing.assert_close(compiled(layer, backend=look)(x), layer(x))
    assert names
    assert not any("syncbn" in name for name in names)


def test_sums_and_normalisation_are_visible_to_the_compiler():
    """Only the all-reduce is opaque: one operator of ours forward, and the neighbours in the same graph."""
    names = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model = torch.nn.Sequential(syncbn.SyncBatchNorm(C), torch.nn.SiLU())
    with torch.no_grad():
        compiled(model, backend=look)(torch.randn(4, C))
    assert [name for name in names if "syncbn" in name] == ["syncbn.all_reduce_moments.default"]
    assert any("silu" in name for name in names)
    assert sum("sum" in name for name in names) >= 2


def test_equal_blocks_share_one_compilation():
    """Compiled block by block, as large models are: nothing in the graph is of one layer alone."""
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    blocks = [torch.nn.Sequential(torch.nn.Linear(C, C), syncbn.SyncBatchNorm(C)) for _ in range(4)]
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
        block(torch.randn(4, C)).sum().backward()
    assert backend.frame_count == 1


def test_the_compiler_refuses_a_second_derivative():
    """torch's own refusal, and not a wrong number."""
    x = torch.randn(4, C, requires_grad=True)
    y = compiled(syncbn.SyncBatchNorm(C))(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def test_one_value_per_channel_is_an_error_and_changes_nothing():
    layer = syncbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        compiled(layer)(torch.randn(1, C))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(C))
