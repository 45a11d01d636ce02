# SPDX-License-Identifier: BSD-3-Clause
"""The kernels that a GPU gets."""

import pytest
import torch

from syncbn import kernels
from syncbn.transports.single import SingleTransport


@pytest.fixture
def implementation():
    found = kernels.on_device(torch.empty(1, device="cuda"), SingleTransport())
    if found.name != "cupy":
        pytest.skip(kernels.explain_device().reason)
    return found
