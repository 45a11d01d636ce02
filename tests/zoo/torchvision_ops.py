# SPDX-License-Identifier: BSD-3-Clause
"""Makes torchvision importable beside a CPU build of torch, and runs a program with that.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its operators do not load, and the import ends with
"operator torchvision::nms does not exist", since it describes the outputs of two of them to torch. Declared without
an implementation they can be described. No network of these tests calls them.

    python -m tests.zoo.torchvision_ops PROGRAM WORDS...
"""

import importlib.util
import runpy
import sys
from functools import cache
from pathlib import Path

import torch

DESCRIBED = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def declare():
    """Declares what torchvision describes, if its own operators do not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return None
    try:
        torch.ops.load_library(str(Path(found.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in DESCRIBED:
            library.define(name + SIGNATURE)
        return library  # whose declarations last as long as it does
    return None


if __name__ == "__main__":
    declare()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
