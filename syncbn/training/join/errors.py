# SPDX-License-Identifier: BSD-3-Clause
"""What `join` refuses on a rank that trains, in words."""

from __future__ import annotations

import torch

NO_SYNC_OF_A_PART = (
    "syncbn.no_sync inside syncbn.join needs the whole model, or finished ranks would not know which layers to follow; "
    "received a part of it. Call no_sync(model), or put no_sync of a part around the join."
)


def refuse_reentrant_checkpoint() -> None:
    """A forward of the whole model within backward: under hooks a repetition that stands for nothing, else backward."""
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        raise RuntimeError(
            "syncbn.join needs to see the backward of the model; received a forward of it within backward, as "
            "checkpoint(model, x, use_reentrant=True) makes. Pass use_reentrant=False, or checkpoint parts of it."
        )


def second_join() -> Exception:
    """A join inside another one."""
    return RuntimeError(
        "syncbn.join needs to be the only one that is open; received a second one inside the first. "
        "Put one join around the outer loop."
    )


def other_world(operation: str) -> Exception:
    """A World whose ranks would not be answered by those that have finished."""
    return RuntimeError(
        f"World.{operation} inside syncbn.join needs a World that connects everyone as the layers are; "
        "received one made before that changed. Call syncbn.init() again, before the join."
    )


def early_termination(finished: int, size: int) -> Exception:
    """What ``throw_on_early_termination`` asks for."""
    return RuntimeError(
        "syncbn.join(throw_on_early_termination=True) needs the same number of steps on every rank; received "
        f"{finished} of {size} ranks that have finished while others go on. "
        "Give every rank as many batches, or leave the option out."
    )


def lazy_tensors(count: int) -> Exception:
    """A model that has seen no input."""
    return ValueError(
        "syncbn.join needs a model whose lazy layers have seen an input, since a rank may finish without one; "
        f"received {count} lazy tensors. Run one batch through the model first, on every rank."
    )


def too_old(age: int, kept: int) -> Exception:
    """A backward that comes late."""
    return RuntimeError(
        f"syncbn.join needs the backward of a forward within the next {kept} forwards; received it after {age}. "
        "Call backward earlier."
    )


def unfinished(forward: int) -> Exception:
    """A rank that has left the loop before a backward that others make."""
    return RuntimeError(
        f"syncbn.join needs a rank to leave the loop between two steps; received the backward of forward {forward} "
        "from ranks that train, which this rank ran itself without a backward. Leave the loop before the forward."
    )
