# SPDX-License-Identifier: BSD-3-Clause
"""The page of messages quotes what the package says: who searches it for the words on the screen finds them."""

import ast
import functools
import re

import pytest

from tests import processes

PAGE = (processes.ROOT / "docs" / "clusters" / "messages.md").read_text()
OURS = "".join(part for part in PAGE.split("\n## ") if part.startswith("syncbn: "))
UNKNOWN = "\0"
"""Stands in a text for what is known only when it is printed."""
LITERAL = 4
"""Words that a message has at least beside its values."""


def trees(folder):
    return [ast.parse(file.read_text()) for file in (processes.ROOT / folder).rglob("*.py")]


@functools.cache
def filled():
    """The f-strings of the package, with its constants filled in: those of the module, else the only one of a name."""
    found, modules = [], [(tree, _constants(tree)) for tree in trees("syncbn")]
    values = [item for _, constants in modules for item in constants.items()]
    only = {name: value for name, value in values if {v for n, v in values if n == name} == {value}}
    for tree, constants in modules:
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr))
        found += [_filled(node, only | constants) for node in nodes]
    return "\n".join(found)


def _constants(tree):
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)}
    return found


@functools.cache
def texts():
    """The other texts of the package, and what the tests expect of errors."""
    nodes = [node for folder in ("syncbn", "tests") for tree in trees(folder) for node in ast.walk(tree)]
    found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    compiled = [file.read_text() for file in (processes.ROOT / "syncbn" / "transports").glob("*.cpp")]
    return "\n".join([*found, *(re.sub(r'"\s*"', "", text) for text in compiled)]).replace("\\", "")


def _filled(text, constants):
    parts = []
    for part in text.values:
        value = getattr(part, "value", None)
        name = getattr(value, "id", None) or getattr(value, "attr", None)
        parts.append(part.value if isinstance(part, ast.Constant) else constants.get(name, UNKNOWN))
    return "".join(parts)


def is_said(words, values=2):
    """Whether some text has these words, of which up to two runs of three at most are values."""
    text = " ".join(words)
    if text in filled() or (UNKNOWN not in text and text in texts()):
        return True
    spans = [(i, j) for i in range(len(words)) for j in range(i + 1, min(i + 3, len(words)) + 1)]
    return values > 0 and any(
        is_said([*words[:i], UNKNOWN, *words[j:]], values - 1)
        for i, j in spans
        if UNKNOWN not in words[i:j] and len(words) - (j - i) >= LITERAL
    )


@pytest.mark.parametrize("heading", re.findall(r"^### (.*)$", OURS, re.MULTILINE))
def test_a_message_of_the_page_is_one_of_the_package(heading):
    assert [part for part in heading.split("...") if not is_said(part.split())] == []


def test_another_text_is_not_one_of_the_package():
    assert not is_said(["needs", "a", "sample", "on", "each", "rank"])
    assert not is_said(["All", "ranks", "must", "be", "in", "two", "calls"])
    assert is_said(["World.check", "needs", "the", "same", "layers", "on", "every", "rank"])
