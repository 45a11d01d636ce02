# SPDX-License-Identifier: BSD-3-Clause
"""As tests/startup, for programs that import torchvision beside a CPU build of torch, see torchvision_ops.py."""

import gc
import runpy
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

gc.set_threshold(1_000_000)
OPERATORS = Path(__file__).parents[1] / "torchvision_ops.py"


class _Declare(MetaPathFinder):
    """Declares the operators of torchvision when it is imported; others find it."""

    kept = None

    def find_spec(self, fullname, path, target=None):
        if fullname == "torchvision" and not _Declare.kept:
            _Declare.kept = [True]  # it looks for torchvision itself
            _Declare.kept.append(runpy.run_path(str(OPERATORS))["declare"]())


sys.meta_path.insert(0, _Declare())
