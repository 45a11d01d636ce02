# SPDX-License-Identifier: BSD-3-Clause
"""The registered operators keep torch's contract, and a compiled layer in one process is the eager one."""

import copy
import math

import pytest
import torch
from torch.library import opcheck

import syncbn
from syncbn import functional, moments
from syncbn.calls import keys, operators, order, sites
from syncbn.calls.sites import Site
from syncbn.moments import BACKWARD, FORWARD, Status
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
KEY = keys.key_of_spec(None, DEVICE.type)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def wire():
    sums = torch.arange(2.0 * C, dtype=torch.float64)
    return moments.pack(moments.ABSTAINS, 4.0, *sums.chunk(2), Status(grad_enabled=1.0, needs_grad=1.0, float32=1.0))


SETTINGS = list(sites.as_floats((C, 1e-5, 0.1, True, None)))
IDENTITY = operators.pack_identity(1, 1, 5, (7, 9))
SITE = Site("SyncBatchNorm")


@pytest.mark.parametrize("before", [None, IDENTITY.clone()], ids=["first", "later"])
@pytest.mark.parametrize("anchor", [None, operators.ANCHOR], ids=["no anchor", "anchor"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_all_reduce_is_a_proper_operator(before, anchor, requires_grad):
    values = torch.randn(2 * C + 7, dtype=torch.float64, requires_grad=requires_grad)
    opcheck(torch.ops.syncbn.chained_all_reduce.default, (values, anchor, IDENTITY, KEY, BACKWARD, before))


@pytest.mark.parametrize("before", [None, IDENTITY.clone()], ids=["first", "later"])
@pytest.mark.parametrize("site", [None, SITE.number], ids=["no layer", "a layer"])
def test_the_all_reduce_of_moments_is_a_proper_operator(monkeypatch, before, site):
    always = property(lambda self: 5, lambda self, serial: None)  # a call that is made again is the same call
    monkeypatch.setattr(SingleTransport, "serial", always, raising=False)
    arguments = (wire(), site, None, KEY, "", SETTINGS, before)
    opcheck(torch.ops.syncbn.chained_all_reduce_moments.default, arguments)


def test_the_correction_of_renormalization_is_a_proper_operator():
    arguments = (wire(), torch.zeros(C), torch.ones(C), 1e-5, 3.0, 5.0)
    opcheck(torch.ops.syncbn.renorm_correction.default, arguments)


def test_the_operators_are_ordered():
    """Without it a compiler may give branches that do not depend on each other another order on another rank."""
    from torch._higher_order_ops.effects import has_effects

    assert has_effects(torch.ops.syncbn.chained_all_reduce.default)
    assert has_effects(torch.ops.syncbn.chained_all_reduce_moments.default)
    assert has_effects(torch.ops.syncbn.renorm_correction.default)


def recorded(function, *inputs):
    """What a compiler is given to order: operators and what each takes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    return [node for node in graph.nodes if "syncbn" in str(node.target)]


def test_the_public_operators_become_chained_ones_in_the_order_of_the_program():
    def program(x, y):
        first, identity, _ = operators.all_reduce_moments(x, None, None, KEY, "", SETTINGS)
        second, other, _ = operators.all_reduce_moments(y, None, None, KEY, "", SETTINGS)
        third = operators.all_reduce(second[: 2 * C + 7], None, other, KEY, BACKWARD)
        return first, third, operators.all_reduce(first[: 2 * C + 7], None, identity, KEY, BACKWARD)

    nodes = recorded(program, wire(), wire())
    chained = torch.ops.syncbn.chained_all_reduce.default
    of_moments = torch.ops.syncbn.chained_all_reduce_moments.default
    assert [node.target for node in nodes] == [of_moments, of_moments, chained, chained]
    assert nodes[0].args[-1] is None
    for node, last in zip(nodes[1:], nodes, strict=False):
        assert last in ancestors(node.args[-1])  # also where the program has no such dependence


def ancestors(node):
    found = [node]
    for each in found:
        found += [other for other in each.all_input_nodes if other not in found]
    return found


def test_a_chain_ends_with_its_graph_and_without_a_graph_there_is_none():
    assert order.before() is None
    order.after(IDENTITY)
    assert order.before() is None

    def program(x):
        return operators.all_reduce_moments(x, None, None, KEY, "", SETTINGS)[0]

    for _ in range(2):
        (node,) = recorded(program, wire())
        assert node.args[-1] is None


def test_the_operators_say_which_call_they_are_of(monkeypatch):
    """What the wire has in the slots of the call is not looked at: a compiled graph cannot know it."""
    sent, send = [], SingleTransport.all_reduce
    monkeypatch.setattr(SingleTransport, "all_reduce", lambda self, w: sent.append(w.clone()) or send(self, w))
    transport = SingleTransport()
    transport.serial = 41
    group = keys.key_of_transport(transport)
    given = wire()
    given[: moments.CALL] = 3.0
    copied = given.clone()
    summed, identity, moves = operators.all_reduce_moments(given, SITE.number, None, group, "", SETTINGS)
    hash = SITE.hash(sites.of_floats(SETTINGS), transport.group_id)
    forward = moments.numbers(41, hash, FORWARD)
    assert sent[0][: moments.CALL].tolist() == list(moments.head(forward))
    assert identity.tolist() == [int(SITE.number), 1, 41, *hash]
    assert bool(moves)
    assert transport.serial == 42
    assert torch.equal(given, copied)
    assert torch.equal(summed[moments.CALL :], given[moments.CALL :])
    operators.all_reduce(given[: 2 * C + 7], None, identity, group, BACKWARD)
    assert sent[1][: moments.CALL].tolist() == list(moments.head(moments.numbers(41, hash, BACKWARD)))
    assert transport.serial == 42  # counts forwards
    keys.forget(transport)


def test_a_rank_that_abstained_forward_abstains_in_every_derivative(monkeypatch):
    sent, send = [], SingleTransport.all_reduce
    monkeypatch.setattr(SingleTransport, "all_reduce", lambda self, w: sent.append(w.clone()) or send(self, w))
    x = torch.randn(2 * C + 7, dtype=torch.float64, requires_grad=True)
    y = operators.all_reduce(x, operators.ANCHOR, operators.pack_identity(1, 0, 5, (7, 9)), KEY, BACKWARD)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert len(sent) > 2
    assert not any(wire[: moments.CALL].any() for wire in sent)


def test_derivatives_of_the_all_reduce_have_directions_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(operators.moments, "numbers", lambda *of: seen.append(of[2]) or (1, 2, 3, 4))
    x = torch.randn(2 * C + 7, dtype=torch.float64, requires_grad=True)
    y = operators.all_reduce(x, operators.ANCHOR, IDENTITY, KEY, BACKWARD)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert seen[:2] == [1, 3]
    assert len(seen) > 2
    assert set(seen[2:]) <= {3, 5}


def test_a_number_stands_for_a_group():
    assert keys.key_of_spec(None, DEVICE.type) == KEY
    few, others = (keys.key_of_spec(syncbn.GroupSpec("mpi", ranks), DEVICE.type) for ranks in ((0, 1), (0, 2)))
    assert few != others
    transport = SingleTransport()
    assert keys.key_of_transport(transport) == keys.key_of_transport(transport) != KEY


OPTIONS = [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}]
SYMBOLS = [{}, {"momentum": None}, {"renorm_limits": (1.5, 0.5)}]
"""With dynamic=True sizes are symbols from the first step, and so are eps, momentum and limits."""


@pytest.mark.parametrize(
    ("options", "dynamic"), [*((each, None) for each in OPTIONS), *((each, True) for each in SYMBOLS)], ids=str
)
def test_options_equal_the_eager_layer(options, dynamic):
    eager = syncbn.SyncBatchNorm(C, **options)
    layer = copy.deepcopy(eager)
    run = compiled(layer, dynamic=dynamic)
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


def test_a_schedule_of_momentum_and_eps_stays_one_graph():
    """What has changed once is a symbol to the compiler from then on."""
    eager = syncbn.SyncBatchNorm(C)
    layer = copy.deepcopy(eager)
    run = compiled(layer)
    for momentum, eps in ((0.1, 1e-5), (0.2, 1e-5), (0.4, 1e-3), (0.05, 1e-2)):
        for each in (layer, eager):
            each.momentum, each.eps = momentum, eps
        x = torch.randn(4, C)
        torch.testing.assert_close(run(x), eager(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "symbols"])
def test_the_function_compiles_too(dynamic):
    mean, var, x = torch.zeros(C), torch.ones(C), torch.randn(4, C)
    run = compiled(lambda x: functional.sync_batch_norm(x, mean, var, eps=1e-3), dynamic=dynamic)
    torch.testing.assert_close(run(x), functional.sync_batch_norm(x, eps=1e-3))
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


def test_no_gradient_reaches_the_anchor():
    compiled(syncbn.SyncBatchNorm(C))(torch.randn(4, C)).sum().backward()
    assert operators.ANCHOR.grad is None


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
    assert [name for name in names if "syncbn" in name] == ["syncbn.all_reduce_moments"]
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


@pytest.mark.parametrize(
    ("setting", "value", "needs"),
    [("eps", 0.0, "eps > 0 in training"), ("eps", math.nan, "eps > 0"), ("momentum", math.nan, "a number as momentum")],
)
@pytest.mark.parametrize("before", [(), (0.1, 0.2)], ids=["number", "symbol"])
def test_a_bad_setting_is_an_error_as_in_eager(setting, value, needs, before):
    layer = syncbn.SyncBatchNorm(C)
    run = compiled(layer)
    for good in before:
        setattr(layer, setting, good)
        run(torch.randn(4, C))
    setattr(layer, setting, value)
    with pytest.raises(ValueError, match=f"On rank 0: SyncBatchNorm needs {needs}"):
        run(torch.randn(4, C))


def test_a_training_step_tells_autograd_that_buffers_moved():
    layer = syncbn.SyncBatchNorm(C)
    before = [buffer._version for buffer in layer.buffers()]
    compiled(layer)(torch.randn(4, C))
    assert all(buffer._version > version for buffer, version in zip(layer.buffers(), before, strict=True))


def test_an_empty_batch_is_counted_as_in_eager():
    layer, eager = syncbn.SyncBatchNorm(C), syncbn.SyncBatchNorm(C)
    run = compiled(layer)
    for n in (0, 4, 0):
        x = torch.randn(n, C)
        torch.testing.assert_close(run(x), eager(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert layer.num_batches_tracked == 3


def test_one_value_per_channel_is_an_error_and_changes_nothing():
    layer = syncbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        compiled(layer)(torch.randn(1, C))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(C))


def test_a_compiled_layer_without_replays_moves_its_statistics_inside_backward():
    layer, x, leaf = syncbn.SyncBatchNorm(3, replays=False), torch.randn(5, 3), torch.ones((), requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x)
    leaf.register_hook(lambda _: compiled(x).sum() * 0)
    leaf.backward()
    assert layer.num_batches_tracked == 2
