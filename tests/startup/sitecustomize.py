# SPDX-License-Identifier: BSD-3-Clause
"""Python runs this at its start where tests/run.sh has put this folder on PYTHONPATH.

A fifth of the time of ``import torch`` goes to the garbage collector, which looks 500 times for garbage that is not
there. The suite starts some 400 processes that import torch.
"""

import gc

gc.set_threshold(1_000_000)
