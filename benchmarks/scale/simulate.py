# SPDX-License-Identifier: BSD-3-Clause
"""Builds replay.c and runs it under smpirun, on a simulated machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale import wires

HERE = Path(__file__).parent
PLATFORMS = ("fat_tree_nvlink", "fat_tree_shared_memory", "ethernet")
SUMS = ("sum_doubling", "sum_nodes")
GATHERS = ("gather_ring", "gather_doubling", "gather_leaders", "gather_slices")
PER_NODE = 8
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
"""What is simulated. Every platform file has 512 nodes."""
WHOLE_RINGS, ROUNDS = 128, 24
"""On more ranks than the first a ring is stopped after the second and scaled: that is within 0.6 % at 128 ranks."""
ALL_GATHERS = 512
"""On more ranks only the ring is simulated, and the gather that was the best for every width on 16 to so many ranks of
every platform: half of the time."""
LIMIT = 3600
"""Seconds that one simulation may take."""

# The defaults of SimGrid 3.32 are those of a TCP cluster: factors to 1 ("1" alone crashes it), no cross traffic of
# acknowledgements. 0.25 us for a send and a receive; eager up to 16 kB; what the processor does is said by replay.c.
SETTINGS = {
    "smpi/simulate-computation": "no",
    "smpi/lat-factor": "0:1",
    "smpi/bw-factor": "0:1",
    "network/crosstraffic": "no",
    "smpi/wtime": "0",
    "smpi/os": "0:0.25e-6:0",
    "smpi/ois": "0:0.25e-6:0",
    "smpi/or": "0:0.25e-6:0",
    "smpi/async-small-thresh": "16384",
    "smpi/send-is-detached-thresh": "16384",
    "contexts/stack-size": "128",
}


class MissingError(RuntimeError):
    """SimGrid's SMPI is not installed."""


def problem() -> str:
    """Returns why nothing can be simulated here, and what to do; or an empty string."""
    missing = [name for name in ("smpicc", "smpirun") if shutil.which(name) is None]
    if not missing:
        return ""
    return (
        f"The simulation needs SimGrid's smpicc and smpirun; {' and '.join(missing)} not found. On Debian and Ubuntu: "
        "apt-get install -y libsimgrid-dev (190 MB)."
    )


def version() -> str:
    """Returns SimGrid's version, as "SimGrid 3.32"."""
    done = subprocess.run(["smpirun", "-version"], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace("SimGrid version", "SimGrid")


def build(folder: Path) -> Path:
    """Compiles the program into a folder and returns its path.

    Raises:
        MissingError: without SimGrid.
        RuntimeError: if it does not compile.
    """
    if why := problem():
        raise MissingError(why)
    folder.mkdir(parents=True, exist_ok=True)
    program = folder.resolve() / "replay"
    sources = [str(HERE / name) for name in ("replay.c", "collectives.c")]
    _run(["smpicc", "-O2", "-std=gnu11", "-Wall", "-Wextra", *sources, "-lm", "-o", str(program)], 120)
    return program


def replay(program: Path, platform: str, ranks: int, words: Iterable[object], **settings: str) -> list[str]:
    """Runs the program on so many ranks of a platform, and returns the lines that it prints."""
    if ranks > RANKS[-1]:
        raise ValueError(f"The platforms have {RANKS[-1]} ranks at most; received {ranks}.")
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
        hosts.writelines(f"node-{i // PER_NODE}\n" for i in range(ranks))
        hosts.flush()
        chosen = SETTINGS | {name.replace("__", "/").replace("_", "-"): text for name, text in settings.items()}
        command = [
            "smpirun",
            "-np",
            str(ranks),
            "-no-privatize",
            "-platform",
            str(HERE / "platforms" / f"{platform}.xml"),
        ]
        command += ["-hostfile", hosts.name, "--log=root.thres:error", *(f"--cfg={k}:{v}" for k, v in chosen.items())]
        return _run([*command, str(program), *map(str, words)], LIMIT).split()


def _run(command: list[str], limit: int) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@dataclass(frozen=True)
class Job:
    """One simulation: every message that an algorithm carries, of every width, on one platform."""

    platform: str
    ranks: int
    algorithm: str

    @property
    def messages(self) -> list[str]:
        """What the algorithm carries: sums or the gather."""
        gathers = self.algorithm in GATHERS
        return [message for message in wires.MESSAGES if (message == wires.GATHERED) is gathers]

    def run(self, program: Path) -> dict[str, dict[int, float]]:
        """Returns the microseconds by width, of each message."""
        whole = self.algorithm != "gather_ring" or self.ranks <= WHOLE_RINGS
        scale = 1.0 if whole else (self.ranks - 1) / ROUNDS
        lengths = [wires.message_bytes(message, C) for message in self.messages for C in wires.widths()]
        words = ["time", self.algorithm, PER_NODE, 0 if whole else ROUNDS, *lengths]
        lines = iter(replay(program, self.platform, self.ranks, words))
        return {message: {C: float(next(lines)) * scale for C in wires.widths()} for message in self.messages}


def jobs(ranks: int, platforms: Iterable[str] = PLATFORMS) -> list[Job]:
    """Returns the simulations of RANKS up to so many, the small ones first."""
    return [Job(name, n, kind) for n in RANKS if n <= ranks for name in platforms for kind in (*SUMS, *gathers(n))]


def gathers(ranks: int) -> tuple[str, ...]:
    """Returns the gathers that are simulated on so many ranks."""
    return GATHERS if ranks <= ALL_GATHERS else ("gather_ring", "gather_slices")


def whole_step(program: Path, platform: str, ranks: int, algorithm: str, **options: float) -> float:
    """Returns the microseconds of a step that does its all-reduces one after the other, as training does.

    Args:
        program: of :func:`build`.
        platform: one of PLATFORMS.
        ranks: W.
        algorithm: one of SUMS.
        **options: group (default: W), sigma and seconds of the work between (default: 0), seed.
    """
    layers = [C for C, n in wires.widths().items() for _ in range(n)]
    lengths = [wires.message_bytes("syncbn forward", C) for C in layers]
    lengths += [wires.message_bytes("syncbn backward", C) for C in reversed(layers)]
    given = {"group": ranks, "sigma": 0, "seconds": 0, "seed": 1} | options
    words = ["step", algorithm, PER_NODE, *(given[name] for name in ("group", "sigma", "seconds", "seed")), *lengths]
    return float(replay(program, platform, ranks, words)[0])
