# SPDX-License-Identifier: BSD-3-Clause
"""A program of a test, in a file of its own."""

import pytest


@pytest.fixture
def program(tmp_path):
    """Writes a Python program and gives its path."""

    def write(text):
        path = tmp_path / "a program.py"
        path.write_text(text)
        return path

    return write
