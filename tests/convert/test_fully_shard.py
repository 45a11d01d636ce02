# SPDX-License-Identifier: BSD-3-Clause
"""Layers under fully_shard: neither conversion nor its reverse loses the sharding."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm

pytestmark = pytest.mark.cpu("FSDP has streams of its own")


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_layer_under_fully_shard_is_refused(mesh):
    model = nn.Sequential(nn.BatchNorm1d(3), fully_shard(nn.BatchNorm2d(3), mesh=mesh))
    with pytest.raises(TypeError, match=r"1: fully_shard .* \(.*FSDPBatchNorm2d\); convert before that"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_layer_of_ours_under_fully_shard_is_not_reverted_and_still_trains(mesh):
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    fully_shard(model[1], mesh=mesh)
    with pytest.raises(TypeError, match=r"1: fully_shard .* \(.*FSDPSyncBatchNorm1d\); revert before that"):
        revert_sync_batchnorm(model)
    assert type(model[0]) is syncbn.SyncBatchNorm1d
    convert_sync_batchnorm(model)  # changes no class
    model(torch.randn(4, 3)).square().sum().backward()
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("change", [convert_sync_batchnorm, lambda m: revert_sync_batchnorm(convert_sync_batchnorm(m))])
def test_a_layer_in_a_block_under_fully_shard_changes_without_loss(mesh, change):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    expected = copy.deepcopy(block)
    change(fully_shard(block, mesh=mesh))
    x = torch.randn(4, 3)
    for model in (block, expected):
        model(x).square().sum().backward()
    for ours, theirs in zip(block.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    torch.testing.assert_close(block[1].running_var, expected[1].running_var)
