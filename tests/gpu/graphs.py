# SPDX-License-Identifier: BSD-3-Clause
"""CUDA graphs whose capture may fail in one test and leave the others alone."""

from contextlib import contextmanager, suppress

import torch


@contextmanager
def capture(graph):
    """Captures into a graph, as torch.cuda.graph does, and leaves no trace of a capture that fails.

    When CUDA refuses to end a capture, torch (2.11 and 2.13) leaves the rest undone: the stream of the capture stays
    current, the allocator still serves its pool, and random numbers wait for the end of the capture, so that every
    later torch.randn raises.
    """
    stream, device, pool = torch.cuda.current_stream(), torch.cuda.current_device(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # unless the capture itself has ended
            torch._C._cuda_endAllocateToPool(device, pool)
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator("cuda"))
        raise
