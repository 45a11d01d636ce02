# SPDX-License-Identifier: BSD-3-Clause
"""`syncbn test`: trains a small network in this job and compares it with the same steps in one process."""
