# SPDX-License-Identifier: BSD-3-Clause
"""The step across processes. ``base.py`` is the contract, ``choose`` resolves a group to a live transport.

A library is imported when it is chosen, never before: importing ``mpi4py.MPI`` runs MPI_Init.
"""

from syncbn.transports.base import AbstractTransport
from syncbn.transports.choices import CHOICES, Choice, explain
from syncbn.transports.dispatch import adopt, choose, discard, free, over_mpi

__all__ = ["CHOICES", "AbstractTransport", "Choice", "adopt", "choose", "discard", "explain", "free", "over_mpi"]
