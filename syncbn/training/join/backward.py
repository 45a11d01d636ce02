# SPDX-License-Identifier: BSD-3-Clause
"""Tracks the outputs of a forward in `join`, to announce its backward and the outputs that it uses."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

MOST_OUTPUTS = 24


class Trains(Protocol):
    """The part of a `join` that its outputs use."""

    def trains(self) -> bool:
        """Whether this rank is still in the loop."""

    def before_backward(self, forward: int, used: list[bool]) -> None:
        """Announces the backward of a forward, through the outputs that are used."""


def differentiable(output: Any) -> list[Tensor]:
    """Returns the tensors of a model's output that require a gradient, each once.

    Raises:
        TypeError: if there is no tensor at all, or more than ``MOST_OUTPUTS`` that require a gradient.
    """
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    found = list({id(t): t for t in tensors if t.requires_grad}.values())
    if not tensors or len(found) > MOST_OUTPUTS:
        raise TypeError(
            f"syncbn.join needs 1 to {MOST_OUTPUTS} tensors in the output of the model, in tuples, lists or dicts; "
            f"received {len(found)} in {type(output).__name__}. Return tensors, or register the type with torch.utils."
        )
    return found


def track_backward(output: Any, joined: Trains, number: int) -> Any:
    """Returns the output of forward ``number`` with tensors that announce their backward to ``joined``."""
    forward = Forward(joined, number)
    copies = {id(t): forward.note(t) for t in differentiable(output)}
    return tree_map(lambda t: copies.get(id(t), t), output) if copies else output


class Forward:
    """The outputs of one forward, by weak references to their nodes: strong ones would be a reference cycle."""

    def __init__(self, joined: Trains, number: int) -> None:
        self.joined, self.number = weakref.ref(joined), number
        self.nodes: list[weakref.ref[Any]] = []
        self.task = -1

    def note(self, output: Tensor) -> Tensor:
        """Returns a copy of an output. Its backward runs before that of the model."""
        tracked: Tensor = _Output.apply(self, output)  # type: ignore[no-untyped-call]
        self.nodes.append(weakref.ref(tracked.grad_fn))
        return tracked

    def before_backward(self) -> None:
        """Announces a backward pass once, with the outputs that it uses."""
        joined, task = self.joined(), torch._C._current_graph_task_id()
        if joined is None or not joined.trains() or task == self.task:
            return
        self.task = task
        if torch.is_grad_enabled():
            raise RuntimeError(
                "syncbn.join needs a backward that finished ranks can follow; received create_graph=True, and they "
                "cannot know which second derivative follows. Take second derivatives outside the join."
            )
        nodes = [node() for node in self.nodes]
        joined.before_backward(
            self.number, [node is not None and torch._C._will_engine_execute_node(node) for node in nodes]
        )


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, output: Tensor) -> Tensor:
        ctx.forward_of = forward
        return output.clone()  # autograd refuses to change a view in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.forward_of.before_backward()
        return None, grad
