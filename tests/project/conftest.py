# SPDX-License-Identifier: BSD-3-Clause
"""A program of a test, in a file of its own; the pages as a site."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import processes


@pytest.fixture
def program(tmp_path):
    """Writes a Python program and gives its path."""

    def write(text):
        path = tmp_path / "a program.py"
        path.write_text(text)
        return path

    return write


class Site(NamedTuple):
    """The built pages, and what the build said."""

    folder: Path
    done: subprocess.CompletedProcess


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Builds the site once."""
    folder = tmp_path_factory.mktemp("site")
    done = processes.run("mkdocs", "build", "--strict", "--site-dir", folder, NO_MKDOCS_2_WARNING=1)
    return Site(folder, done)
