# SPDX-License-Identifier: BSD-3-Clause
"""``syncbn bench``: the layer beside torch's, and beside what people use instead."""
