# SPDX-License-Identifier: BSD-3-Clause
"""The four steps for a few shapes, as a program of its own: run under a sanitizer by test_cuda_kernels.py.

LD_PRELOAD=$(gcc -print-file-name=libtsan.so) python -m tests.cuda_on_cpu.steps LIBRARY
"""

import sys

import torch

from syncbn.kernels.cupy_ops import CupyKernels
from syncbn.moments import Running, Status
from tests.cuda_on_cpu import EmulatedLauncher

# Several blocks a group with tails; one block a group; fewer channels than a pack holds; an empty share.
SHAPES = [(3, 5, 9, 8), (40, 7), (2, 3, 30, 31), (9, 2, 5, 5), (0, 3)]


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
                _, stats = k.normalize(x, k.local_moments(x, Status()), ones, ones, running, 1e-5, 2.0)
                wire, _, _ = k.backward_sums_and_gradients(grad_y, x, stats, dtype, dtype)
                k.backward_input(grad_y, x, wire, ones, stats)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
