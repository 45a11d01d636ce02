# SPDX-License-Identifier: BSD-3-Clause
"""join(): training loops of different length. Ranks that have finished follow the others with empty local batches.

N batch, W ranks.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from syncbn import transports
from syncbn.training import modes
from syncbn.training.join import backward, empty_batch, errors, optimizer_state, stale_optimizers
from syncbn.training.join.empty_batch import Call
from syncbn.training.join.nested_values import Group
from syncbn.training.join.optimizer_state import Source
from syncbn.transports import announcing, gather, groups
from syncbn.transports.announcing import Announcement, Hook, Outcome
from syncbn.transports.base import AbstractTransport
from syncbn.world.world import World

KEPT = 64
"""How many forwards of a finished rank are kept for their backward."""


@final
class join:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Lets ranks make different numbers of training steps; those that have finished take part with weight zero.

    Put it around the loop. A rank that leaves the loop runs the model on an empty local batch (N = 0) for every forward
    that others still make, its backward with zero gradients, and its part of ``World.average_gradients``,
    ``World.loss_scale``, ``World.average`` and ``World.raise_together``, until all have left. Then parameters, buffers
    and the state of the optimizer are copied from a rank that made the most forwards.

    Args:
        model: the model whose forward is called in the loop, plain or in DistributedDataParallel.
        optimizer: the optimizer that steps in the loop, or a list of optimizers and of LR schedulers and GradScalers
            that do. All of their ``state_dict()`` is copied. If numbers of steps differed, the next ``step()`` of an
            optimizer with state that was not passed is an error on every rank. Plain SGD has no state.
        throw_on_early_termination: raise on every rank as soon as one has finished while others go on.
        empty: turns ``(args, kwargs)`` of a forward into those of an empty local batch. By default the first dim of
            every tensor becomes 0, and everything else stays.

    Communication:
        Entering: two comparisons, of 5 and of 2 values a rank; at a process's first, one group of everyone is made.
        In training, each forward, backward and each of the four calls of World: one all-reduce of 14 float64
        values more, whether or not a rank has finished. Leaving: the same for every call that others still make,
        and at the end one all-reduce of W values. If numbers of steps differed, also one ``World.broadcast``, one
        comparison and one broadcast for every 64 MB of the optimizers, and four of short texts.

    Raises:
        RuntimeError: on every rank, if ranks that train make different calls, if one leaves by an exception
            between two calls, or if one finishes early and ``throw_on_early_termination`` is set.
        ValueError: on every rank, at the first forward, if the model fails on an empty local batch; at entering, if
            ranks pass different optimizers.
        TypeError: on every rank, if ``model`` is no module, ``optimizer`` is something else, or its state holds more
            than tensors, numbers and text.
    """

    __module__ = "syncbn"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Source | Sequence[Source] | None = None,
        *,
        throw_on_early_termination: bool = False,
        empty: Callable[[tuple[Any, ...], dict[str, Any]], Call] | None = None,
    ) -> None:
        self._error = errors.arguments_error(model, throw_on_early_termination, empty)
        if self._error is not None:  # raised by all, at entering
            model, throw_on_early_termination, empty = nn.Module(), False, None
        self._model = model
        self._inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._optimizers: tuple[Source, ...] = optimizer_state.as_tuple(optimizer)
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # in the loop, on this rank
        self._throw = throw_on_early_termination
        self._empty = empty_batch.of if empty is None else empty
        self._example: Call | None = None
        self._forwards = 0
        self._waiting: dict[int, list[Tensor]] = {}
        self._quiet = False  # while it follows others, or tries the model on an empty batch
        self._within = False  # in a call of World, which may call others
        self._inside = False  # between an announcement and the end of the announced operation
        self._over = False  # all ranks know of the error

    def __enter__(self) -> Self:
        if announcing.is_open():
            raise errors.second_join()
        everyone = transports.choose(None)
        settings = {"throw_on_early_termination": self._throw, "number of parameters": len(list(self._params()))}
        settings |= {"DistributedDataParallel": self._inner is not self._model}
        settings |= {"number of lazy tensors": self._count_lazy()}
        gather.require_equal(settings, everyone, "syncbn.join", "Enter it alike on every rank.", self._error)
        optimizer_state.require_same(self._optimizers, self._inner, everyone)
        self._refuse_lazy()
        self._alone = self._which_are_alone()
        self._transport = announcing.own_group(everyone)
        transport = transports.choose(None, self._device.type)
        self._world = World(transport.rank, transport.size, 0, self._device, "join", transport)
        self._hooks = [
            self._model.register_forward_pre_hook(Hook(self._before_forward), prepend=True, with_kwargs=True),
            self._model.register_forward_hook(Hook(self._after_forward)),
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._stepped.add(optimizer)),
        ]
        announcing.open_for(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet = True
        try:
            if error is None:
                self._follow()
            elif isinstance(error, Exception) and not self._inside and not self._over:
                # The others wait in their next announcement, and hear of the error there. This rank raises its own.
                with contextlib.suppress(RuntimeError, ValueError, TypeError):
                    self._say(Announcement(None, error=RuntimeError(f"left syncbn.join with {error!r}")))
        finally:
            announcing.close()
            for hook in self._hooks:
                hook.remove()
            self._waiting.clear()

    # Ranks that train.

    def enter(self, operation: str, transport: AbstractTransport) -> bool:
        """Announces a collective of World."""
        if self._quiet or self._within:
            return False
        if transport is not self._world.transport:  # ranks that have finished would answer in another group
            raise errors.other_world(operation)
        self._say(Announcement(operation))
        self._within = self._inside = True
        return True

    def leave(self, *, well: bool = True) -> None:
        """Notes that the announced operation has ended, well or with an exception."""
        self._within, self._inside = False, not well

    def _say(self, said: Announcement) -> Outcome:
        self._over = True
        heard = announcing.announce(said, self._transport)
        if self._throw and 0 < heard.finished < self._transport.size:
            raise errors.early_termination(heard.finished, self._transport.size)
        self._over = False
        return heard

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._quiet or not model.training:  # eval does not communicate
            return
        if torch._C._current_graph_task_id() != -1:
            errors.refuse_reentrant_checkpoint()
            return
        error = None
        with torch.no_grad():
            self._example = self._empty(args, kwargs)
        if self._forwards == 0:
            error = empty_batch.refusal(self._inner, self._example, self._hush)
        alone = self._which_are_alone()
        if alone != self._alone and not all(alone):
            error = error or ValueError(errors.NO_SYNC_OF_A_PART)
        flags = torch.is_grad_enabled() + 2 * getattr(model, "require_backward_grad_sync", True)
        flags += 4 * (alone != self._alone)
        heard = self._say(Announcement("forward", self._forwards, flags, error=error))
        self._share(heard)
        self._inside = True

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._quiet or not model.training or torch._C._current_graph_task_id() != -1:
            return output
        output = backward.track_backward(output, self, self._forwards)
        self._forwards += 1
        self._inside = False
        return output

    def trains(self) -> bool:
        """Whether this rank is still in the loop."""
        return announcing.is_open(self) and not self._quiet

    def before_backward(self, forward: int, used: list[bool]) -> None:
        """Announces the backward of a forward, through the outputs that are used."""
        fresh = all(p.grad is None or not p.grad.any() for p in self._params())
        flags = sum(2**i for i, each in enumerate(used) if each)
        error = None if forward >= self._forwards - KEPT else errors.too_old(self._forwards - forward, KEPT)
        self._say(Announcement("backward", forward, flags, fresh, error=error))
        self._inside = True
        torch.autograd.Variable._execution_engine.queue_callback(self.leave)

    def _which_are_alone(self) -> list[bool]:
        """Says of each layer whether it is in ``syncbn.no_sync``."""
        return [layer.process_group == groups.ALONE for layer in modes.layers_of(self._inner)]

    def _count_lazy(self) -> int:
        return sum(map(is_lazy, (*self._inner.parameters(), *self._inner.buffers())))

    def _refuse_lazy(self) -> None:
        if lazy := self._count_lazy():
            raise errors.lazy_tensors(lazy)

    def _params(self) -> Iterator[nn.Parameter]:
        return (p for p in self._inner.parameters() if p.requires_grad)

    @contextlib.contextmanager
    def _hush(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _share(self, heard: Outcome) -> None:
        if heard.needs_example:
            self._example = empty_batch.send(self._example, self._device, self._transport)

    # Ranks that have finished.

    def _follow(self) -> None:
        """Takes part in what the others do, with an empty local batch, until all have finished."""
        follow = {"forward": self._follow_forward, "backward": self._follow_backward}
        own, world = self._forwards, self._world
        while (heard := self._say(Announcement(None, needs_example=self._example is None))).operation is not None:
            if heard.operation == "average_gradients":
                world.average_gradients(self._inner)
            elif heard.operation == "loss_scale":
                world.loss_scale(0)
            elif heard.operation == "average":
                world.average(0.0, weight=0.0)
            elif heard.operation == "raise_together":
                world.raise_together(None)
            else:
                follow[heard.operation](heard)
        row = torch.tensor([float(own)], dtype=torch.float64, device="cpu")
        made = [int(forwards) for (forwards,) in gather.gather(row, self._transport).tolist()]
        if min(made) < max(made):
            self._hand_over(made, made.index(max(made)))
        if own < max(made):
            self._inner.zero_grad()

    def _hand_over(self, made: list[int], root: int) -> None:
        """Copies model and optimizers from ``root``. The next step of an optimizer that cannot be copied is refused."""
        self._world.broadcast(self._inner, root)
        error: Exception | None = None
        try:
            group = Group(self._transport, self._world.transport, self._device)
            optimizer_state.broadcast(self._optimizers, self._inner, root, group)
        except (TypeError, ValueError) as refused:  # by every rank alike
            error = refused
        received = gather.by_rank([f"{forwards} forwards" for forwards in made], self._transport.ranks)
        copied = () if error else self._optimizers
        stale_optimizers.refuse(self._stepped, copied, self._inner, root, received=received, host=self._transport)
        if error:
            raise error

    def _follow_forward(self, heard: Outcome) -> None:
        self._share(heard)
        assert self._example is not None
        args, kwargs = self._example
        with torch.set_grad_enabled(bool(heard.flags & 1)), self._no_sync(heard):
            self._waiting[heard.forward] = backward.differentiable(self._model(*args, **kwargs))
        self._waiting.pop(heard.forward - KEPT, None)

    @contextlib.contextmanager
    def _no_sync(self, heard: Outcome) -> Iterator[None]:
        with contextlib.ExitStack() as both:
            if isinstance(self._model, DistributedDataParallel) and not heard.flags & 2:
                both.enter_context(self._model.no_sync())
            if heard.flags & 4:
                both.enter_context(modes.no_sync(self._inner))
            yield

    def _follow_backward(self, heard: Outcome) -> None:
        if heard.forward not in self._waiting:
            raise errors.unfinished(heard.forward)
        if heard.fresh:  # else gradients of several backwards are being summed, and this rank's are a part of them
            self._inner.zero_grad()
        used = [y for i, y in enumerate(self._waiting[heard.forward]) if heard.flags & 2**i]
        torch.autograd.backward(used, [torch.zeros_like(y) for y in used], retain_graph=True)
