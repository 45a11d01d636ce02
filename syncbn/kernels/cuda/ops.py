# SPDX-License-Identifier: BSD-3-Clause
"""The four steps on an NVIDIA GPU: ``cuda/*.cu``, one kernel and one launch a step.

This module allocates outputs with torch and packs arguments in the order of the structs in the ``.cu`` files. It
computes nothing and waits for nothing. Contiguous and channels_last tensors are read without a copy; others are copied,
once a step. These kernels take no mask.
"""

from __future__ import annotations

import struct
from typing import final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, Parameters
from syncbn.kernels.cuda.geometry import THREADS
from syncbn.kernels.cuda.launch import AbstractLauncher, Scratch
from syncbn.kernels.cuda.prepared import Prepared, prepare
from syncbn.moments import DTYPES, STATUS_SLOTS, Counters, Message, Numbers, Status

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
# The structs of the .cu files: every field has 8 bytes. Shape 7q, Values Qqq, Numbers 4d, Reduction QQ,
# DeferredError Qd.
LOCAL_MOMENTS = struct.Struct(f"=7qQQ4d{1 + len(STATUS_SLOTS)}dQQ")
NORMALIZE = struct.Struct("=7qQQQQqqQqqQQQQqqQqqQqqdd4ddQd")
BACKWARD_SUMS = struct.Struct("=7qQQQQQ4dQqqQqqQQ")
BACKWARD_INPUT = struct.Struct("=7qQQQQQQQQqq4ddQd")
_ABSENT = (0, 0, 0)
_NO_SCRATCH = Scratch(torch.empty(0, device="cpu"), torch.empty(0, device="cpu"), (0, 0))
_STAYS = (*_ABSENT, *_ABSENT, 0, 0)
REMEMBERED = 4096
"""How many kinds of inputs stay prepared. Beyond them all are forgotten and prepared again."""


@final
class CupyKernels(AbstractKernels):
    """The kernels of ``cuda/``. Two launches forward, two backward, no wait of the host.

    Args:
        launcher: what runs them.
        host_synchronous: whether the host waits for the all-reduce anyway. It then compares calls and counters at once.
            Otherwise the device compares them, and errors are deferred.
        threads: the largest block.
    """

    name = "cupy"

    def __init__(self, launcher: AbstractLauncher, *, host_synchronous: bool = False, threads: int = THREADS) -> None:
        self.launcher, self._threads = launcher, threads
        self.deferred = not host_synchronous
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def local_moments(self, x: Tensor, mask: Tensor | None, numbers: Numbers, status: Status) -> Tensor:
        """See ``AbstractKernels.local_moments``."""
        assert mask is None
        x, like = self._prepare(x)
        name, grid, block, shapes = like.local_moments
        wire = x.new_empty(like.wire_length, dtype=torch.float64)
        pointer = x.data_ptr()
        scratch = self._scratch(x, like)
        values = (*shapes[pointer & 15], pointer, wire.data_ptr(), *numbers, like.samples, *status, *scratch.addresses)
        self.launcher.launch(name, grid, block, LOCAL_MOMENTS, values, x)
        del scratch  # only now may torch reuse it, after this launch
        return wire

    def read_counters(self, wire: Tensor, message: Message) -> Counters | None:
        """See ``AbstractKernels.read_counters``. If the host would have to wait, normalize reads them instead.

        Errors that the device found in earlier calls are raised here and in check_sums. That is after the all-reduce,
        so that the other ranks do not wait for this one.
        """
        if not self.deferred:
            return moments.read_counters(wire, message.numbers)
        self.launcher.deferred_errors(wire).look()
        return None

    def normalize(self, x: Tensor, wire: Tensor, parameters: Parameters, message: Message) -> tuple[Tensor, Tensor]:
        """See ``AbstractKernels.normalize``."""
        weight, bias, eps, running = parameters
        dense, like = self._prepare(x)
        name, grid, block, shapes = like.normalize
        C, stats_blocks = like.C, like.stats_blocks
        y = torch.empty_like(dense)
        stats = wire.new_empty(2 * C + 1)
        first, pointer, out = stats.data_ptr(), dense.data_ptr(), y.data_ptr()
        moves, momentum, counter = _STAYS, 0.0, None
        if running is not None:
            mean, var, tracked, factor = running
            momentum = -1.0 if factor is None else factor
            stats_blocks = 1 if factor is None else stats_blocks  # a single block counts the batches: no race
            counter = _counter(tracked, like)
            address = 0 if counter is None else counter.data_ptr()
            moves = (*_values(mean, like), *_values(var, like), address, counter is not tracked)
        values = (
            *shapes[(pointer | out) & 15],
            *(pointer, out, wire.data_ptr()),
            *_values(weight, like),
            *_values(bias, like),
            *(first, first + 8 * C, first + 16 * C),
            *(*moves, stats_blocks, momentum, eps),
            *self._comparison(message, like),
        )
        self.launcher.launch(name, stats_blocks + grid, block, NORMALIZE, values, x)
        if dense is not x:
            y = torch.empty_like(x).copy_(y)
        if running is not None:
            tracked = running.num_batches_tracked
            if tracked is not None and counter is not None and counter is not tracked:
                tracked.copy_(counter)
            moments.tell_autograd(running)
        return y, stats

    def backward_sums(
        self,
        grad_y: Tensor,
        x: Tensor,
        stats: Tensor,
        numbers: Numbers,
        weight: torch.dtype | None = None,
        bias: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See ``AbstractKernels.backward_sums``. One launch."""
        x, like = self._prepare(x)
        name, grid, block, shapes = like.backward_sums
        C, grad_y = like.C, _like(grad_y, x, like)
        wire = stats.new_empty(like.sums_length)
        grad_weight = None if weight is None else stats.new_empty(C, dtype=weight)
        grad_bias = None if bias is None else stats.new_empty(C, dtype=bias)
        g, pointer, mean = grad_y.data_ptr(), x.data_ptr(), stats.data_ptr()
        scratch = self._scratch(x, like)
        values = (
            *shapes[(g | pointer) & 15],
            *(g, pointer, mean, mean + 8 * C, wire.data_ptr()),
            *numbers,
            *(_ABSENT if grad_weight is None else (grad_weight.data_ptr(), 1, CODES[grad_weight.dtype])),
            *(_ABSENT if grad_bias is None else (grad_bias.data_ptr(), 1, CODES[grad_bias.dtype])),
            *scratch.addresses,
        )
        self.launcher.launch(name, grid, block, BACKWARD_SUMS, values, x)
        del scratch
        return wire, grad_weight, grad_bias

    def check_sums(self, wire: Tensor, message: Message) -> bool:
        """See ``AbstractKernels.check_sums``. Raises what ``read_counters`` raises."""
        if not self.deferred:
            return moments.same_call(wire[: moments.CALL].tolist(), message.numbers)
        self.launcher.deferred_errors(wire).look()
        return True

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
        """See ``AbstractKernels.backward_input``. If x is empty, one block still compares the calls."""
        assert mask is None
        dense, like = self._prepare(x)
        name, grid, block, shapes = like.backward_input
        grad_x = torch.empty_like(dense)
        if self.deferred or not like.empty:
            grad_y = _like(grad_y, dense, like)
            g, pointer, out = grad_y.data_ptr(), dense.data_ptr(), grad_x.data_ptr()
            mean = stats.data_ptr()  # invstd and the count lie behind it, see normalize
            values = (
                *shapes[(g | pointer | out) & 15],
                *(g, pointer, out, wire.data_ptr(), mean, mean + 8 * like.C, mean + 16 * like.C),
                *_values(weight, like),
                *self._comparison(message, like),
            )
            self.launcher.launch(name, grid or 1, block, BACKWARD_INPUT, values, x)
        return grad_x if dense is x else torch.empty_like(x).copy_(grad_x)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Prepared]:
        """Returns x, or a contiguous copy of it, and its launches."""
        key = x.shape, x.stride(), x.dtype, x.get_device()
        found = self._prepared.get(key)
        if found is not None:
            return x, found
        new = prepare(x, self.launcher, self._threads, deferred=self.deferred)
        if new is None:
            return self._prepare(x.contiguous())
        if len(self._prepared) >= REMEMBERED:
            self._prepared.clear()
        self._prepared[key] = new
        return x, new

    def _scratch(self, x: Tensor, like: Prepared) -> Scratch:
        """Returns memory for partial sums and tickets, which a reduction over several blocks needs."""
        return self.launcher.scratch(x, like.partials, like.groups) if like.partials else _NO_SCRATCH

    def _comparison(self, message: Message, like: Prepared) -> tuple[int | float, ...]:
        """Returns the fields for comparing the calls, and the address for a deferred error."""
        errors = like.errors
        if errors is None:
            return *message.numbers, message.ranks, 0, 0.0
        return *message.numbers, message.ranks, errors.address, errors.number(message, like.dtype, like.shape)


def _values(values: Tensor | None, like: Prepared) -> tuple[int, int, int]:
    """Returns the fields of Values for a vector on the device."""
    if values is None:
        return _ABSENT
    code = CODES.get(values.dtype)
    if code is None or values.shape != like.per_channel or values.device != like.device:
        raise ValueError(
            f"weight, bias and running statistics must be floating-point of shape ({like.C},) on {like.device}; "
            f"received {values.dtype} {tuple(values.shape)} on {values.device}. Move the layer with layer.to(x.device)."
        )
    return values.data_ptr(), 1 if values.is_contiguous() else values.stride(0), code


def _counter(tracked: Tensor | None, like: Prepared) -> Tensor | None:
    """Returns num_batches_tracked, or float64 that one added to gives what its dtype holds after this batch."""
    if tracked is None or (tracked.dtype is torch.int64 and tracked.device == like.device):
        return tracked
    return (tracked + 1).to(like.device, torch.float64) - 1


def _like(grad_y: Tensor, x: Tensor, like: Prepared) -> Tensor:
    """Returns grad_y in the dtype and layout of x; grad_y itself if it has them."""
    if grad_y.dtype == like.dtype and not grad_y.is_neg() and (like.empty or grad_y.stride() == like.strides):
        return grad_y
    return torch.empty_like(x).copy_(grad_y)
