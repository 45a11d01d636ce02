# SPDX-License-Identifier: BSD-3-Clause
"""Pages of the site about model libraries: their commands print what the pages say, as tests/project/test_blocks.py."""

from pathlib import Path

import pytest

from tests.project import blocks, pages
from tests.project.test_blocks import ZOO

PAGES = [page for page in pages.every() if page.runs and page.modules & ZOO]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return blocks.Runner(tmp_path_factory.mktemp("blocks"), startup=Path(__file__).parent / "startup")


@pytest.mark.program
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_prints_what_the_page_says(page, runner, tmp_path):
    if page.missing:
        pytest.skip(f"needs {', '.join(page.missing)}")
    wrong = runner.page(page, tmp_path)
    assert not wrong, "\n\n".join(wrong)
