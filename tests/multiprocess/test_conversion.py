# SPDX-License-Identifier: BSD-3-Clause
"""Converted models on several ranks: wrong dims, layers of timm, replaced layers and graphs of torch.fx."""

import copy

import pytest
import torch
from torch import nn

import syncbn
from tests import fake_timm
from tests.multiprocess.batches import SHARES

pytestmark = pytest.mark.ranks(1)

DIMS = {nn.BatchNorm1d: (4, 3), nn.BatchNorm2d: (4, 3, 2, 2), nn.BatchNorm3d: (4, 3, 2, 2, 2)}


@pytest.mark.prompt_verdict
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("where", ["first", "last", "all"])
@pytest.mark.parametrize("cls", DIMS)
def test_wrong_dims_on_some_ranks_are_one_error_on_all(ranks, cls, where, lazy):
    layer = syncbn.convert_sync_batchnorm(getattr(nn, f"Lazy{cls.__name__}")() if lazy else cls(3))
    wrong = (4, 3, 2, 2) if cls is nn.BatchNorm1d else (4, 3)
    bad = {"first": ranks.rank == 0, "last": ranks.rank == ranks.size - 1, "all": True}[where]
    who = {"first": "rank 0", "last": f"rank {ranks.size - 1}"}.get(where, "rank")
    parts = [who, f"Sync{cls.__name__} needs input.dim()", f"received {len(wrong)}, shape {wrong}"]
    ranks.raises(ValueError, lambda: layer(torch.ones(wrong if bad else DIMS[cls])), *parts)
    layer(torch.randn(DIMS[cls], requires_grad=True)).sum().backward()
    ranks.check(layer.num_batches_tracked == 1, "the next step works")


class Leaky(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), 0.1)


def parts(old):
    norm = nn.BatchNorm2d(old.num_features).double()
    norm.load_state_dict(old.state_dict())
    return nn.Sequential(norm, nn.LeakyReLU(0.1))


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "timm": lambda: fake_timm.BatchNormAct2d(4, act_layer=nn.SiLU),
    "replaced": lambda: Leaky(4),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("shares", ["uneven", "an empty rank"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_converted_model_is_the_model_of_one_process(ranks, monkeypatch, norm, shares, traced):
    fake_timm.install(monkeypatch)
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[norm](), nn.Conv2d(4, 2, 1)).double()
    sizes = SHARES[shares](ranks.size)
    x = torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64)
    model, local = copy.deepcopy(expected), copy.deepcopy(expected)
    syncbn.convert_sync_batchnorm(model, replace={Leaky: parts})
    if traced:
        model = torch.fx.symbolic_trace(model)
    mine = ranks.shares(sizes)[ranks.rank]
    whole = expected(x)
    whole.square().sum().backward()
    y = model(x[mine])
    y.square().sum().backward()
    ranks.check_close(y, whole[mine], 1e-12, "output")
    if ranks.size > 1:
        ours, theirs = local(x[mine]).detach(), whole[mine]
        apart = (
            len(y) in (0, len(x)) or (ours - theirs).abs().max() > 1e-3
        )  # a rank with the whole batch needs no other
        ranks.check(apart, "the layer that does not synchronise differs")
    ranks.world.average_gradients(model)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        ranks.check_close(ours.grad * ranks.size, theirs.grad, 1e-10, "gradient")
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        ranks.check_close(ours, theirs, 1e-12, "buffer")


def test_a_converted_model_trains_under_ddp(ranks, torch_world, monkeypatch):
    """DDP refuses instances of torch.nn.SyncBatchNorm on CPU."""
    fake_timm.install(monkeypatch)
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(3), fake_timm.BatchNormAct2d(3), nn.SyncBatchNorm(3), fake_timm.SyncBatchNormAct(3)
    model = syncbn.convert_sync_batchnorm(nn.Sequential(*layers))
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(ranks.rank)
    wrapped(torch.randn(2, 3, 4, 4)).square().sum().backward()
    grad = model[0].weight.grad.clone()
    torch.distributed.all_reduce(grad)
    ranks.check_close(grad / ranks.size, model[0].weight.grad, 1e-5, "DDP averages")
