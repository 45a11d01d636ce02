# SPDX-License-Identifier: BSD-3-Clause
"""The kernel contract: the steps on one process's data, as four signatures.

N batch, C channels, S product of the spatial dims, W ranks.

    forward    x -> local_moments  -> all_reduce -> normalize      -> y
    backward   grad_y, x -> backward_sums -> all_reduce -> backward_input -> grad_x

An implementation is stateless and accepts any strides and an empty local batch (N * S == 0).
``tests/kernels/test_contract.py`` checks each against ``reference.py`` in float64. ``torch_ops.py`` is the readable
one. It is also the only one that takes a mask, that torch.compile compiles, and that autograd differentiates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.moments import Counters, Message, Numbers, Running, Status

PROBLEM, RECORDS, NEEDED = -1, 1, 2


class Parameters(NamedTuple):
    """The parameters of ``normalize``, beside x and the wire."""

    weight: Tensor | None = None
    """(C,) or None for 1; any floating dtype."""
    bias: Tensor | None = None
    """(C,) or None for 0; any floating dtype."""
    eps: float = 1e-5
    """Added to the variance."""
    running: Running | None = None
    """Updated in place, or None to leave them alone."""


class AbstractKernels(ABC):
    """Four steps on one process's data. Nothing here communicates."""

    name: str
    deferred = False
    """True if the device compares calls and counters, so that the host need not wait and errors come later."""

    @abstractmethod
    def local_moments(self, x: Tensor, mask: Tensor | None, numbers: Numbers, status: Status) -> Tensor:
        """Sums x and x * x over N and S into a new forward wire; with a mask, weighted by it.

        Args:
            x: (N, C, *spatial), float16, bfloat16, float32 or float64; N or S may be 0.
            mask: (N, 1, *spatial), booleans or weights, or None.
            numbers: the numbers of the call.
            status: the counters at the end of the wire.

        Returns:
            float64 (2C + 15,), laid out as in ``syncbn.moments``. The sums are accumulated in float64.
        """

    @abstractmethod
    def read_counters(self, wire: Tensor, message: Message) -> Counters | None:
        """Reads call and counters of an all-reduced forward wire; None if the kernels are ``deferred``.

        Raises:
            ValueError, TypeError: if they are, the error that the device found in an earlier call.
        """

    def agreement(self, wire: Tensor, message: Message) -> int | None:
        """Returns a summary of ``read_counters``, which is all that most calls need.

        Returns:
            ``PROBLEM`` if the counters show one. Else ``RECORDS`` if autograd records on all ranks, plus ``NEEDED`` if
            any rank needs a gradient. None if the kernels are ``deferred``.
        """
        counters = self.read_counters(wire, message)
        if counters is None:
            return None
        _, recording, needing, *_ = counters.status
        return PROBLEM if counters.problem(message.ranks) else RECORDS * bool(recording) + NEEDED * bool(needing)

    @abstractmethod
    def normalize(self, x: Tensor, wire: Tensor, parameters: Parameters, message: Message) -> tuple[Tensor, Tensor]:
        """Finalises the statistics, moves the running ones, and normalises x.

        y = (x - mean) * (invstd * weight) + bias

        The mean is subtracted first: a channel of one value everywhere gives exactly the bias.

        Args:
            x: (N, C, *spatial), as given to ``local_moments``.
            wire: float64 (2C + 15,), summed over the ranks.
            parameters: weight, bias, eps and running statistics.
            message: the identity of the wire, which deferred kernels compare.

        Returns:
            y, of x's shape, dtype and layout; and the statistics of the global batch that backward needs, float64
            (2C + 1,): ``[mean (C), invstd (C), count]``.
        """

    @abstractmethod
    def backward_sums(
        self,
        grad_y: Tensor,
        x: Tensor,
        stats: Tensor,
        numbers: Numbers,
        weight: torch.dtype | None = None,
        bias: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sums grad_y and grad_y * xhat over N and S, xhat = (x - mean) * invstd. Ignores masks.

        Args:
            grad_y: (N, C, *spatial), in any layout. It may differ from that of x.
            x: (N, C, *spatial).
            stats: as ``normalize`` returned them.
            numbers: the numbers of the message.
            weight: the dtype of weight, or None if it needs no gradient.
            bias: the dtype of bias, or None if it needs no gradient.

        Returns:
            The backward wire, float64 (2C + 7,), and the local gradients of weight and bias, new tensors (C,), or None.
        """

    @abstractmethod
    def check_sums(self, wire: Tensor, message: Message) -> bool:
        """Whether all ranks sent this backward message. Always True if the kernels are ``deferred``.

        Raises:
            ValueError, TypeError: as ``read_counters``.
        """

    @abstractmethod
    def backward_input(
        self,
        grad_y: Tensor,
        x: Tensor,
        mask: Tensor | None,
        wire: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        message: Message,
    ) -> Tensor:
        """Forms the gradient of the input from the global sums.

        grad_x = (grad_y - (sum_grad_y / count + xhat * sum_grad_y_xhat / count) * mask) * invstd * weight

        Args:
            grad_y: (N, C, *spatial).
            x: (N, C, *spatial).
            mask: (N, 1, *spatial) or None for 1.
            wire: float64 (2C + 7,), of ``backward_sums`` summed over the ranks.
            weight: (C,) or None for 1.
            stats: as ``normalize`` returned them.
            message: the identity of the wire, which deferred kernels compare.

        Returns:
            grad_x, of x's shape, dtype and layout.
        """


def split_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views mean (C,), invstd (C,) and count () of what ``normalize`` returned."""
    C = stats.numel() // 2
    return stats[:C], stats[C : 2 * C], stats[2 * C]
