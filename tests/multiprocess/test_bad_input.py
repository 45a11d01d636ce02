# SPDX-License-Identifier: BSD-3-Clause
"""A fault on one rank is the same error on every rank; nothing changes, nothing hangs, and the next step works."""

import copy

import pytest
import torch

import syncbn
from syncbn import functional
from tests.conftest import DEVICE
from tests.multiprocess import batches

pytestmark = pytest.mark.ranks(1)

FAULTS = {
    "one dim": (lambda: torch.zeros(5), ValueError, ["input.dim() >= 2", "(5,)", "unsqueeze"]),
    "no channel": (lambda: torch.zeros(5, 0), ValueError, ["at least 1 channel", "(5, 0)", "Leave the layer out"]),
    "wrong C": (lambda: torch.zeros(2, 7, 3), ValueError, ["input.size(1) == num_features", "7", "num_features=5"]),
    "integers": (lambda: torch.zeros(2, 5, dtype=torch.int64), TypeError, ["floating-point", "int64", "x.float()"]),
    "complex": (lambda: torch.zeros(2, 5, dtype=torch.complex64), TypeError, ["floating-point", "complex64"]),
    "sparse": (
        lambda: torch.ones(2, 5).to_sparse(),
        TypeError,
        ["values are in memory", "torch.sparse_coo", "to_dense"],
    ),
    "meta": (lambda: torch.ones(2, 5, device="meta"), TypeError, ["values are in memory", "a meta tensor", "device"]),
    "33 dims": (lambda: torch.ones(2, 5, *[1] * 31), ValueError, ["at most 32", "received 33", "x.flatten(2)"]),
    "no tensor": (lambda: [1.0, 2.0], TypeError, ["torch.Tensor", "list"]),
}
if DEVICE.type != "cpu":
    FAULTS["left on the CPU"] = (
        lambda: torch.ones(2, 5, device="cpu"),
        ValueError,
        ["on the device of the", str(DEVICE), "cpu"],
    )


def good():
    return torch.randn(3, 5, requires_grad=True)


@pytest.mark.immediate_errors
@pytest.mark.parametrize("where", ["first", "last", "all"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_on_some_ranks_is_one_error_on_all(ranks, fault, where):
    make, kind, parts = FAULTS[fault]
    layer = syncbn.SyncBatchNorm(5)
    before = copy.deepcopy(layer.state_dict())
    bad = {"first": ranks.rank == 0, "last": ranks.rank == ranks.size - 1, "all": True}[where]
    who = {"first": "rank 0", "last": f"rank {ranks.size - 1}"}.get(where, "rank")
    ranks.raises(kind, lambda: layer(make() if bad else good()), who, *parts)
    for key, value in before.items():
        ranks.check_equal(layer.state_dict()[key], value, key)
    layer(good()).sum().backward()
    ranks.check(layer.num_batches_tracked == 1, "the next step works")


@pytest.mark.immediate_errors
def test_one_value_per_channel_in_the_group_is_one_error(ranks):
    layer = syncbn.SyncBatchNorm(5)
    x = torch.randn(1 if ranks.rank == 0 else 0, 5)
    parts = ["at least 2 values per channel", "received 1", f"{ranks.size} rank", "model.eval()"]
    ranks.raises(ValueError, lambda: layer(x), *parts)
    ranks.check(layer.num_batches_tracked == 0, "nothing was tracked")


@pytest.mark.ranks(2)
def test_layers_of_different_width_are_one_error(ranks):
    layer = syncbn.SyncBatchNorm(5 + (ranks.rank == 1))
    x = torch.randn(3, layer.num_features)
    ranks.raises(ValueError, lambda: layer(x), "same num_features on every rank", "5 on rank", "6 on rank 1", "Build")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("setting", ["eps", "momentum"])
def test_layers_of_different_settings_are_one_error(ranks, setting):
    layer = syncbn.SyncBatchNorm(5, **{setting: 0.25 if ranks.rank == 1 else 0.5})
    ranks.raises(ValueError, lambda: layer(good()), f"same {setting}", "0.25 on rank 1")


@pytest.mark.immediate_errors
@pytest.mark.ranks(2)
def test_different_dtypes_are_one_error(ranks):
    layer = syncbn.SyncBatchNorm(5)
    x = good().to(torch.bfloat16 if ranks.rank == 1 else torch.float32)
    ranks.raises(TypeError, lambda: layer(x), "one dtype on every rank", "float32 on rank", "bfloat16 on rank 1")


@pytest.mark.immediate_errors
@pytest.mark.ranks(2)
def test_different_gradient_modes_are_one_error(ranks):
    layer = syncbn.SyncBatchNorm(5)

    def call():
        with torch.set_grad_enabled(ranks.rank != 1):
            layer(good())

    ranks.raises(ValueError, call, "torch.is_grad_enabled()", "False on rank 1", "model.eval()")


def test_an_unknown_group_is_refused_with_the_choices(ranks):
    parts = ["process_group must be None", "ProcessGroup", "mpi4py", "World.subgroup", "str: 'everyone'"]
    ranks.raises(TypeError, lambda: syncbn.SyncBatchNorm(5, process_group="everyone"), *parts)


@pytest.mark.parametrize("size", [0, -1, 7])
def test_a_subgroup_that_does_not_divide_is_refused(ranks, size):
    parts = [f"divides {ranks.size} ranks", f"received {size}", "Choose one of 1"]
    ranks.raises(ValueError, lambda: ranks.world.subgroup(size), *parts)


@pytest.mark.ranks(2)
def test_raise_together_tells_every_rank(ranks):
    error = ValueError("the file is missing") if ranks.rank == 1 else None
    ranks.raises(ValueError, lambda: ranks.world.raise_together(error), "rank 1", "the file is missing")
    ranks.world.raise_together(None)


@pytest.mark.immediate_errors
@pytest.mark.parametrize("wrong", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda: torch.ones(7), "(7,)"),
        (lambda: torch.ones(5, 1), "(5, 1)"),
        (lambda: torch.ones(5, dtype=torch.int64), "int64"),
    ],
)
def test_a_parameter_of_another_shape_on_one_rank_is_one_error(ranks, wrong, make, received):
    given = {name: torch.ones(5) for name in ("weight", "bias", "running_mean", "running_var")}
    if ranks.rank == ranks.size - 1:
        given[wrong] = make()
    before = given["running_mean"].clone()
    parts = [f"rank {ranks.size - 1}", f"needs {wrong} of shape (5,) and a floating dtype", received]
    ranks.raises(ValueError, lambda: functional.sync_batch_norm(good(), **given), *parts)
    ranks.check_equal(given["running_mean"], before, "nothing moved")
    functional.sync_batch_norm(good(), weight=torch.ones(5))


@pytest.mark.immediate_errors
def test_a_parameter_on_another_device_is_one_error(ranks):
    weight = torch.ones(5, device="meta" if ranks.rank == 0 else DEVICE)
    parts = ["rank 0", f"needs weight on the device of the input, {DEVICE}", "received meta"]
    ranks.raises(ValueError, lambda: functional.sync_batch_norm(good(), weight=weight), *parts)


@pytest.mark.cpu("the device of host memory has no sparse tensors")
@pytest.mark.parametrize("where", ["last", "all"])
def test_sparse_gradients_are_one_error(ranks, where):
    sparse = where == "all" or ranks.rank == ranks.size - 1
    model = torch.nn.Embedding(6, 3, sparse=sparse)
    model(torch.tensor([1, 2])).sum().backward()
    who = f"rank {ranks.size - 1}" if where == "last" else "rank"
    parts = [who, "needs dense gradients", "received sparse ones of weight", "sparse=False"]
    ranks.raises(ValueError, lambda: ranks.world.average_gradients(model), *parts)
    model.weight.grad = torch.ones(6, 3)
    ranks.world.average_gradients(model)
    ranks.check_equal(model.weight.grad, torch.ones(6, 3), "the next step works")


@pytest.mark.ranks(2)
def test_different_models_are_refused_by_world(ranks):
    model = torch.nn.Linear(3, 4 + (ranks.rank == 1))
    ranks.raises(ValueError, lambda: ranks.world.broadcast(model), "same number of values", "Build the same model")
    ranks.raises(ValueError, lambda: ranks.world.average_gradients(model), "same number of values")


@pytest.mark.parametrize("bad", [-1, 2.5, None])
def test_unusable_counts_are_refused(ranks, bad):
    count = bad if ranks.rank == 0 else 1
    ranks.raises(ValueError, lambda: ranks.world.loss_scale(count), "rank 0", "integer count >= 0", f"{bad}")
    ranks.raises(ValueError, lambda: ranks.world.loss_scale(0), "a sample on some rank", "Skip the step")


def test_a_layer_of_a_larger_job_says_so(ranks):
    layer = syncbn.SyncBatchNorm(5)
    kind = "mpi" if ranks.library == "mpi" else "torch"
    layer.process_group = syncbn.GroupSpec(kind, tuple(range(ranks.size + 5)))
    if ranks.transport.name == "single":
        layer(good())  # alone, any group is this process
        return
    ranks.raises(ValueError, lambda: layer(good()), f"job of {ranks.size}", "layer.process_group")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["mpi", "torch"])
def test_a_layer_of_another_ranks_group_says_so(ranks, kind, request):
    """As after one rank saved its model and all load it."""
    if kind == "torch":
        request.getfixturevalue("torch_world")
    elif ranks.library != "mpi":
        pytest.skip("no MPI job")
    layer = syncbn.SyncBatchNorm(5)
    layer.process_group = syncbn.GroupSpec(kind, ((ranks.rank + 1) % ranks.size,), "a label nobody knows")
    text = ""
    try:
        layer(good())
    except ValueError as error:
        text = str(error)
    ranks.check("must contain the calling process" in text and f"on rank {ranks.rank}" in text, text)


@pytest.mark.parametrize("fault", ["one dim", "integers", "no tensor"])
def test_a_lazy_layer_refuses_bad_input_together(ranks, fault):
    make, kind, parts = FAULTS[fault]
    layer = syncbn.LazySyncBatchNorm()
    ranks.raises(kind, lambda: layer(make() if ranks.rank == 0 else good()), "rank 0", *parts)
    layer(good())
    ranks.check(layer.num_features == 5, "the next step works")


@pytest.mark.immediate_errors
@pytest.mark.parametrize("fault", FAULTS)
def test_the_function_refuses_bad_input_together(ranks, fault):
    make, kind, parts = FAULTS[fault]
    if fault == "wrong C":  # nothing says which of the two is wrong
        parts = ["needs input.size(1) values in each parameter", "received weight of 5, and an input of 7 channels"]
    call = functional.sync_batch_norm
    x = make() if ranks.rank == 0 else good()
    ranks.raises(kind, lambda: call(x, weight=torch.ones(5)), "rank 0", *parts)


def test_eval_refuses_bad_input_too(ranks):
    layer = syncbn.SyncBatchNorm(5).eval()
    for make, kind, parts in (FAULTS[fault] for fault in FAULTS if fault not in ("meta", "left on the CPU")):
        ranks.raises(kind, lambda make=make: layer(make()), *parts)


@pytest.mark.immediate_errors
def test_shares_that_were_refused_do_not_count(ranks, rng):
    """After an error the statistics are still exact."""
    batch = batches.make((2 * ranks.size, 5), rng)
    layer = batches.ours(batch)
    ranks.raises(ValueError, lambda: layer(torch.zeros(5) if ranks.rank == 0 else good()), "rank 0")
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    ranks.check_close(batches.run(layer, batch.x[mine], batch.grad_y[mine]).y, batches.exact(batch).y[mine], 1e-5)
