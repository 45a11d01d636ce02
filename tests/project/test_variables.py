# SPDX-License-Identifier: BSD-3-Clause
"""The page of variables has every variable of syncbn, and no other."""

import re

from tests import processes

ROOT = processes.ROOT
PAGE = (ROOT / "docs" / "clusters" / "variables.md").read_text()
NAME = re.compile(r"SYNCBN_[A-Z_]+")
OF_THE_COMPILER = re.compile(r"\bSYNCBN_(?:ISA|X86)\b")
"""Macros that the build sets, in C++ and in setup.py."""


def read_by_the_package():
    """The names in the package's Python and in what builds it, without those of its tests."""
    files = [*(ROOT / "syncbn").rglob("*.py"), ROOT / "setup.py"]
    texts = [OF_THE_COMPILER.sub("", file.read_text()) for file in files]
    return {name for text in texts for name in NAME.findall(text) if not name.startswith("SYNCBN_TEST_")}


def test_the_page_has_each_variable_that_the_package_reads():
    found = read_by_the_package()
    assert {"SYNCBN_TRANSPORT", "SYNCBN_TIMEOUT", "SYNCBN_CXXFLAGS"} <= found
    assert found == set(re.findall(rf"^\| `({NAME.pattern})` \|", PAGE, re.MULTILINE))


def test_the_page_has_each_variable_of_others_that_the_package_reads():
    """Those that a constant names: what launchers set is read by name in one module, and stands in a table there."""
    named = r'^[A-Z_]+(?:, [A-Z_]+)* = "((?:GLOO|MASTER|OMPI|NCCL|MPI4PY)_\w+)"'
    texts = [file.read_text() for file in (ROOT / "syncbn").rglob("*.py")]
    found = {name for text in texts for name in re.findall(named, text, re.MULTILINE)}
    assert found >= {"GLOO_SOCKET_IFNAME", "MASTER_ADDR"}
    assert [name for name in sorted(found) if f"`{name}`" not in PAGE] == []
