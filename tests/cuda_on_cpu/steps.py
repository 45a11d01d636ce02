# SPDX-License-Identifier: BSD-3-Clause
"""The four steps for a few shapes, as a program of its own: run under a sanitizer by kernels/cuda/test_sanitizers.py.

LD_PRELOAD=$(gcc -print-file-name=libtsan.so) python -m tests.cuda_on_cpu.steps LIBRARY
"""

import sys

import torch

from syncbn.kernels.base import Parameters
from syncbn.kernels.cuda.ops import CupyKernels
from syncbn.moments import Message, Running, Status
from tests.cuda_on_cpu import EmulatedLauncher

# Several blocks a group with tails; one block a group; fewer channels than a pack holds; an empty local batch; no
# channels.
SHAPES = [(3, 5, 9, 8), (40, 7), (2, 3, 24, 25), (9, 2, 5, 5), (0, 3), (4, 0)]
HERE, ELSEWHERE = (Message((1, serial, 5, 7), 1, "a layer", 0, serial) for serial in (1, 2))


def main(library):
    k = CupyKernels(EmulatedLauncher(library=library), threads=16)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, grad_y = torch.randn(2, *shape, dtype=dtype)
            for channels_last in (False, True):
                if channels_last:
                    x, grad_y = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad_y))
                ones = torch.ones(shape[1])
                running = Running(ones.clone(), ones.clone(), torch.tensor(2), None)
                messages = (HERE, ELSEWHERE) if dtype == torch.float32 else (HERE,)  # the second is a deferred error
                for message in messages:
                    wire = k.local_moments(x, None, HERE.numbers, Status())
                    _, stats = k.normalize(x, wire, Parameters(ones, ones, 1e-5, running), message)
                    wire, _, _ = k.backward_sums(grad_y, x, stats, HERE.numbers, dtype, dtype)
                    k.backward_input(grad_y, x, None, wire, ones, stats, message)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
