# SPDX-License-Identifier: BSD-3-Clause
"""Faults in random programs: what some ranks of one group do instead.

A faulty rank sends as many messages as the others, of the same lengths in the same order. So no rank waits for ever,
whether or not the library sees the fault. No fault mixes two forwards of layers with one name, of a model and its copy
for example: all ranks are then in one call, and only its data differ.
"""

import itertools
import random
from dataclasses import replace

from tests.multiprocess import programs
from tests.multiprocess.programs import Fault, Step


def draw(seed, W):
    """Draws a program for W ranks, half of the time with a fault; the same on every rank."""
    rng = random.Random(seed)
    faulty = rng.random() < 0.5
    program, losses = programs.draw(rng, seed, W, warm=faulty or rng.random() < 0.5)
    found = {kind: faults for kind, faults in _faults(program, losses).items() if faults and faulty}
    if not found:
        return program
    kind = rng.choice(list(found))
    what, steps = rng.choice(found[kind])
    members = program.members(rng.randrange(W))
    ranks = rng.sample(members, rng.randint(1, len(members) - 1))
    return replace(program, fault=Fault(kind, what, tuple(sorted(ranks)), steps))


def without_checkpoints(program):
    """Checkpoints nothing: where nobody sees a fault, one rank alone could find that it recomputes something else."""
    plain = tuple(replace(step, checkpointed=False) for step in program.steps)
    fault = program.fault
    if fault is not None:
        fault = fault._replace(steps=tuple(replace(step, checkpointed=False) for step in fault.steps))
    return replace(program, steps=plain, fault=fault)


def _faults(program, losses):
    """Lists all faults that a program allows, by their kind."""
    steps = program.steps
    calls = [i for i, step in enumerate(steps) if step.synchronised]
    passes = [i for i, step in enumerate(steps) if step.op in ("backward", "penalty")]
    backwards = [i for i in passes if steps[i].op == "backward"]
    return {
        "swap calls": [_swapped(steps, i, j) for i, j in itertools.combinations(calls, 2) if _differ(steps, i, j)],
        "swap passes": [
            _swapped(steps, i, j) for i, j in itertools.combinations(passes, 2) if _passes_differ(steps, i, j, losses)
        ],
        "other layer": [fault for i in calls for fault in _other_layers(program, i)],
        "other pass": [
            _put(steps, i, steps[j])
            for i, j in itertools.permutations(backwards, 2)
            if _replaceable(steps, i, losses[steps[i].args[0]], j, losses[steps[j].args[0]])
        ],
        "setting": [fault for i in calls for fault in _settings(program, i)],
    }


def _independent(steps, i, j):
    """Whether steps i < j may change places."""
    between = steps[i:j]
    made, copied = {step.out for step in between}, any(step.op == "copy" for step in between)
    read = {name for step in between[1:] for name in step.args}
    return not copied and made.isdisjoint(steps[j].args) and steps[i].out not in read


def _differ(steps, i, j):
    one, two = steps[i].layers, steps[j].layers
    if not _in_eval(steps).isdisjoint(one + two):
        return False
    names = {layers[0].removeprefix("copy.") for layers in (one, two)}
    return len(one) == len(two) and len(names) == 2 and _independent(steps, i, j)


def _passes_differ(steps, i, j, losses):
    """Passes through the same calls may change places: backward is linear, so the sum is the same. A penalty is not."""
    one, two = (losses[steps[k].args[0]] for k in (i, j))
    quiet = not any(step.communicates for step in steps[i + 1 : j])
    linear = steps[i].op == steps[j].op == "backward"
    differ = one.nodes != two.nodes or (linear and one.plain != two.plain)
    return quiet and differ and bool(one.nodes and two.nodes) and _independent(steps, i, j)


def _replaceable(steps, i, one, j, two):
    """Whether backward pass j can stand at i: as many messages, but others."""
    known = any(step.out == steps[j].args[0] for step in steps[:i])
    return known and one.plain and two.plain and len(one.nodes) == len(two.nodes) and one.nodes != two.nodes


def _in_eval(steps):
    """The layers of which the running statistics must not move, see ``_Drawing.allows``."""
    return {name for step in steps if step.how == "eval" for name in step.layers}


def _swapped(steps, i, j):
    swapped = list(steps)
    swapped[i], swapped[j] = steps[j], steps[i]
    return f"'{steps[i]}' and '{steps[j]}' change places", tuple(swapped)


def _put(steps, i, *instead):
    what = f"'{'; '.join(map(str, instead))}' in place of '{steps[i]}'"
    return what, (*steps[:i], *instead, *steps[i + 1 :])


def _other_layers(program, i):
    steps, own = program.steps, program.steps[i].layers
    copied = any(step.op == "copy" for step in steps[:i])
    for place, name in enumerate(own):
        for other in program.settings:
            if other != name.removeprefix("copy."):
                for name_there in (other, f"copy.{other}")[: 1 + copied]:
                    layers = (*own[:place], name_there, *own[place + 1 :])
                    if name_there not in _in_eval(steps):
                        yield _put(steps, i, replace(steps[i], layers=layers))


def _settings(program, i):
    """Another setting for one call. Where that would change what is recomputed, a rank could fail alone: not eps."""
    step = program.steps[i]
    for place, name in enumerate(step.layers):
        options = program.settings[name.removeprefix("copy.")]
        for how, value in (("eps", 2 * options["eps"]), ("momentum", 0.3)):
            last = name not in (*step.layers[:place], *step.layers[place + 1 :]) and place + 1 == len(step.layers)
            if how == "momentum" or last or not step.checkpointed:
                change = Step("set", layers=(name,), how=how, value=value)
                yield _put(program.steps, i, change, step, replace(change, value=options[how]))
