# SPDX-License-Identifier: BSD-3-Clause
"""``syncbn bench``: times the layer beside torch's, and beside the usual baseline over gloo."""
