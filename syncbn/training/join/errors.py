# SPDX-License-Identifier: BSD-3-Clause
"""The errors of `join` on a rank that trains."""

from __future__ import annotations

import torch
from torch import nn

from syncbn.waits.limits import shown

NO_SYNC_OF_A_PART = (
    "syncbn.no_sync inside syncbn.join needs the whole model, since finished ranks must know which layers to follow; "
    "received a part of it. Call no_sync(model), or put no_sync of a part around the join."
)


def arguments_error(model: object, throw: object, empty: object) -> Exception | None:
    """Returns what is wrong with the arguments of a join on this rank, or None. ``optimizer`` is checked elsewhere."""
    if not isinstance(model, nn.Module):
        return TypeError(
            f"syncbn.join needs a torch.nn.Module; received {type(model).__name__}. Write join(model, optimizer)."
        )
    if not isinstance(throw, bool):
        return TypeError(
            f"syncbn.join needs throw_on_early_termination=True or False; received {shown(throw)}. False lets ranks "
            "end at different times."
        )
    if empty is not None and not callable(empty):
        return TypeError(
            f"syncbn.join needs a function as empty, or None; received {shown(empty)}. It turns (args, kwargs) of a "
            "forward into those of an empty local batch."
        )
    return None


def refuse_reentrant_checkpoint() -> None:
    """Raises for a forward of the whole model in backward, unless hooks or no_grad show that it is only repeated."""
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        raise RuntimeError(
            "syncbn.join needs to see the backward of the model; received a forward of it within backward, as "
            "checkpoint(model, x, use_reentrant=True) makes. Pass use_reentrant=False, or checkpoint parts of it."
        )


def second_join() -> Exception:
    """Returns the error for a join inside another one."""
    return RuntimeError(
        "syncbn.join needs to be the only one that is open; received a second one inside the first. "
        "Put one join around the outer loop."
    )


def other_world(operation: str) -> Exception:
    """Returns the error for a World in whose group finished ranks do not answer."""
    return RuntimeError(
        f"World.{operation} inside syncbn.join needs a World that connects everyone as the layers are; "
        "received one made before that changed. Call syncbn.init() again, before the join."
    )


def early_termination(finished: int, size: int) -> Exception:
    """Returns the error of ``throw_on_early_termination``."""
    return RuntimeError(
        "syncbn.join(throw_on_early_termination=True) needs the same number of steps on every rank; received "
        f"{finished} of {size} ranks that have finished while others go on. "
        "Give every rank as many batches, or leave the option out."
    )


def lazy_tensors(count: int) -> Exception:
    """Returns the error for a model with lazy layers that have seen no input."""
    return ValueError(
        "syncbn.join needs a model whose lazy layers have seen an input, since a rank may finish without one; "
        f"received {count} lazy tensors. Run one batch through the model first, on every rank."
    )


def too_old(age: int, kept: int) -> Exception:
    """Returns the error for a backward that comes too many forwards later."""
    return RuntimeError(
        f"syncbn.join needs the backward of a forward within the next {kept} forwards; received it after {age}. "
        "Call backward earlier."
    )


def unfinished(forward: int) -> Exception:
    """Returns the error for a rank that left the loop before a backward that others make."""
    return RuntimeError(
        f"syncbn.join needs a rank to leave the loop between two steps; received the backward of forward {forward} "
        "from ranks that train, which this rank ran itself without a backward. Leave the loop before the forward."
    )
