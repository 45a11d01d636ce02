# SPDX-License-Identifier: BSD-3-Clause
"""No random program, with or without a fault on some ranks, ends with wrong numbers and without an error.

SYNCBN_TEST_SEED is the seed of the first program, and SYNCBN_TEST_PROGRAMS their number. A failure prints the seed of
its program: that seed and one program repeat it alone, on as many ranks.
"""

import collections
import os
import zlib

import pytest
import torch

from syncbn import moments
from syncbn.transports import gather
from tests.multiprocess import faults
from tests.multiprocess.conftest import AgreedError
from tests.multiprocess.interpreters import Exact, Ours, interpret

SEED = int(os.environ.get("SYNCBN_TEST_SEED", "0"))
PROGRAMS = int(os.environ.get("SYNCBN_TEST_PROGRAMS", "200"))
TOLERANCE = 1e-9
CHECKS = (
    ("syncbn.moments.same_call", lambda *_: True),
    ("syncbn.kernels.host.ops.HostKernels.check_sums", lambda *_: True),
    (
        "syncbn.kernels.host.ops.HostKernels.read_counters",
        lambda _, wire, message: moments.read_counters(wire, message.numbers),
    ),
    ("syncbn.transports.shared_memory.SharedMemoryTransport.all_reduce", lambda self, wire: self.host.all_reduce(wire)),
    ("syncbn.transports.direct.agree", lambda heads: True),
)
"""(name, replacement) of the functions that compare the calls of the ranks, which the negative control does without."""

pytestmark = [pytest.mark.ranks(2), pytest.mark.immediate_errors, pytest.mark.timeout(3600 if PROGRAMS > 1000 else 300)]


def run(program, ranks):
    """Runs a program on all ranks; returns what all agree to have happened, and details if that is wrong.

    right, refused (the same ValueError on every rank of the group), silent (wrong numbers, no error), or mixed.
    """
    ours, exact, error = Ours(program, ranks), Exact(program, ranks.rank), None
    fault = program.fault
    steps = fault.steps if fault and ranks.rank in fault.ranks else program.steps
    try:
        interpret(program, steps, ours)
    except Exception as raised:  # of any kind: raised further on one rank, it would end this run
        error = without_frames(raised)
    interpret(program, program.steps, exact)
    finished = error is None
    wrong = [*wrong_values(ours, exact, finished=finished), *wrong_gradients(ours, exact, finished=finished)]
    text = "" if error is None else f"{type(error).__name__}: {error}"
    row = torch.tensor([bool(wrong), isinstance(error, ValueError), zlib.crc32(text.encode())], device="cpu")
    table = [tuple(row) for row in gather.gather(row.double(), ranks.transport).long().tolist()]
    return classify(program, table), f"{text} {'; '.join(wrong)}"


def without_frames(error):
    """Lets go of the frames of an error. Those of a checkpointed forward keep its hooks in force, before torch 2.13."""
    for each in (error, error.__cause__, error.__context__):
        if each is not None:
            each.__traceback__ = None
    return error


def classify(program, table):
    """Judges the rows (wrong, ValueError, checksum of its text) of all ranks."""
    if any(wrong for wrong, *_ in table):
        return "mixed" if any(text for *_, text in table) else "silent"
    if not any(text for *_, text in table):
        return "right"
    members = program.members(program.fault.ranks[0]) if program.fault else ()
    inside, outside = {table[r] for r in members}, {row for r, row in enumerate(table) if r not in members}
    agreed = len(inside) == 1 and all(refused for _, refused, _ in inside) and not any(text for *_, text in outside)
    return "refused" if agreed else "mixed"


def wrong_values(ours, exact, *, finished):
    """Names outputs and running statistics that are wrong; after an error, as the calls before it left them."""
    place = exact.members.index(ours.ranks.rank)
    part = exact.parts[place]
    for name, y in ours.outputs.items():
        yield from gap(name, y, exact.outputs[name][part])
    for name, layer in ours.layers.items():
        if layer.track_running_stats:
            history = exact.layers[name].history[place]
            expected = history[-1 if finished else min(ours.calls[name], len(history) - 1)]
            actual = (layer.num_batches_tracked, layer.running_mean, layer.running_var)
            for kind, a, b in zip(("count", "mean", "var"), actual, expected, strict=True):
                yield from gap(f"{name} running {kind}", a, torch.as_tensor(b))


def wrong_gradients(ours, exact, *, finished):
    """Names gradients that are wrong at the end: of inputs, and of parameters summed over the group. Collective."""
    program, rank = ours.program, ours.ranks.rank
    expected = [(f"{name} {kind}", p) for name, e in exact.layers.items() for kind, p in e.one.named_parameters()]
    own = [p for layer in ours.layers.values() for p in layer.parameters()] if finished else [p for _, p in expected]
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *[gradient(p).flatten() for p in own]])
    table = torch.zeros(ours.ranks.size // program.group, len(flat), dtype=torch.float64)
    table[rank // program.group] = flat
    sums = ours.ranks.transport.all_reduce(table)[rank // program.group].split(program.C) if len(flat) else []
    if not finished:
        return
    for (name, parameter), summed in zip(expected, sums, strict=False):
        yield from gap(f"{name} gradient", summed, gradient(parameter))
    for name, x in ours.inputs.items():
        yield from gap(f"{name} gradient", gradient(x), gradient(exact.inputs[name])[exact.parts[rank % program.group]])


def gradient(t):
    return torch.zeros_like(t) if t.grad is None else t.grad


def gap(name, actual, expected):
    """Names two tensors that differ, and by how much."""
    if expected.numel():
        differs = (actual - expected).abs().max().item()
        if not differs <= TOLERANCE * (1.0 + expected.abs().max().item()):
            yield f"{name} is wrong by {differs:.2g}"


def count(ranks, number, allowed, change=lambda program: program):
    """Runs programs and counts (kind of fault, what happens); fails, on every rank, where that is not allowed."""
    found = collections.Counter()
    for seed in range(SEED, SEED + number):
        program = change(faults.draw(seed, ranks.size))
        what, details = run(program, ranks)
        found[program.fault.kind if program.fault else "none", what] += 1
        if what != "right" and not (program.fault and what in allowed):
            texts = gather.by_rank(gather.gather_notes(details, ranks.transport), tuple(range(ranks.size)))
            raise AgreedError(f"the program of SYNCBN_TEST_SEED={seed} is {what}: {texts}\n  {program}")
    print(*sorted(found.items()) * (ranks.rank == 0), sep="\n")  # noqa: T201 - for those who run many, with -s
    return found


def test_no_program_ends_wrong_and_without_an_error(ranks):
    """After an agreed error the ranks are in step: the next program is right."""
    count(ranks, PROGRAMS, {"refused"})


def test_without_the_checks_the_same_programs_end_wrong(ranks, monkeypatch):
    """The negative control: programs do run into the faults, and the comparison can fail."""
    pytest.importorskip("syncbn.kernels.host.ops", reason="built without a compiler", exc_type=ImportError)
    for name, instead in CHECKS:
        monkeypatch.setattr(name, instead)
    found = count(ranks, PROGRAMS // 4, {"refused", "silent"}, faults.without_checkpoints)
    faulty = sum(n for (kind, _), n in found.items() if kind != "none")
    silent = sum(n for (_, what), n in found.items() if what == "silent")
    ranks.check(silent * 2 > faulty or faulty < 20, f"{silent} of {faulty}")
