# SPDX-License-Identifier: BSD-3-Clause
"""Split a batch in any way: output, input gradient and running statistics are those of one process."""

import itertools

import pytest
import torch

import syncbn
from tests.conftest import DEVICE
from tests.multiprocess import batches
from tests.tolerances import allowed, error

pytestmark = pytest.mark.ranks(1)

SPATIAL = {"(N, C)": (), "(N, C, L)": (7,), "(N, C, H, W)": (4, 3), "(N, C, D, H, W)": (2, 3, 2)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def compare(ranks, batch, sizes, layout=lambda x: x):
    """Checks this rank's part of a global batch against the definition, as close as torch's own layer comes."""
    mine = ranks.shares(sizes)[ranks.rank]
    dtype = batch.x.dtype
    exact = batches.exact(batch)
    theirs = batches.load(batches.torch_layer(batch.x.dim(), batch.x.size(1)), batch)
    if dtype == torch.float64:
        theirs = theirs.double()
    theirs = batches.run(theirs, batch.x, batch.grad_y)
    layer = batches.ours(batch, dtype=torch.float64 if dtype == torch.float64 else None)
    got = batches.run(layer, layout(batch.x)[mine], batch.grad_y[mine])
    for name in ("y", "grad_x"):
        bound = allowed(error(getattr(theirs, name), getattr(exact, name)), dtype)
        ranks.check_close(getattr(got, name), getattr(exact, name)[mine], bound, name)
    for name in ("mean", "var"):
        buffer_dtype = layer.running_mean.dtype
        bound = allowed(error(getattr(theirs, name), getattr(exact, name)), buffer_dtype)
        ranks.check_close(getattr(got, name), getattr(exact, name), bound, f"running {name}")
    ranks.check(got.y.dtype == dtype and got.grad_x.dtype == dtype, "output and gradient keep the input's dtype")


@pytest.mark.parametrize("shares", batches.SHARES)
@pytest.mark.parametrize("spatial", SPATIAL)
def test_any_shares_equal_one_process(ranks, rng, shares, spatial):
    sizes = batches.SHARES[shares](ranks.size)
    if sum(sizes) == 1 and not SPATIAL[spatial]:
        sizes = [2]
    compare(ranks, batches.make((sum(sizes), 5, *SPATIAL[spatial]), rng), sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", ["uneven", "an empty rank"])
def test_any_dtype_equals_one_process(ranks, rng, dtype, shares):
    sizes = batches.SHARES[shares](ranks.size)
    compare(ranks, batches.make((sum(sizes), 6, 4, 5), rng, dtype), sizes)


@pytest.mark.parametrize(("layout", "dims"), [*itertools.product(batches.LAYOUTS, [4, 5])])
def test_any_layout_equals_one_process(ranks, rng, layout, dims):
    sizes = batches.SHARES["uneven"](ranks.size)
    batch = batches.make((sum(sizes), 4, 5, 3, 2)[:dims], rng)
    compare(ranks, batch, sizes, batches.LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [4, 5])
def test_output_and_gradient_keep_channels_last(ranks, rng, dims, dtype):
    batch = batches.make((2, 4, 5, 3, 2)[:dims], rng, dtype)
    x = batches.LAYOUTS["channels_last"](batch.x)
    got = batches.run(batches.ours(batch), x, batch.grad_y)  # grad_y comes contiguous
    ranks.check(got.y.stride() == x.stride(), f"y has strides {got.y.stride()}")
    ranks.check(got.grad_x.stride() == x.stride(), f"grad_x has strides {got.grad_x.stride()}")


def test_six_dims_equal_the_same_data_in_five(ranks, rng):
    batch = batches.make((2 * ranks.size, 3, 2, 2, 4), rng)
    mine = ranks.shares([2] * ranks.size)[ranks.rank]
    x, grad_y = batch.x[mine], batch.grad_y[mine]
    five = batches.run(batches.ours(batch), x, grad_y)
    six = batches.run(batches.ours(batch), x.unflatten(-1, (2, 2)), grad_y.unflatten(-1, (2, 2)))
    ranks.check_equal(six.y.flatten(-2), five.y)
    ranks.check_equal(six.grad_x.flatten(-2), five.grad_x)


@pytest.mark.ranks(2)
def test_the_unsynchronised_layer_differs(ranks, rng):
    """The negative control: the comparison above can fail."""
    sizes = batches.SHARES["uneven"](ranks.size)
    batch = batches.make((sum(sizes), 5, 4, 3), rng)
    mine = ranks.shares(sizes)[ranks.rank]
    local = batches.run(batches.load(torch.nn.BatchNorm2d(5), batch), batch.x[mine], batch.grad_y[mine])
    exact = batches.exact(batch)
    ranks.check(error(local.y, exact.y[mine]) > 0.1, "y")
    ranks.check(error(local.grad_x, exact.grad_x[mine]) > 0.1, "grad_x")
    ranks.check(error(local.var, exact.var) > 1e-3, "running variance")


def test_weight_and_bias_gradients_are_local_and_add_up(ranks, rng):
    sizes = batches.SHARES["an empty rank"](ranks.size)
    batch = batches.make((sum(sizes), 5, 3, 3), rng, torch.float64)
    whole = batches.load(torch.nn.BatchNorm2d(5, dtype=torch.float64), batch)
    batches.run(whole, batch.x, batch.grad_y)
    layer = batches.ours(batch, dtype=torch.float64)
    mine = ranks.shares(sizes)[ranks.rank]
    got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
    xhat = (got.y - layer.bias.view(1, -1, 1, 1)) / layer.weight.view(1, -1, 1, 1)
    local = (batch.grad_y[mine] * xhat).sum((0, 2, 3))
    ranks.check_close(layer.weight.grad, local, 1e-12, "local weight gradient")
    ranks.check_close(layer.bias.grad, batch.grad_y[mine].sum((0, 2, 3)), 1e-12, "local bias gradient")
    summed = ranks.transport.all_reduce(torch.stack((layer.weight.grad, layer.bias.grad)))
    ranks.check_close(summed, torch.stack((whole.weight.grad, whole.bias.grad)), 1e-11, "sum over the ranks")


@pytest.mark.parametrize("name", ["affine=False", "bias=False", "track_running_stats=False", "momentum=None", "frozen"])
def test_options_equal_torch(ranks, rng, name):
    options = {} if name == "frozen" else {name.split("=")[0]: None if name == "momentum=None" else False}
    sizes = batches.SHARES["uneven"](ranks.size)
    mine = ranks.shares(sizes)[ranks.rank]
    theirs = batches.torch_layer(4, 5, dtype=torch.float64, **options)
    layer = syncbn.SyncBatchNorm(5, dtype=torch.float64, **options)
    layer.load_state_dict(theirs.state_dict())
    for module in (theirs, layer):
        module.requires_grad_(name != "frozen")
    for step in range(3):
        batch = batches.make((sum(sizes), 5, 3, 2), rng, torch.float64, mean=float(step))
        expected = batches.run(theirs, batch.x, batch.grad_y)
        got = batches.run(layer, batch.x[mine], batch.grad_y[mine])
        ranks.check_close(got.y, expected.y[mine], 1e-13, "y")
        ranks.check_close(got.grad_x, expected.grad_x[mine], 1e-12, "grad_x")
    for key, value in theirs.state_dict().items():
        ranks.check_close(layer.state_dict()[key], value, 1e-13, key)
    ranks.check(name != "frozen" or layer.weight.grad is None, "a frozen weight gets no gradient")


@pytest.mark.parametrize("shares", ["uneven", "an empty rank"])
def test_autocast_with_half_activations_equals_one_process(ranks, rng, shares):
    """The empty rank's activation is float32 where the others have bfloat16, as a skipped branch gives it."""
    sizes = batches.SHARES[shares](ranks.size)
    mine = ranks.shares(sizes)[ranks.rank]
    x = torch.randn(sum(sizes), 6, generator=rng)
    linear = torch.nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 6, generator=rng))
        linear.bias.zero_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        whole = torch.nn.BatchNorm1d(4)(linear(x))
        share = linear(x[mine]) if x[mine].numel() else torch.empty(0, 4)
        y = syncbn.SyncBatchNorm(4)(share)
    y.float().sum().backward()
    ranks.check(y.dtype == (torch.bfloat16 if y.numel() else torch.float32), "the output keeps the input's dtype")
    ranks.check_close(y, whole[mine].float(), 2e-2, "y")


def test_all_ranks_empty_leave_the_statistics_alone(ranks):
    layer = syncbn.SyncBatchNorm(3)
    x = torch.empty(0, 3, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    ranks.check(y.shape == (0, 3, 4) and x.grad.shape == (0, 3, 4), "empty in, empty out")
    ranks.check_equal(layer.running_mean, torch.zeros(3))
    ranks.check_equal(layer.running_var, torch.ones(3))
    ranks.check(layer.num_batches_tracked == 1, "the batch is counted, as torch does")
    ranks.check_equal(layer.weight.grad, torch.zeros(3), "weight gradient")


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_variance_survives_a_large_mean(ranks, rng, ratio):
    """Relative error of the batch variance below 1e-5 at mean/std 1e4 in float32."""
    batch = batches.make((8 * ranks.size, 4, 16, 16), rng, mean=ratio, std=1.0)
    mine = ranks.shares([8] * ranks.size)[ranks.rank]
    layer = batches.ours(batch, momentum=1.0)  # the running variance becomes the batch's
    layer(batch.x[mine])
    exact = batch.x.double().var((0, 2, 3), correction=1)
    relative = ((layer.running_var.double() - exact) / exact).abs().max().item()
    ranks.check(relative < 1e-5, f"relative error {relative:.2g}")


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6, 1e-20])
def test_constant_channel_gives_exactly_the_bias(ranks, value):
    layer = syncbn.SyncBatchNorm(2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.3, -1.7]))
    y = layer(torch.full((ranks.rank + 1, 2, 5, 3), value))
    ranks.check_equal(y, layer.bias.detach().view(1, 2, 1, 1).expand_as(y), f"constant {value}")
