# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of a kind that the steps cannot read, on one rank: the same error on all, before anything moves."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import syncbn
from tests.conftest import DEVICE

pytestmark = [pytest.mark.ranks(1), pytest.mark.immediate_errors]
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the tensors of these cases are on the CPU")


def good():
    return torch.randn(3, 5, requires_grad=True)


def cut(x):
    """Gives its memory back, as a wrapper that shards parameters does."""
    x.untyped_storage().resize_(0)
    return x


class Unknown(torch.Tensor):
    """Of a kind that no check knows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("double", "sum"):
            raise NotImplementedError("no sums of this kind")
        return super().__torch_function__(func, types, args, kwargs or {})


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=layout)


INPUTS = {
    "nested": (lambda: nested(torch.strided), TypeError, ["received a nested tensor", "to_padded_tensor"]),
    "jagged": (lambda: nested(torch.jagged), TypeError, ["received a nested tensor", "to_padded_tensor"]),
    "masked": (
        lambda: torch.masked.masked_tensor(torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)),
        TypeError,
        ["received a MaskedTensor", "x.get_data()"],
    ),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.randn(3, 5)), TypeError, ["received a FakeTensor"]),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.randn(3, 5), 0.1, 0, torch.quint8),
        TypeError,
        ["needs a floating-point input", "quint8"],
    ),
    "cut": (lambda: cut(torch.randn(3, 5)), TypeError, ["shape (3, 5) and memory that does not hold it"]),
    "cut behind an offset": (lambda: cut(torch.randn(4, 5)[1:]), TypeError, ["memory that does not hold it"]),
    "csr": (lambda: torch.randn(3, 5).to_sparse_csr(), TypeError, ["layout torch.sparse_csr", "to_dense"]),
    "unknown": (
        lambda: torch.randn(3, 5).as_subclass(Unknown),
        RuntimeError,
        ["needs an input that it can sum", "Unknown: NotImplementedError: no sums of this kind"],
    ),
}


def of_width(n, dtype=torch.float32, device=None):
    return lambda p: torch.ones(n, dtype=dtype, device=device)


VECTORS = {
    "longer": (of_width(7), ValueError, "of shape (5,) and a floating dtype; received shape (7,), float32"),
    "integers": (of_width(5, torch.int64), ValueError, "received shape (5,), int64"),
    "meta": (of_width(5, device="meta"), ValueError, "on the device of the"),
    "cut": (lambda p: cut(p.detach().clone()), TypeError, "memory that does not hold it"),
    "behind an offset": (lambda p: cut(torch.ones(6)[1:]), TypeError, "memory that does not hold it"),
    "sparse": (lambda p: p.detach().to_sparse(), TypeError, "layout torch.sparse_coo"),
}


def check_refused(ranks, layer, bad, kind, *parts, x=good):
    """Asserts that all ranks raise alike if the last one has the bad tensor, and that the next step works without."""
    last = ranks.rank == ranks.size - 1
    whole = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = copy.deepcopy(layer.state_dict())
    if last:
        bad(layer)
    ranks.raises(kind, lambda: layer(x() if last else good()), f"rank {ranks.size - 1}", *parts)
    for name, tensor in whole.items():
        setattr(layer, name, tensor)
        ranks.check_equal(tensor, before[name], name)
    layer(good()).sum().backward()
    ranks.check(layer.num_batches_tracked == 1, "the next step works")


@on_cpu
@pytest.mark.filterwarnings("ignore")  # torch calls nested, masked and quantized tensors prototypes
@pytest.mark.parametrize("kind", INPUTS)
def test_an_input_of_another_kind_is_one_error(ranks, kind):
    make, error, parts = INPUTS[kind]
    check_refused(ranks, syncbn.SyncBatchNorm(5), lambda layer: None, error, *parts, x=make)


@on_cpu
@pytest.mark.parametrize("wrong", VECTORS)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_parameter_or_buffer_of_another_kind_is_one_error(ranks, name, wrong):
    make, error, part = VECTORS[wrong]

    def spoil(layer):
        store = layer._parameters if name in layer._parameters else layer._buffers
        store[name] = make(store[name])

    check_refused(ranks, syncbn.SyncBatchNorm(5), spoil, error, part, *([] if wrong == "meta" else [name]))


def inference(make):
    with torch.inference_mode():
        return make()


@pytest.mark.parametrize("name", ["input", "weight"])
def test_a_tensor_of_inference_mode_is_one_error_where_autograd_records(ranks, name):
    def spoil(layer):
        if name == "weight":
            layer._parameters["weight"] = inference(lambda: torch.ones(5))

    x = (lambda: inference(lambda: torch.randn(3, 5))) if name == "input" else good
    check_refused(ranks, syncbn.SyncBatchNorm(5), spoil, ValueError, f"{name} outside torch.inference_mode()", x=x)
    layer = syncbn.SyncBatchNorm(5)
    with torch.no_grad():
        layer(inference(lambda: torch.randn(3, 5)))
    ranks.check(layer.num_batches_tracked == 1)


@pytest.mark.parametrize("value", ["text", None, 10**400, float("nan"), 1j], ids=["text", "None", "huge", "nan", "1j"])
@pytest.mark.parametrize("where", ["last", "all"])
def test_an_eps_that_is_no_number_is_one_error(ranks, value, where):
    layer = syncbn.SyncBatchNorm(5)
    if where == "all" or ranks.rank == ranks.size - 1:
        layer.eps = value
    alone = where == "last" and ranks.size > 1
    ranks.raises(ValueError, lambda: layer(good()), "same eps on every rank" if alone else "needs eps > 0", "received")
    layer.eps = 1e-5
    layer(good()).sum().backward()


@pytest.mark.parametrize("value", ["text", 10**400, float("nan"), [0.1]], ids=["text", "huge", "nan", "list"])
def test_a_momentum_that_is_no_number_is_one_error(ranks, value):
    layer = syncbn.SyncBatchNorm(5)
    layer(good()).sum().backward()
    layer.momentum = value
    ranks.raises(ValueError, lambda: layer(good()), "needs a number as momentum, or None to average", "received")
    layer.momentum = torch.tensor(0.5)  # a number of another kind is one
    layer(good()).sum().backward()
    ranks.check(layer.num_batches_tracked == 2)


@on_cpu
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_an_argument_of_the_function_that_is_no_tensor_is_one_error(ranks, name):
    moved = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    wrong = {**moved, name: [1.0] * 5} if ranks.rank == ranks.size - 1 else moved
    call = lambda: syncbn.functional.sync_batch_norm(good(), **wrong)  # noqa: E731
    ranks.raises(TypeError, call, f"needs a torch.Tensor as {name}, or None; received list")
    ranks.check_equal(moved["running_var"], torch.ones(5))


@on_cpu
def test_a_nested_mask_is_one_error(ranks):
    mask = nested(torch.strided) if ranks.rank == ranks.size - 1 else None
    layer = syncbn.SyncBatchNorm(5)
    ranks.raises(TypeError, lambda: layer(good(), mask), "mask whose values are in memory", "a nested tensor")


@on_cpu
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_one_running_statistic_without_the_other_is_one_error(ranks, missing):
    part = f"without {missing}. Set both to None"
    check_refused(ranks, syncbn.SyncBatchNorm(5), lambda layer: setattr(layer, missing, None), ValueError, part)


@on_cpu
@pytest.mark.parametrize(
    ("counter", "received"),
    [
        (lambda: torch.tensor(True), "shape (), bool"),
        (lambda: torch.zeros(2, dtype=torch.int64), "shape (2,), int64"),
        (lambda: torch.tensor(1j), "complex64"),
    ],
    ids=["bool", "two", "complex"],
)
def test_a_counter_that_cannot_count_is_one_error(ranks, counter, received):
    def spoil(layer):
        layer.num_batches_tracked = counter()

    parts = ["num_batches_tracked to be one integer or floating-point number", received]
    check_refused(ranks, syncbn.SyncBatchNorm(5), spoil, ValueError, *parts)


def test_a_counter_of_another_dtype_on_one_rank_counts(ranks):
    layer = syncbn.SyncBatchNorm(5, momentum=None)
    if ranks.rank == ranks.size - 1:
        layer.num_batches_tracked = layer.num_batches_tracked.float()
    for _ in range(2):
        layer(good()).sum().backward()
    ranks.check(layer.num_batches_tracked == 2)
    mean = ranks.transport.all_reduce(layer.running_mean.double().clone()) / ranks.size
    ranks.check_close(layer.running_mean, mean, 1e-7, "all ranks average alike")


def vmapped(layer, x):
    torch.func.vmap(layer)(torch.stack((x, x)))


def func_grad(layer, x):
    torch.func.grad(lambda x: layer(x).sum())(x)


def with_tangent(layer, x):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


@on_cpu
@pytest.mark.filterwarnings("ignore")  # torch's forward mode uses torch.jit.script, which is deprecated
@pytest.mark.parametrize(
    ("transform", "part"),
    [
        (vmapped, "outside torch.func"),
        (func_grad, "outside torch.func"),
        (lambda layer, x: torch.func.jvp(layer, (x,), (x,)), "outside torch.func"),
        (with_tangent, "without a tangent"),
    ],
    ids=["vmap", "grad", "jvp", "forward mode"],
)
@pytest.mark.parametrize("where", ["last", "all"])
def test_a_transform_of_a_training_forward_is_one_error(ranks, transform, part, where):
    layer, x = syncbn.SyncBatchNorm(5), torch.randn(3, 5)
    here = where == "all" or ranks.rank == ranks.size - 1
    ranks.raises(TypeError, lambda: transform(layer, x) if here else layer(x), part, "model.eval()")
    ranks.check(layer.num_batches_tracked == 0, "nothing was counted")
    layer(good()).sum().backward()
    layer.eval()
    transform(layer, x)


@on_cpu
def test_a_transform_that_does_not_follow_the_input_changes_nothing(ranks):
    layer, x = syncbn.SyncBatchNorm(5), torch.randn(3, 5)
    expected = copy.deepcopy(layer)(x).detach()
    scale = torch.ones(5)
    slope = torch.func.grad(lambda scale: (layer(x).detach() * scale).sum())(scale)
    ranks.check_close(slope, expected.sum(0), 1e-5)


@pytest.mark.parametrize("dims", [(), (2,)])
@pytest.mark.parametrize("how", ["is_grads_batched", "torch.func.vmap", "one by one"])
def test_many_gradients_at_once_are_those_of_one_process(ranks, how, dims):
    """The measure is torch's layer over the whole batch."""
    draw = torch.Generator().manual_seed(3)
    W = ranks.size
    x = torch.randn(3 * W, 5, *dims, generator=draw, dtype=torch.float64, device="cpu").to(DEVICE)
    vectors = torch.randn(4, 3 * W, 5, *dims, generator=draw, dtype=torch.float64, device="cpu").to(DEVICE)
    if dims:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    whole, mine = x.clone().requires_grad_(), x[3 * ranks.rank : 3 * ranks.rank + 3].clone().requires_grad_()
    theirs, ours = (c(5, dtype=torch.float64) for c in (torch.nn.BatchNorm1d, syncbn.SyncBatchNorm))
    y = theirs(whole)
    expected = torch.stack([torch.autograd.grad(y, whole, v, retain_graph=True)[0] for v in vectors])
    y, rows = ours(mine), slice(3 * ranks.rank, 3 * ranks.rank + 3)
    own = vectors[:, rows].contiguous()
    if how == "is_grads_batched":
        grads = torch.autograd.grad(y, mine, own, is_grads_batched=True)[0]
    elif how == "torch.func.vmap":
        grads = torch.func.vmap(lambda v: torch.autograd.grad(y, mine, v, retain_graph=True)[0])(own)
    else:
        grads = torch.stack([torch.autograd.grad(y, mine, v, retain_graph=True)[0] for v in own])
    ranks.check_close(grads, expected[:, rows], 1e-12, how)
    ours(mine).sum().backward()


@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_vectorised_derivatives_are_those_of_a_loop(ranks, name):
    draw = torch.Generator().manual_seed(ranks.rank)
    x = torch.randn(3, 2, generator=draw, dtype=torch.float64, device="cpu").to(DEVICE)
    layer = syncbn.SyncBatchNorm(2, dtype=torch.float64)
    derivative = getattr(torch.autograd.functional, name)
    call = layer if name == "jacobian" else lambda x: layer(x).pow(3).sum()
    ranks.check_close(derivative(call, x, vectorize=True), derivative(call, x), 1e-12, name)
