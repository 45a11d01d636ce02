# SPDX-License-Identifier: BSD-3-Clause
"""What can be wrong with a call, and every message.

*The requirement. What was received, with values and rank. What to do.*
"""
