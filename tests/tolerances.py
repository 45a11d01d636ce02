# SPDX-License-Identifier: BSD-3-Clause
"""How wrong a result may be: twice the error of torch's own BatchNorm in the same dtype, plus a floor.

Errors are the largest absolute difference to reference.py in float64, of data of order 1.
"""

import torch

FACTOR = 2.0

FLOOR = {
    # one rounding of an output of order 4: eps * 4
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    # a few roundings of the elementwise arithmetic, where torch happens to be exact
    torch.float32: 1e-6,
    # E[x^2] - E[x]^2 in float64 loses (mean / std)^2 * 1e-16, and mean / std is up to 3 here
    torch.float64: 1e-14,
}


def error(actual, exact):
    """The largest absolute difference; 0 for an empty local batch."""
    return (actual.detach().double() - exact.detach()).abs().max().item() if actual.numel() else 0.0


def allowed(torch_error, dtype):
    """The bound for our error, given torch's."""
    return FACTOR * torch_error + FLOOR[dtype]
