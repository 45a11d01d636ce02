# SPDX-License-Identifier: BSD-3-Clause
"""The errors of a call.

An error names the requirement, what was received with values and rank, and what to do.
"""
