# SPDX-License-Identifier: BSD-3-Clause
"""``syncbn.join``: ranks with fewer steps than others. Begin with ``joining.py``."""
