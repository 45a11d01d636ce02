# SPDX-License-Identifier: BSD-3-Clause
"""Prints the folder of ``warm.commands()``, whose process lives until stdin ends: one for all of tests/run.sh."""

import contextlib
import sys

from tests.warm import commands

sys.stdout.write(f"{commands(many=True)}\n")
sys.stdout.flush()
with contextlib.suppress(KeyboardInterrupt):
    sys.stdin.read()
