# SPDX-License-Identifier: BSD-3-Clause
"""What one rank of ``fault_program.py`` does while the others train on.

Each takes the ``Job`` of that rank, after its good steps.
"""

import io
import os
import signal
import sys
import time

import torch
from torch import nn

import syncbn

FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


@fault
def none(job):
    pass


@fault
def exception(job):
    raise ValueError("no such image")


@fault
def kill(job):
    os.kill(os.getpid(), signal.SIGKILL)


@fault
def stop(job):
    os.kill(os.getpid(), signal.SIGSTOP)


@fault
def exits(job):
    sys.exit(0)


@fault
def exits_at_once(job):
    os._exit(3)


@fault
def segfault(job):
    os.kill(os.getpid(), signal.SIGSEGV)


@fault
def sleep(job):
    time.sleep(1000)


@fault
def fewer(job):
    job.steps = job.good_steps


@fault
def caught(job):
    """An exception inside a forward that the loop catches: this rank goes on with its next batch."""

    def fails(module, args):
        handle.remove()
        raise ValueError("a bad sample")

    handle = job.net.right[0].register_forward_pre_hook(fails)
    job.catches = (ValueError,)


@fault
def skips(job):
    job.net.order.remove("left")


@fault
def skips_last(job):
    job.net.order.remove("wide")


@fault
def twice(job):
    job.net.order.insert(0, "left")


@fault
def swaps(job):
    job.net.order = ["right", "left", "wide"]


@fault
def swaps_other_width(job):
    job.net.order = ["left", "wide", "right"]


@fault
def no_backward(job):
    job.backward = lambda losses: None


@fault
def some_gradients(job):
    job.backward = lambda losses: torch.autograd.grad(losses["wide"], job.net.wide[0].weight)


@fault
def backward_twice(job):
    def twice(losses):
        loss = sum(losses.values())
        loss.backward(retain_graph=True)
        loss.backward()

    job.backward = twice


@fault
def backward_order(job):
    def other(losses):
        losses["left"].backward(retain_graph=True)
        (losses["right"] + losses["wide"]).backward()

    job.backward = other


@fault
def evaluates(job):
    job.model.eval()


@fault
def freezes(job):
    syncbn.freeze(job.net)


@fault
def freezes_one(job):
    syncbn.freeze(job.net.left)


@fault
def no_grad(job):
    inner = job.step

    def step():
        with torch.no_grad():
            inner()

    job.step = step


@fault
def eps(job):
    job.net.left[1].eps = 1e-3


@fault
def momentum(job):
    job.net.left[1].momentum = 0.5


@fault
def dtype(job):
    """float64 reaches one layer of this rank."""
    job.net.left.double()
    job.net.left.register_forward_pre_hook(lambda module, args: args[0].double())


@fault
def width(job):
    job.net.left[0] = nn.Conv2d(4, 5, 1)


@fault
def out_of_memory(job):
    def fails(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job.net.right[0].register_forward_pre_hook(fails)


@fault
def no_memory(job):
    def fails(module, args):
        raise MemoryError

    job.net.right[0].register_forward_pre_hook(fails)


@fault
def checkpoint(job):
    """A checkpoint of which this rank reads only a part."""
    file = io.BytesIO()
    torch.save(job.net.state_dict(), file)
    job.net.load_state_dict(torch.load(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2])))


@fault
def averages(job):
    """This rank is in World.average_gradients while the others are in a layer."""
    job.world.average_gradients(job.net)


@fault
def average_of_a_number(job):
    job.world.average(1.0)


@fault
def barrier(job):
    job.world.barrier()


@fault
def interrupted(job):
    """Ctrl-C: the terminal sends SIGINT to every process. The test does it, since all ranks run on."""
    job.step = lambda: time.sleep(1000)
