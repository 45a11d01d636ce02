# SPDX-License-Identifier: BSD-3-Clause
"""What stands on the pages of the site: blocks of code, the files that they include, and commands."""

import ast
import functools
import importlib.util
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from tests import processes

DOCS = processes.ROOT / "docs"
CODE = DOCS / "code"
"""Programs that pages include, and what these print."""
INCLUDED = re.compile(r"""^\s*-{1,}8<-{1,} ["']([^"':]+)(?::([^"']+))?["']$""")
MARKER = re.compile(r"-{1,}8<-{1,} \[(?:start|end):")
FENCE = re.compile(r"^(\s*)(```+)\s*(\w*)\s*(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block as it stands on a page."""

    language: str
    info: str
    """What follows the language, such as a title."""
    lines: list[str]
    line: int

    @functools.cached_property
    def included(self):
        """Files that the block includes, each with the part that it takes, or None for all of it."""
        return [match.groups() for match in map(INCLUDED.match, self.lines) if match]

    @property
    def shown(self):
        """The lines that a reader sees."""
        return [line for each in self.lines for line in _expanded(each)]


@dataclass(frozen=True)
class Run:
    """Commands of one block, and what the page says that they print."""

    commands: list[str]
    promised: str | None
    line: int


@dataclass(frozen=True)
class Page:
    """A page of the site."""

    path: Path
    blocks: list[Block] = field(repr=False)

    @property
    def name(self):
        """As in the navigation, without its end."""
        return str(self.path.relative_to(DOCS).with_suffix(""))

    @functools.cached_property
    def files(self):
        """Files of the page, without what they print: what a reader has who copies each block into one."""
        names = [name for block in self.blocks for name, _ in block.included]
        return sorted({name for name in names if not name.endswith(".txt") and (CODE / name).exists()})

    @functools.cached_property
    def whole(self):
        """Programs of the page that it shows from the first to the last line."""
        return sorted({n for block in self.blocks for n, part in block.included if part is None and n.endswith(".py")})

    @functools.cached_property
    def runs(self):
        """Commands that name a file of the page."""
        found = [self._run(at) for at, block in enumerate(self.blocks) if block.language == "bash"]
        return [run for run in found if run.commands]

    @functools.cached_property
    def modules(self):
        """Packages that programs of the page import."""
        trees = [ast.walk(ast.parse((CODE / name).read_text())) for name in self.files if name.endswith(".py")]
        nodes = [node for tree in trees for node in tree]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        return {name.split(".")[0] for name in names} - {Path(name).stem for name in self.files}

    @property
    def missing(self):
        """Packages that are not installed here."""
        return sorted(name for name in self.modules if importlib.util.find_spec(name) is None)

    def commands(self):
        """All of them."""
        return [command for run in self.runs for command in run.commands]

    def _run(self, at):
        commands = [line for line in _commands(self.blocks[at]) if any(_names(line, name) for name in self.files)]
        after = self.blocks[at + 1] if at + 1 < len(self.blocks) else None
        text = after is not None and after.language == "text" and not after.info
        return Run(commands, "\n".join(after.shown) if text else None, self.blocks[at].line)


def _commands(block):
    """Lines of a block; one that ends with a backslash goes on."""
    text = "\n".join(block.shown).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _names(command, file):
    return file in shlex.split(command, comments=True)


def _expanded(line):
    """The lines that MkDocs puts in the place of one; this one, where there are none."""
    match = INCLUDED.match(line)
    if not match:
        return [line]
    name, part = match.groups()
    file = next((folder / name for folder in (CODE, processes.ROOT) if (folder / name).exists()), None)
    lines = file.read_text().splitlines() if file else []
    if part:
        begin, end = (next((n for n, s in enumerate(lines) if f"[{w}:{part}]" in s), -1) for w in ("start", "end"))
        lines = lines[begin + 1 : end]
    return [text for text in lines if not MARKER.search(text)] or [line]


def read(path):
    """Reads a page."""
    blocks, begun = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = FENCE.match(line)
        if begun is None and match:
            begun = (*match.groups(), number, [])
        elif begun is not None and line.strip() == begun[1]:
            indent, _, language, info, at, lines = begun
            blocks.append(Block(language, info, [text.removeprefix(indent) for text in lines], at))
            begun = None
        elif begun is not None:
            begun[-1].append(line)
    assert begun is None, f"{path}: the block of line {begun[4]} does not end"
    return Page(path, blocks)


def every():
    """All pages of the site."""
    return [read(path) for path in sorted(DOCS.glob("**/*.md"))]
