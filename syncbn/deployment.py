# SPDX-License-Identifier: BSD-3-Clause
"""What torch.jit.script compiles of a layer: eval, as one batch norm operator.

torch.export, ONNX, torch.jit.trace and torch.fx follow the Python code and need nothing of this.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn.layer import LazySyncBatchNorm, SyncBatchNorm


def scriptable(layer: SyncBatchNorm) -> SyncBatchNorm:
    """Makes a layer, in place, one whose forward TorchScript can compile; in Python it stays what it is.

    Raises:
        ValueError: for a layer in training, or one that is lazy.
    """
    if layer.training or isinstance(layer, LazySyncBatchNorm):
        received = "a lazy layer that has seen no input" if isinstance(layer, LazySyncBatchNorm) else "training mode"
        raise ValueError(
            f"torch.jit.script needs SyncBatchNorm in eval mode, since TorchScript cannot communicate; received "
            f"{received}. Call model.eval() first, after a lazy layer has seen its first input."
        )
    layer.__class__ = ScriptableSyncBatchNorm
    return layer


class ScriptableSyncBatchNorm(SyncBatchNorm):
    """A SyncBatchNorm that has been through torch.jit.script. Trains as before; compiled, it does eval alone."""

    __jit_unused_properties__ = ("process_group", "renorm_limits", "converted_from")

    def forward(self, input: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045 - TorchScript
        """Normalises by the running statistics where it is compiled, else as :class:`SyncBatchNorm` does."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.training:
                raise RuntimeError(
                    "A SyncBatchNorm in TorchScript needs eval mode: it cannot communicate. Call eval()."
                )
            local = self.running_mean is None
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, local, 0.0, self.eps
            )
        else:  # TorchScript compiles what stands after a return, but not the branch that is not its own
            return SyncBatchNorm.forward(self, input, mask)
