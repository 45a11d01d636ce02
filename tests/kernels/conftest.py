# SPDX-License-Identifier: BSD-3-Clause
"""The implementations of the four steps: each passes test_contract*.py."""

import os

import pytest

from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.kernels.torch_ops import TorchKernels
from tests.conftest import DEVICE
from tests.cuda_on_cpu import EmulatedLauncher
from tests.kernels.contract import kernels_of_gpu

ON_CPU = ["torch", "host", "cuda on cpu", "cuda on cpu, slow float64"]
if os.environ.get("SYNCBN_KERNELS") == "host":  # sanitize.sh: it has built these anew, and no others
    ON_CPU = ["host"]
ON_DEVICE = ["torch", "cupy", "cupy, slow float64"]


@pytest.fixture(params=ON_CPU if DEVICE.type == "cpu" else ON_DEVICE)
def implementation(request):
    if request.param == "torch":
        return TorchKernels()
    if request.param.startswith("cupy"):
        return kernels_of_gpu(slow="slow" in request.param, host_synchronous=True)
    if request.param.startswith("cuda on cpu"):
        return CupyKernels(EmulatedLauncher(slow="slow" in request.param), host_synchronous=True)
    unbuilt = {"reason": "built without a compiler", "exc_type": ImportError}
    return pytest.importorskip("syncbn.kernels.host.ops", **unbuilt).HostKernels()
