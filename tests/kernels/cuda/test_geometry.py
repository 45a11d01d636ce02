# SPDX-License-Identifier: BSD-3-Clause
"""How many blocks and threads a step of the GPU kernels gets."""

import pytest
import torch

from syncbn.kernels.cuda import geometry

RESNET = [(2, 64, 112, 112), (2, 256, 56, 56), (2, 2048, 7, 7), (32, 64, 112, 112), (1, 64, 512, 512), (64, 2048)]


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "elementwise"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [*RESNET, (32, 256, 56, 56), (2, 256, 512, 512)], ids=str)
def test_blocks_fill_a_gpu_where_there_is_work_for_it(shape, itemsize, sums):
    most = {
        ("Planes", True): geometry.BLOCKS_OF_SUMS_OF_PLANES,
        ("Rows", True): geometry.BLOCKS_OF_SUMS_OF_ROWS,
        ("Planes", False): geometry.BLOCKS_OF_PLANES,
        ("Rows", False): geometry.BLOCKS_OF_ROWS,
    }
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = geometry.plan(x.shape, strides, itemsize, sums=sums)
        work = x.numel() * itemsize / (16 * 32 * geometry.STEPS)  # warps with a few packs a thread
        assert plan.grid >= min(132, work / 8), plan
        assert plan.block[0] * plan.block[1] <= geometry.THREADS
        assert plan.grid <= max(most[plan.layout, sums], plan.groups), plan


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [*RESNET, (32, 256, 56, 56), (2, 256, 512, 512)], ids=str)
def test_the_last_block_of_a_group_reads_a_few_partial_sums_a_thread(shape, itemsize):
    x = torch.empty(shape, device="meta")
    for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
        plan = geometry.plan(x.shape, strides, itemsize)
        lanes, channels = plan.block if plan.layout == "Planes" else (plan.block[1], plan.block[0] * 16 // itemsize)
        read = plan.blocks * channels / (plan.block[0] * plan.block[1])
        assert read <= max(geometry.DEPTH, plan.per_block / lanes / geometry.DEPTH_OF_STEPS), plan


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [(2, 256, 14, 14), (2, 512, 14, 14), (2, 512, 7, 7), (2, 2048, 7, 7), (64, 2048)])
def test_a_block_adds_up_few_rows_alone(shape, itemsize):
    x = torch.empty(shape, device="meta").movedim(1, -1).contiguous().movedim(-1, 1)
    plan = geometry.plan(x.shape, x.stride(), itemsize)
    assert (plan.layout, plan.blocks) == ("Rows", 1)
    assert plan.per_block <= geometry.STEPS_ALONE * plan.block[1]


def test_a_few_packs_a_thread_are_one_round_of_elementwise_blocks():
    """Each forms coefficients first, so a second round of few packs would take longer."""
    for shape in [(2, 256, 56, 56), (2, 64, 112, 112), (2, 128, 56, 56)]:
        x = torch.empty(shape, device="meta")
        for strides in {x.stride(), x.movedim(1, -1).contiguous().movedim(-1, 1).stride()}:
            assert geometry.plan(x.shape, strides, 4, sums=False).grid <= geometry.ROUND


def test_one_channel_is_one_plane_while_32_bits_can_count_it():
    assert geometry.plan((4, 1, 1000), (1000, 1000, 1), 2).S == 4000
    assert geometry.plan((4, 1, 1 << 29), (1 << 29, 1 << 29, 1), 2).S == 1 << 29
