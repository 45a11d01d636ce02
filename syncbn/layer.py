# SPDX-License-Identifier: BSD-3-Clause
"""SyncBatchNorm, the module: parameters, buffers, train and eval. No maths.

N batch, C channels, S product of the spatial dims, W ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import evaluation, functional
from syncbn.calls import renorm, traced
from syncbn.calls.renorm import RenormLimits
from syncbn.calls.sites import Layer, Settings, Site
from syncbn.checks import converters, inputs, kinds
from syncbn.moments import record
from syncbn.transports.groups import GroupSpec
from syncbn.transports.specify import specify, specify_blocks


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batch of all processes.

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over N and S of every local batch.

    In training, output, input gradient and running statistics are those of ``torch.nn.BatchNorm*`` over the
    concatenated batch. In eval it is ``torch.nn.functional.batch_norm``, but takes any dtypes together, and never
    communicates. Gradients of weight and bias stay local: DistributedDataParallel, or ``World.average_gradients``,
    averages them.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None averages over all batches seen.
        affine: whether to learn weight and bias.
        track_running_stats: whether to keep running statistics. Without them, eval uses the statistics of the local
            batch.
        process_group: None for every rank, a torch ProcessGroup, an mpi4py communicator, or what
            ``World.subgroup`` returned. The layer stores a specification of the group, never the handle.
        device: where to create parameters and buffers.
        dtype: their dtype.
        bias: False leaves the bias out.
        group_size: instead of ``process_group``, the number of consecutive ranks to synchronise over. It must
            divide the number of all ranks. "node" is the ranks of one host, as many on each.
        renorm_limits: ``(r_max, d_max)`` of batch renormalization; None is batch normalization. See
            ``syncbn.RenormLimits``.
        replays: True if a forward inside backward is one that activation checkpointing repeats: it then sends nothing.
            Pass False for a layer that is called inside backward for another reason, as in an adjoint ODE block or a
            reversible network: there every forward communicates.

    Shape:
        Input and output: (N, C, *spatial), with any number of spatial dims, N from 0.

    Communication:
        Training: one all-reduce of 2C + 15 float64 values in forward and one of 2C + 7 in backward, by every rank of
        the group, also with an empty local batch. At the first training step of a layer in a group, one more of
        7 W + 7 values compares its name and settings. Eval: none.

    Raises:
        ValueError, TypeError: on every rank of the group alike, if the input of any rank is wrong, if settings,
            dtypes or gradient modes differ, if ranks are in different calls, or if the group has one value per channel.

    Source:
        Ioffe and Szegedy 2015 (arXiv 1502.03167); the interface is that of torch.nn.SyncBatchNorm.
    """

    __module__ = "syncbn"

    converter: ClassVar[Callable[[torch.nn.Module, Any], torch.nn.Module]]
    """``syncbn.convert_sync_batchnorm``. ``convert/`` sets it, since it imports this file."""
    dims: ClassVar[inputs.Dims] = inputs.ANY_DIMS
    """The numbers of dims of an input."""

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
        group_size: int | Literal["node"] | None = None,
        renorm_limits: tuple[float, float] | None = None,
        replays: bool = True,
    ) -> None:
        inputs.require_features(num_features, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # the layers of torch 2.11 do not have this argument
            self.register_parameter("bias", None)
        self._site = Site("SyncBatchNorm", specify_blocks(process_group, group_size), replays=replays)
        self.renorm_limits = renorm_limits

    @property
    def affine(self) -> bool:
        """Whether the layer has weight and bias. Refuses the conversions of other libraries, see ``converters.py``."""
        if not torch.compiler.is_compiling() and converters.converts(caller := sys._getframe(1)):
            raise converters.conversion_error(caller, self._site.name or type(self).__name__)
        if "affine" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute 'affine'")
        affine: bool = self.__dict__["affine"]
        return affine

    @affine.setter
    def affine(self, affine: bool) -> None:
        self.__dict__["affine"] = affine

    @property
    def process_group(self) -> GroupSpec | None:
        """The group, as a specification that can be copied and pickled. Assign any kind of group to change it."""
        return self._site.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._site.group = specify(group)

    @property
    def converted_from(self) -> type[_BatchNorm] | None:
        """The class that ``revert_sync_batchnorm`` restores; None for a layer that was created as SyncBatchNorm."""
        return self._site.converted_from

    @property
    def renorm_limits(self) -> RenormLimits | None:
        """``(r_max, d_max)`` of batch renormalization, or None. Assign new limits at any step, on every rank."""
        limits = self._site.renorm
        return None if limits is None else RenormLimits(*limits)

    @renorm_limits.setter
    def renorm_limits(self, limits: tuple[float, float] | None) -> None:
        found = renorm.checked(limits, self.track_running_stats)
        self._site.renorm = None if found is None else (found.r_max, found.d_max)  # a plain tuple pickles

    def __getstate__(self) -> dict[str, Any]:
        """Describes the layer for copies and pickles: they get the group's specification and no live handle."""
        return {**self.__dict__, "_site": self._site.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_site": Site.of_state(state["_site"])})  # type: ignore[no-untyped-call]

    def reset_parameters(self) -> None:
        """Resets running mean to 0, running variance to 1, weight to 1 and bias to 0."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                torch.nn.init.constant_(parameter, value)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. A frozen layer stays in eval."""
        return super().train(mode and not self._site.frozen)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises the local batch, (N, C, *spatial), by the statistics of the global batch.

        Args:
            input: (N, C, *spatial). N may be 0.
            mask: (N, *spatial) or (N, 1, *spatial), boolean or weights >= 0, or None. A value whose mask is 0 counts in
                no statistic and gets no gradient through them; it is normalised like the rest. In eval the mask
                changes nothing.
        """
        if not self.training:
            return self._eval_forward(input, mask)
        if type(input) is not Tensor and traced.is_proxy(input):
            return self._traced_forward(input, mask)
        site = self._site
        layer = record(Layer, (site, self.settings(), site.group, self))
        return functional.forward(input, mask, _held(self), layer, self.dims)

    def _check_input_dim(self, input: Tensor) -> None:
        """Raises the error of an input, as torch's layers do here. A patch of theirs would not run: forward checks."""
        error = inputs.input_error(input, self.num_features, self.dims)
        if error is not None:
            raise error

    def settings(self) -> Settings:
        """Returns what must be equal on every rank."""
        return self.num_features, self.eps, self.momentum, self.track_running_stats, self._site.renorm

    def _eval_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        recorded = inputs.is_recorded(x)
        if recorded and traced.is_proxy(x):
            return self._traced_forward(x, mask)
        error = None if recorded else inputs.input_error(x, self.num_features, self.dims) or inputs.mask_error(mask, x)
        if error is not None:
            raise error
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None and not recorded and self._records(x):
            # backward needs them as they are now: a training step in between moves the buffers
            mean, var = mean.clone(), var.clone()
        parameters = (mean, var, self.weight, self.bias)
        if isinstance(x, Tensor) and (mean is None) == (var is None) and evaluation.mixes_dtypes(x, *parameters):
            if not recorded:
                self._require_vectors(parameters)
            return evaluation.eval_batch_norm(x, *parameters, self.eps)
        local = mean is None  # without running statistics: use the local batch's, without communication
        return F.batch_norm(x, mean, var, self.weight, self.bias, local, self.momentum or 0.0, self.eps)

    def _require_vectors(self, parameters: tuple[Tensor | None, ...]) -> None:
        """Raises for a parameter or buffer that torch's batch_norm would refuse."""
        names = ("running_mean", "running_var", "weight", "bias")
        for name, t in zip(names, parameters, strict=True):
            error = None if t is None else kinds.vector_error(name, t, self.num_features)
            if error is not None:
                raise error

    def _traced_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        leaf = traced.is_leaf(self, SyncBatchNorm.forward)
        y: Tensor = traced.call(self, x, mask) if leaf else traced.call_inner(normalize, self, x, mask)
        return y

    def _records(self, x: Tensor) -> bool:
        """Whether autograd records an eval forward."""
        tensors = (x, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def __prepare_scriptable__(self) -> Self:
        """Refuses torch.jit.script, which calls this before it compiles."""
        raise TypeError(
            "torch.jit.script needs layers that do not communicate; received a SyncBatchNorm. Call "
            "syncbn.revert_sync_batchnorm(model) first. torch.export and torch.jit.trace take the layer as it is."
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """See ``syncbn.convert_sync_batchnorm``."""
        return cls.converter(module, process_group)


def normalize(layer: SyncBatchNorm, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls a layer without its hooks and without what a subclass adds, as a graph of torch.fx does that has these."""
    if not isinstance(layer, SyncBatchNorm):
        raise TypeError(
            "A graph of torch.fx that holds the hooks of a SyncBatchNorm needs that layer; received a "
            f"{type(layer).__name__}. Revert the model before you trace it."
        )
    return SyncBatchNorm.forward(layer, x, mask)


def _held(layer: _BatchNorm) -> tuple[Tensor | None, ...]:
    """Looks up weight, bias, running_mean, running_var, num_batches_tracked. Each costs 1 us as an attribute."""
    try:
        parameters, buffers = layer._parameters, layer._buffers
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
    except KeyError:  # for example, a parametrization has moved a parameter
        return layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.num_batches_tracked
