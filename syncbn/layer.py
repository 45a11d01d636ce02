# SPDX-License-Identifier: BSD-3-Clause
"""SyncBatchNorm, the module: parameters, buffers, train and eval. No maths.

N batch, C channels, S product of the spatial dims, W ranks.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import UninitializedParameter

from syncbn import agreement, checks, collective, differentiable, functional, groups, recomputation, renorm, transports
from syncbn.groups import GroupSpec
from syncbn.moments import Running
from syncbn.renorm import RenormLimits
from syncbn.transports.base import AbstractTransport


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batch of all processes.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over N and S of every rank's share.

    In training, output, input gradient and running statistics are those of ``torch.nn.BatchNorm*`` over the
    concatenated batch. In eval it is ``torch.nn.functional.batch_norm`` and never communicates. Gradients of
    weight and bias stay local: DistributedDataParallel, or ``World.average_gradients``, averages them.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None averages over all batches seen.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics. Without them eval uses those of its own share.
        process_group: None for every rank, a torch ProcessGroup, an mpi4py communicator, or what
            ``World.subgroup`` returned. A specification is stored, never the handle.
        device: where to create parameters and buffers.
        dtype: their dtype.
        bias: False leaves the bias out.
        group_size: instead of ``process_group``, the number of consecutive ranks to synchronise over. It must
            divide the number of all ranks.
        renorm_limits: ``(r_max, d_max)`` of batch renormalization; None is batch normalization. See
            :class:`syncbn.renorm.RenormLimits`.

    Shape:
        Input and output: (N, C, *spatial), with any number of spatial dims, N from 0.

    Communication:
        Training: one all-reduce of 2C + 8 float64 values in forward and one of 2C in backward, by every rank of
        the group, also with an empty share. At the first training step of a layer one more of 6 W, which
        compares its settings. Eval: none.

    Raises:
        ValueError, TypeError: on every rank of the group alike, if the input of any rank is wrong, if settings,
            dtypes or gradient modes differ, or if the group has one value per channel.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167); the interface is that of torch.nn.SyncBatchNorm.
    """

    frozen = False
    """Whether the layer stays in eval whatever ``train()`` is told, see :func:`syncbn.freeze`."""
    _renorm = cast("RenormLimits | None", None)  # no annotation: TorchScript would evaluate it

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        group_size: int | None = None,
        renorm_limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # an argument that the layers of torch 2.11 do not have yet
            self.register_parameter("bias", None)
        self.process_group = groups.specify_blocks(process_group, group_size)
        self.renorm_limits = renorm_limits
        self.converted_from: type[_BatchNorm] | None = None
        self._agreed_token, self._agreed = 0, never_agreed()

    @property
    def process_group(self) -> GroupSpec | None:
        """The group, as a specification that copies and pickles. Assign any kind of group to change it."""
        return self._group_spec

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group_spec = groups.specify(group)

    @property
    def renorm_limits(self) -> RenormLimits | None:
        """``(r_max, d_max)`` of batch renormalization, or None. Assign other limits as training goes on."""
        return self._renorm

    @renorm_limits.setter
    def renorm_limits(self, limits: tuple[float, float] | None) -> None:
        self._renorm = renorm.checked(limits, self.track_running_stats)

    def reset_parameters(self) -> None:
        """Starts anew: running statistics of nothing, weight 1, bias 0."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                torch.nn.init.constant_(parameter, value)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a frozen layer stays in eval."""
        return super().train(mode and not self.frozen)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises this rank's share, (N, C, *spatial), by the statistics of the global batch.

        Args:
            input: (N, C, *spatial), N from 0.
            mask: (N, *spatial) or (N, 1, *spatial), boolean or weights >= 0, or None where all counts. Where it is 0 a
                value counts in no statistic and gets none of their gradient; it is normalised like the rest. In eval
                it changes nothing.
        """
        if not self.training:
            return self._eval_forward(input, mask)
        if torch.compiler.is_compiling():
            return self._compiled_forward(input, mask)
        weight, bias, mean, var, tracked = _held(self)
        device_type, error = checks.place(input, weight, mean)
        transport = transports.choose(self._group_spec, device_type)
        if transport.token != self._agreed_token and not recomputation.repeats(self):
            self._agree_on_settings(transport)
        running = None
        if self.track_running_stats and mean is not None and var is not None:
            running = Running(mean, var, tracked, self.momentum)
        if mask is not None:
            group = collective.key_of(transport)
            return differentiable.batch_norm(
                input,
                mask,
                weight,
                bias,
                self.num_features,
                running,
                self.eps,
                group,
                differentiable.Layer(owner=self, renorm=self._renorm),
            )
        return functional.apply(
            input, weight, bias, self.num_features, running, self.eps, transport, self, self._renorm, error
        )

    def _compiled_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Does the same in operators that a compiler sees; what depends on the other ranks happens when they run."""
        running = None
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            running = Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        return differentiable.batch_norm(
            x,
            mask,
            self.weight,
            self.bias,
            self.num_features,
            running,
            self.eps,
            collective.key_for(self._group_spec, checks.device_type(x, self.weight, self.running_mean)),
            differentiable.Layer(self._agreed, self._settings(), renorm=self._renorm),
        )

    def _eval_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        error = None
        if not checks.is_recorded(x):
            error = checks.input_error(x, self.num_features) or checks.mask_error(mask, x)
        if error is not None:
            raise error
        local = self.running_mean is None  # no running statistics: those of this share, without communication
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            local,
            self.momentum or 0.0,
            self.eps,
        )

    def __prepare_scriptable__(self) -> SyncBatchNorm:
        """Is called by torch.jit.script before it compiles."""
        from syncbn.deployment import scriptable

        return scriptable(self)

    def _settings(self) -> tuple[float, ...]:
        """Returns what ``checks.SETTINGS`` names."""
        momentum = -1.0 if self.momentum is None else self.momentum
        limits = self._renorm or renorm.OFF
        return float(self.num_features), self.eps, momentum, float(self.track_running_stats), *limits

    def _agree_on_settings(self, transport: AbstractTransport) -> None:
        """Compares settings over the ranks, once, also where a compiled graph has done it."""
        if self._agreed.item() != transport.token:
            checks.require_same_settings(self._settings(), transport)
        self._agreed.fill_(transport.token)
        self._agreed_token = transport.token  # a number: it copies and pickles, and no later job has it

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """See :func:`syncbn.convert_sync_batchnorm`."""
        from syncbn.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A SyncBatchNorm that takes ``num_features`` from its first input and then is a :class:`SyncBatchNorm`.

    Args:
        eps: see :class:`SyncBatchNorm`, as for the others.
        momentum: weight of a batch in the running statistics.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics.
        process_group: the ranks to synchronise over.
        device: where to create parameters and buffers.
        dtype: their dtype.
        bias: False leaves the bias out.
        group_size: the number of consecutive ranks to synchronise over.
        renorm_limits: ``(r_max, d_max)`` of batch renormalization.
    """

    cls_to_become = SyncBatchNorm

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
        group_size: int | None = None,
        renorm_limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = groups.specify_blocks(process_group, group_size)
        self.renorm_limits = renorm_limits

    def initialize_parameters(self, input: Tensor, mask: Tensor | None = None) -> None:
        """Takes ``num_features`` from the first input; in training a bad one on any rank is an error on all."""
        del mask  # forward looks at it
        error = checks.input_error(input, None)
        if self.training:
            transport = transports.choose(self._group_spec, checks.device_type(input, self.weight, self.running_mean))
            agreement.raise_together(error, transport)
        elif error is not None:
            raise error
        without_bias = self.weight is not None and self.bias is None
        if without_bias:  # torch 2.11 asks for one
            self.bias = UninitializedParameter(device=self.weight.device, dtype=self.weight.dtype)  # type: ignore[call-arg]
        super().initialize_parameters(input)
        if without_bias:
            self.register_parameter("bias", None)


def never_agreed() -> Tensor:
    """Makes what a compiled graph can read and write: int64 (), the token of the group that compared the settings."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


def _held(layer: _BatchNorm) -> tuple[Tensor | None, ...]:
    """Looks up weight, bias, running_mean, running_var, num_batches_tracked; each is a microsecond as an attribute."""
    try:
        parameters, buffers = layer._parameters, layer._buffers
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
    except KeyError:  # a parametrization, for example, moves a parameter elsewhere
        return layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.num_batches_tracked
