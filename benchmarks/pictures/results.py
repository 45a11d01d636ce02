# SPDX-License-Identifier: BSD-3-Clause
"""What was measured: the JSON files in results/."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@functools.cache
def read(name: str) -> Any:
    """Returns the document of a file in results/."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
