# SPDX-License-Identifier: BSD-3-Clause
"""What torch.compile and second derivatives need: registered operators, and calls made of them."""
