# SPDX-License-Identifier: BSD-3-Clause
"""Measurements of the project itself. Not a part of the installed package: run them from a checkout."""
