# SPDX-License-Identifier: BSD-3-Clause
"""Eval of the dtypes that torch's batch_norm does not take together. Sends nothing.

N batch, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn import moments
from syncbn.checks.kinds import NAME
from syncbn.kernels.torch_ops import affine, local_sums

_HALVES = (torch.float16, torch.bfloat16)


def eval_batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalises x by the given statistics, or by its own. For dtypes that torch's batch_norm does not take together.

    Rounds as training does: numbers per channel are float64, elementwise arithmetic is float32 (float64 for float64
    input), and y is rounded once to the dtype of x. Sends nothing.
    """
    if mean is not None and var is not None:
        return affine(x, mean.double(), (var.double() + eps).rsqrt(), weight, bias)
    count = x.numel() // x.size(1)
    if count == 1:
        raise ValueError(
            f"{NAME} without running statistics needs at least 2 values per channel in eval; received shape "
            f"{tuple(x.shape)}. Give it more samples, or keep running statistics."
        )
    own_mean, _, invstd = moments.finalize_sums(x.new_tensor(count, dtype=torch.float64), local_sums(x, None), eps)
    return affine(x, own_mean, invstd, weight, bias)


def mixes_dtypes(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether torch's batch_norm refuses the dtypes: it takes one, or float16 or bfloat16 input with float32."""
    own = x.dtype
    for t in tensors:
        if t is not None and t.dtype != own:
            return own not in _HALVES or any(t is not None and t.dtype != torch.float32 for t in tensors)
    return False
