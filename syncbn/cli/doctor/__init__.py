# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn doctor`: what is there, which processes are connected, what is wrong and what to do about it."""
