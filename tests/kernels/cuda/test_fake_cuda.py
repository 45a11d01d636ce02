# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA device of host memory refuses what a GPU refuses. Else a test on it would prove nothing."""

import io
import os

import pytest
import torch

import syncbn
from syncbn import kernels
from syncbn.kernels.base import Parameters
from syncbn.moments import Message, Status
from syncbn.transports.single import SingleTransport
from tests import fake_cuda

pytestmark = pytest.mark.skipif(
    os.environ.get("SYNCBN_TEST_DEVICE") != fake_cuda.NAME, reason=f"needs SYNCBN_TEST_DEVICE={fake_cuda.NAME}"
)


@pytest.fixture
def x():
    return torch.arange(6.0, device="cuda").view(2, 3)


def test_a_layer_runs_the_kernels_of_the_gpu(x):
    launches = kernels.dispatch.launcher().emulated.launches
    before = len(launches)
    layer = syncbn.SyncBatchNorm(3)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.is_cuda
    steps = [kernel.partition("<")[0] for kernel, *_ in launches[before:]]
    assert steps == ["local_moments", "normalize", "backward_sums", "backward_input"]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y.add_(x),
        lambda x, y: torch.cat((x, y)),
        lambda x, y: x @ y.T,
        lambda x, y: torch.where(x > 1, x, y),
        lambda x, y: torch.nn.functional.batch_norm(x, y[0], y[0]),
    ],
)
def test_tensors_of_two_devices_do_not_meet(x, mix):
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        mix(x, torch.ones(2, 3, device="cpu"))


def test_a_number_on_the_cpu_does(x):
    assert torch.equal(x * torch.tensor(2.0, device="cpu"), x + x)
    assert torch.equal(x[torch.tensor([1], device="cpu")], x[1:])


def test_the_host_does_not_read_it(x):
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.numpy()
    assert x.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_generator_is_of_its_own_device(x):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        x.normal_(generator=torch.Generator("cpu"))


def test_views_copies_and_files_are_of_the_device(x):
    x[0].zero_()
    assert x.sum().item() == 12.0
    file = io.BytesIO()
    torch.save(x.T, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded.is_cuda
    assert torch.equal(loaded, x.T)


@pytest.mark.parametrize("bare", ["function", "layer"])
def test_a_refused_call_sends_from_the_device_by_which_its_way_was_chosen(monkeypatch, bare):
    """NCCL would not send what is on the CPU: such a rank would come by MPI, where nobody waits for it."""
    sent, left = [], torch.ones(2, 3, device="cpu")
    monkeypatch.setattr(SingleTransport, "all_reduce", lambda self, wire: sent.append(wire.device.type) or wire)
    layer = syncbn.SyncBatchNorm(3, affine=False)
    layer.track_running_stats = False  # as recalibrate() has it
    with pytest.raises(ValueError, match="on the device of"):
        layer(left) if bare == "layer" else syncbn.functional.sync_batch_norm(left, bias=torch.zeros(3))
    assert sent[-1] == "cuda"


def test_a_kernel_reaches_no_memory_of_the_host(x):
    steps = kernels.on_device(x, SingleTransport())
    message = Message((1, 0, 0, 0), 1, "'layer'", 0, 0)
    wire = steps.local_moments(x, None, message.numbers, Status()).cpu()
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        steps.normalize(x, wire, Parameters(), message)


def test_a_kernel_reaches_no_memory_that_was_freed(x):
    copy = x.clone()
    pointer = copy.data_ptr()
    assert torch.ops.fake_cuda.reaches(pointer)
    del copy
    assert not torch.ops.fake_cuda.reaches(pointer)
