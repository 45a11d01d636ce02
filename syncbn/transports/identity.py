# SPDX-License-Identifier: BSD-3-Clause
"""Which job this process belongs to, so that it does not train in another one that it reaches at the same port."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import NamedTuple

from syncbn.transports.launchers import Launch

JOB = "SYNCBN_JOB"
"""Any text that all processes of a job have and those of no other job; ``launch/slurm.sbatch`` draws one."""


class Identity(NamedTuple):
    """A job, as its processes know it."""

    name: str
    """For everybody to read."""
    secret: str = ""
    """What only its processes know; empty if nothing gave them one."""

    def __str__(self) -> str:
        """Returns the name, and of the secret just enough to tell two jobs apart."""
        return f"{self.name} with key {self.proof('its name')[:6]}" if self.secret else self.name

    def proof(self, question: str) -> str:
        """Returns what only a process that knows the secret can answer."""
        return hmac.digest(self.secret.encode(), f"{self.name} {question}".encode(), "sha256").hex()

    @property
    def number(self) -> float:
        """52 bits of a hash, for a message of float64 values."""
        hashed = hashlib.sha256(f"{self.name}\0{self.secret}".encode()).digest()
        return float(int.from_bytes(hashed[:8]) >> 12)


def of_job(launch: Launch, environ: Mapping[str, str] = os.environ) -> Identity:
    """Returns the identity of the job that the launcher's variables name, the same in each of its processes.

    Args:
        launch: what the launcher said.
        environ: the variables.
    """
    secret = environ.get(JOB, "")
    if launch.name == "slurm":
        # the parts of a heterogeneous job have numbers of their own, and one leader
        job = environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID", "?")
        cluster = environ.get("SLURM_CLUSTER_NAME", "")
        where = f" of the cluster {cluster}" if cluster else ""
        return Identity(f"step {environ.get('SLURM_STEP_ID', '?')} of Slurm job {job}{where}", secret)
    if launch.name == "torchrun":
        return Identity(f"run {environ['TORCHELASTIC_RUN_ID']!r} of torchrun", secret)
    if launch.name == "openmpi" and "PMIX_NAMESPACE" in environ:
        return Identity(f"run {environ['PMIX_NAMESPACE']} of Open MPI", secret)
    return Identity(f"a job of {launch.size} processes ({launch.name})", secret)
