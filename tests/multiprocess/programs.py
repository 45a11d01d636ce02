# SPDX-License-Identifier: BSD-3-Clause
"""Random programs of layer calls and backward passes.

N batch, C channels, L length, W ranks.

A program is a list of steps. ``interpreters.py`` runs it on the ranks, and in one process with torch's layers;
``faults.py`` makes some ranks run other steps.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

SYNCHRONISED, EVAL, NO_GRAD = ("train", "no_grad"), ("eval", "validate"), ("no_grad", "validate")
MAX_LENGTH = 8


@dataclass(frozen=True)
class Step:
    """One instruction. What ``how`` means depends on ``op``."""

    op: str
    """forward, join, loss, penalty, backward, copy, average_gradients, raise_together or set."""
    out: str = ""
    args: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    """Of a forward: called one after the other."""
    how: str = ""
    """Of a forward: train, no_grad, eval, validate (eval under no_grad) or no_sync. Of a join: add or cat.

    Of a loss: scaled. Of set: a setting."""
    checkpointed: bool = False
    masked: tuple[int, ...] = ()
    """The ranks that pass a mask."""
    value: float | None = None

    @property
    def synchronised(self):
        return self.op == "forward" and self.how in SYNCHRONISED

    @property
    def communicates(self):
        quiet = self.op in ("forward", "loss", "join", "copy", "set")
        return self.synchronised or self.how == "scaled" or not quiet

    def __str__(self):
        if self.op == "set":
            return f"{self.layers[0]}.{self.how} = {self.value}"
        notes = [self.how] * bool(self.how) + ["checkpoint"] * self.checkpointed
        notes += [f"mask on ranks {self.masked}"] * bool(self.masked)
        call = f"{' then '.join(self.layers) or self.op}({', '.join(self.args)})"
        return f"{self.out} = {call} {' '.join(notes)}".removeprefix(" = ").strip()


class Fault(NamedTuple):
    """What some ranks do instead."""

    kind: str
    what: str
    ranks: tuple[int, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Program:
    """All that the ranks and the oracle need to know."""

    seed: int
    C: int
    group: int
    """Ranks in a group."""
    sizes: tuple[int, ...]
    """N of every rank."""
    inputs: dict[str, int]
    """L of every input."""
    settings: dict[str, dict]
    """Of every layer."""
    named: bool
    warm: bool
    """Whether every layer has been used before, so that a call of it is one message."""
    steps: tuple[Step, ...]
    fault: Fault | None = None

    def members(self, rank):
        """The group of a rank."""
        first = rank // self.group * self.group
        return range(first, first + self.group)

    def rows(self, ranks):
        """The rows of the global batch that consecutive ranks hold."""
        start = sum(self.sizes[: ranks[0]])
        return slice(start, start + sum(self.sizes[r] for r in ranks))

    def __str__(self):
        settings = [f"{name}: {options}" for name, options in self.settings.items()]
        head = f"C={self.C} N={self.sizes} L={self.inputs} groups of {self.group}, named={self.named} warm={self.warm}"
        fault = [f"fault on ranks {self.fault.ranks}: {self.fault.what}"] if self.fault else ["no fault"]
        return "\n  ".join([head, *settings, *map(str, self.steps), *fault])


class _Value(NamedTuple):
    """What is known of a tensor, or of a loss, before it is computed."""

    length: int = 0
    nodes: frozenset = frozenset()
    """The synchronised calls that a backward pass from here reaches."""
    grad: bool = True
    rooted: bool = True
    """Whether an input gets a gradient from here."""
    plain: bool = True
    """Whether no derivative is part of it."""


class _Drawing:
    """Draws steps, each of which the earlier ones allow."""

    def __init__(self, rng, program):
        self.rng, self.program, self.steps = rng, program, []
        self.values = {name: _Value(length) for name, length in program.inputs.items()}
        self.losses, self.open, self.in_eval, self.kept = {}, [], set(), ""
        self.layers = list(program.settings)
        self.numbers = itertools.count()

    def draw(self):
        world = self.program.group == len(self.program.sizes)  # what all ranks do together needs one group
        ops = {self.forward: 8, self.towers: 4, self.join: 2, self.loss: 3, self.penalty: 1, self.backward: 3}
        ops |= {self.copy: 0.5, lambda: self.say("average_gradients"): world, lambda: self.say("raise_together"): world}
        for op in self.rng.choices(list(ops), list(ops.values()), k=self.rng.randint(4, 10)):
            op()
        for _ in range(self.rng.randint(1, 2)):
            self.loss()
        while self.open:
            self.backward()
        return tuple(self.steps)

    def new(self, letter):
        return f"{letter}{next(self.numbers)}"

    def source(self):
        return self.rng.choice(list(self.values)[-3:])

    def forward(self, source=None):
        source, rng = source or self.source(), self.rng
        value = self.values[source]
        how = rng.choices(["train", "no_grad", "eval", "validate", "no_sync"], [20, 2, 1, 1, 2])[0]
        usable = [name for name in self.layers if self.allows(name, value, how)]
        if not usable:
            return source
        layers = tuple(rng.choices(usable, k=rng.choices([1, 2], [3, 1])[0]))
        checkpointed = how == "train" and rng.random() < 0.2
        masked = how not in EVAL and rng.random() < 0.15
        if checkpointed or how == "no_grad":  # kept for checkpointing, which tells calls apart by their local sums
            masked = masked and not self.kept
            checkpointed, how = (False, "train") if self.kept == "masked" else (checkpointed, how)
            self.kept = self.kept or ("masked" if masked else "plain")
        ranks = [r for r in range(len(self.program.sizes)) if masked and rng.random() < 0.7]
        step = Step("forward", self.new("y"), (source,), layers, how, checkpointed, tuple(ranks))
        self.steps.append(step)
        if how == "eval":
            self.in_eval.update(layers)
        if how in NO_GRAD:
            self.values[step.out] = _Value(value.length, grad=False, rooted=False)
        else:
            nodes = {(step.out, place) for place in range(len(layers))} if how == "train" else set()
            self.values[step.out] = value._replace(nodes=value.nodes | nodes, grad=True)
        return step.out

    def allows(self, name, value, how):
        """Whether a layer may be called.

        Eval needs running statistics. What has no gradient needs a weight that wants one. A gradient through eval needs
        the running statistics as they were, in torch too: such a layer stays in eval.
        """
        options = self.program.settings[name.removeprefix("copy.")]
        modes = options["track_running_stats"] if how in EVAL else name not in self.in_eval
        return modes and (value.grad or options["affine"])

    def towers(self):
        source = self.source()
        self.join(*[self.forward(source) for _ in range(2)])

    def join(self, *sources):
        one, two = sources or (self.source(), self.source())
        a, b = self.values[one], self.values[two]
        how = "cat" if a.length + b.length <= MAX_LENGTH and self.rng.random() < 0.3 else "add"
        step = Step("join", self.new("j"), (one, two), how=how)
        self.steps.append(step)
        length = a.length + b.length if how == "cat" else min(a.length, b.length)
        self.values[step.out] = _Value(length, a.nodes | b.nodes, a.grad or b.grad, a.rooted or b.rooted)

    def loss(self):
        sources = [name for name, value in self.values.items() if value.grad]
        source = self.rng.choice(sources[-3:])
        scaled = self.program.group == len(self.program.sizes) and self.rng.random() < 0.2
        self.add_loss(Step("loss", self.new("loss"), (source,), how="scaled" * scaled), self.values[source])

    def penalty(self):
        usable = [name for name, value in self.losses.items() if value.plain and value.rooted]
        if usable:
            source = self.rng.choice(usable[-3:])
            step = Step("penalty", self.new("loss"), (source,))
            self.add_loss(step, self.losses[source]._replace(plain=False))

    def add_loss(self, step, value):
        self.steps.append(step)
        self.losses[step.out] = value
        self.open.append(step.out)

    def backward(self):
        if self.open:
            loss = self.open.pop(self.rng.randrange(len(self.open)))
            self.steps.append(Step("backward", args=(loss,)))

    def copy(self):
        if len(self.layers) == len(self.program.settings):
            self.steps.append(Step("copy"))
            self.layers += [f"copy.{name}" for name in self.layers]

    def say(self, op):
        self.steps.append(Step(op))


def draw(rng, seed, W, *, warm):
    """Draws a program without a fault for W ranks, and what is known of its losses."""
    group = rng.choice([W, W, W, *(g for g in range(2, W) if W % g == 0)])
    sizes = [rng.choice([0, 1, 2, 3]) for _ in range(W)]
    for first in range(0, W, group):
        if sum(sizes[first : first + group]) < 2:
            sizes[first + rng.randrange(group)] += 2
    settings = {
        name: {
            "eps": rng.choice([0.01, 0.01, 0.1]),
            "momentum": rng.choice([0.1, 0.1, 0.5, None]),
            "affine": rng.random() < 0.8,
            "track_running_stats": rng.random() < 0.8,
        }
        for name in "abcd"[: rng.randint(2, 4)]
    }
    inputs = {f"x{k}": rng.choice([3, 3, 4]) for k in range(rng.randint(1, 2))}
    named, C = rng.random() < 0.7, rng.randint(1, 3)
    program = Program(seed, C, group, tuple(sizes), inputs, settings, named, warm, ())
    drawing = _Drawing(rng, program)
    return replace(program, steps=drawing.draw()), drawing.losses
