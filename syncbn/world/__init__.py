# SPDX-License-Identifier: BSD-3-Clause
"""``syncbn.init``: who started this process, and who connects it with the others."""
