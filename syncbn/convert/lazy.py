# SPDX-License-Identifier: BSD-3-Clause
"""LazySyncBatchNorm, a layer that learns C from its first input. What torch's lazy batch norms convert to."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import UninitializedParameter

from syncbn import transports
from syncbn.calls.sites import Site
from syncbn.checks import inputs, placement
from syncbn.layer import SyncBatchNorm
from syncbn.transports import gather
from syncbn.transports.specify import specify_blocks


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A SyncBatchNorm that takes ``num_features`` from its first input. It then becomes a ``SyncBatchNorm``.

    Args:
        eps: see ``SyncBatchNorm``, as for the others.
        momentum: weight of a batch in the running statistics.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics.
        process_group: the ranks to synchronise over.
        device: where to create parameters and buffers.
        dtype: their dtype.
        bias: False leaves the bias out.
        group_size: the number of consecutive ranks to synchronise over, or "node".
        renorm_limits: ``(r_max, d_max)`` of batch renormalization.
        replays: True if a forward inside backward is one that activation checkpointing repeats.
    """

    __module__ = "syncbn"

    cls_to_become = SyncBatchNorm
    # a base of a subclass that is a lazy layer of torch comes before SyncBatchNorm
    forward = SyncBatchNorm.forward
    _check_input_dim = SyncBatchNorm._check_input_dim

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        group_size: int | Literal["node"] | None = None,
        renorm_limits: tuple[float, float] | None = None,
        replays: bool = True,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._site = Site("SyncBatchNorm", specify_blocks(process_group, group_size), replays=replays)
        self.renorm_limits = renorm_limits

    def initialize_parameters(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Takes ``num_features`` from the first input. In training, a wrong input on any rank raises on all ranks."""
        del mask  # forward checks it
        error = inputs.input_error(input, None, self.dims)
        if self.training:
            transport = transports.choose(
                self._site.group, placement.device_type(input, self.weight, self.running_mean)
            )
            gather.raise_together(error, transport, "the first forward of a LazySyncBatchNorm")
        elif error is not None:
            raise error
        without_bias = self.weight is not None and self.bias is None
        if without_bias:  # torch 2.11 requires one
            self.bias = UninitializedParameter(device=self.weight.device, dtype=self.weight.dtype)  # type: ignore[call-arg]
        super().initialize_parameters(input)
        if without_bias:
            self.register_parameter("bias", None)
