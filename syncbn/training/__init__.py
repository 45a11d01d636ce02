# SPDX-License-Identifier: BSD-3-Clause
"""What training systems ask for, beside the layer."""
