# SPDX-License-Identifier: BSD-3-Clause
"""Prints the folder of ``warm.commands()`` and keeps its process until stdin ends: tests/run.sh has one for all stages."""

import sys

from tests.warm import commands

sys.stdout.write(f"{commands()}\n")
sys.stdout.flush()
sys.stdin.read()
