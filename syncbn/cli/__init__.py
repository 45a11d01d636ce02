# SPDX-License-Identifier: BSD-3-Clause
"""The command line: ``syncbn doctor`` and ``syncbn bench``."""
