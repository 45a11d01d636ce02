# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``syncbn doctor``, ``syncbn test`` and ``syncbn bench``."""
