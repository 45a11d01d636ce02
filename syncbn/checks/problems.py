# SPDX-License-Identifier: BSD-3-Clause
"""Errors that all ranks find together, in the counters of a reduced wire.

C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncbn import moments
from syncbn.checks.inputs import mask_values_error
from syncbn.checks.kinds import NAME, name_of
from syncbn.moments import DTYPES, Counters, Message, Status
from syncbn.transports.base import AbstractTransport
from syncbn.transports.gather import Notes, by_rank, calls_differ, gather_notes, raise_gathered


def raise_problem(
    counters: Counters,
    message: Message,
    notes: Notes,
    transport: AbstractTransport,
    *,
    x: Tensor,
    error: Exception | None,
    grad_enabled: bool,
    late: bool,
) -> None:
    """Raises the error that a reduced forward wire shows, alike on every rank. For exceptions see ``is_late``.

    Args:
        counters: read from the wire.
        message: the identity of this rank's call.
        notes: of its layer.
        transport: the group.
        x: this rank's input.
        error: the error of this input, or None.
        grad_enabled: whether autograd records on this rank.
        late: True if no other rank may be asked, see ``is_late``.

    Communication:
        None if there is no error. Else one all-reduce of texts, on every rank, since all read the same counters.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    problem, what = counters.problem(transport.size), f"{name_of(x.dtype)} {tuple(x.shape)}"
    if problem and late:
        own_error = None if error is None else alone(error, transport)
        raise own_error or deferred_error(problem, counters, message, what, LATE_ELSEWHERE)
    if problem == "call":
        transport.serial = message.serial  # the forward does not count, so the ranks are in step after the error
        raise calls_differ(message, notes, transport)
    if problem == "input":
        raise_gathered(error, transport)
    if problem:
        own = {"dtype": name_of(x.dtype) if x.numel() else "an empty local batch", "grad_enabled": f"{grad_enabled}"}
        received = by_rank(gather_notes(own.get(problem, f"shape {tuple(x.shape)}"), transport), transport.ranks)
        over = f"{counters.samples:g} over {_ranks(transport.size)}: " if problem == "count" else ""
        raise problem_error(problem, over + received)


def is_late(x: Tensor, transport: AbstractTransport) -> bool:
    """Whether ranks may find an error at different times, since the host does not wait for the all-reduce of a GPU.

    Some ranks do read the counters: with a mask, in a compiled graph, without CuPy. They cannot know whether the others
    do. So in such a group no rank asks the others about an error, and every rank whose autograd records joins backward.
    """
    return x.is_cuda and transport.size > 1 and not transport.host_synchronous


def alone(error: Exception, transport: AbstractTransport) -> Exception:
    """Returns an error that this rank raises alone. It begins with the rank."""
    return type(error)(by_rank([str(error)], (transport.ranks[transport.rank],), skip_empty=True))


def problem_error(problem: str, received: str, remark: str = "") -> Exception:
    """Returns the error for a problem of ``syncbn.moments.Counters.problem``."""
    needs, remedy, kind = _PROBLEMS[problem]
    return kind(f"{needs}; received {received}. {remedy}{remark}")


_PROBLEMS: dict[str, tuple[str, str, type[Exception]]] = {
    "call": (
        "All ranks must be in one call",
        "Ranks took different branches, ran backward passes in another order, or one of them changed settings.",
        ValueError,
    ),
    "input": (f"{NAME} needs a right input on every rank", "The errors of those ranks say what was wrong.", ValueError),
    "dtype": (
        f"{NAME} needs input of one dtype on every rank",
        "Cast the input, or use the same autocast settings on every rank.",
        TypeError,
    ),
    "grad_enabled": (
        f"{NAME} needs torch.is_grad_enabled() to be equal on every rank, or backward would wait forever",
        "Use torch.no_grad() on all ranks or on none, or model.eval().",
        ValueError,
    ),
    "count": (
        f"{NAME} needs at least 2 values per channel in the group to estimate a variance",
        "Give each rank more samples or call model.eval().",
        ValueError,
    ),
}
LATE_ELSEWHERE = "Other ranks may find it later, as a GPU is not waited for. End all processes."


def deferred_error(problem: str, counters: Counters, message: Message, what: str, remark: str) -> Exception:
    """Returns the error for a deferred problem: with numbers of ranks, and this rank's call and input.

    Args:
        problem: the problem of the counters.
        counters: of the reduced wire.
        message: the identity of this rank's call.
        what: dtype and shape of its input.
        remark: the last sentences.
    """
    W, status = message.ranks, Status._make(counters.status)
    votes = ", ".join(f"{name_of(d)} on {n:g}" for d, n in zip(DTYPES, status[3:], strict=True) if n)
    received = {
        "call": f"{message} here and another one on some of {_ranks(W)}",
        "input": f"a wrong one on {status.faults:g} of {_ranks(W)}",
        "dtype": f"{votes} of {_ranks(W)}",
        "grad_enabled": f"True on {status.grad_enabled:g} of {_ranks(W)}",
        "count": f"{counters.samples:g} over {_ranks(W)}",
    }[problem]
    return problem_error(problem, received, f" This rank was in {message}, with input {what}. {remark}")


def describe(error: Exception | None) -> str:
    """Turns an error into a text that a compiled graph can hold: T or V, then the message. None becomes empty."""
    if error is None:
        return ""
    return ("T" if isinstance(error, TypeError) else "V") + str(error.args[0])


def raise_if_wires_disagree(
    wire: Tensor,
    own: Tensor,
    message: Message,
    notes: Notes,
    transport: AbstractTransport,
    *,
    fault: str,
    mask: Tensor | None,
) -> None:
    """Does what ``raise_problem`` does, from the wires alone, as inside an operator.

    Args:
        wire: float64 (2C + 15,), summed over the ranks.
        own: float64 (2C + 15,), the wire that this rank sent.
        message: the identity of this rank's call.
        notes: of its layer.
        transport: the group.
        fault: ``describe`` of the error of this rank's input.
        mask: this rank's mask, for the error about its values.

    Communication:
        As ``raise_problem``.

    Raises:
        ValueError, TypeError: on every rank of the group.
    """
    counters = moments.read_counters(wire, message.numbers)
    if not counters.problem(transport.size):
        return
    local = moments.read_counters(own, message.numbers)
    error: Exception | None = None
    status = Status._make(local.status)
    if status.faults:
        error = (TypeError if fault[0] == "T" else ValueError)(fault[1:]) if fault else mask_values_error(mask)
    dtype = next((d for d in DTYPES if getattr(status, name_of(d))), torch.float32)
    samples = (
        int(min(max(local.samples, 0.0), 2.0**31)) if math.isfinite(local.samples) else 0
    )  # a mask may hold anything
    known = torch.empty(samples, moments.channels(wire), dtype=dtype, device="meta")  # of the input: (N * S, C)
    raise_problem(
        counters,
        message,
        notes,
        transport,
        x=known,
        error=error,
        grad_enabled=bool(status.grad_enabled),
        late=is_late(wire, transport),
    )


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
