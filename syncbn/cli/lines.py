# SPDX-License-Identifier: BSD-3-Clause
"""Text of at most 100 columns, in which no command is broken over two lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

WIDTH = 100
_KEPT = re.compile(r'`[^`\n]*`|pip install "[^"\n]*"')
"""What a person copies."""
_SPACE = "\0"


def wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    """Wraps each line of a text.

    Args:
        text: one or more lines.
        first: what begins the first line.
        rest: what begins the others; None for as many spaces.
    """
    rest = " " * len(first) if rest is None else rest
    kept = _KEPT.sub(lambda found: found[0].replace(" ", _SPACE), text)
    lines: list[str] = []
    for line in kept.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        begin = rest if lines else first
        lines += textwrap.wrap(
            line,
            WIDTH,
            initial_indent=begin,
            subsequent_indent=rest + indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [begin.rstrip()]
    return "\n".join(lines).replace(_SPACE, " ")


def facts(rows: Sequence[tuple[str, str]], indent: str = "") -> str:
    """Renders names with their texts, the texts in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(wrapped(text, f"{indent}{name:<{width}}  ") for name, text in rows)
