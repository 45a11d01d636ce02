# SPDX-License-Identifier: BSD-3-Clause
"""The blocks of code of every page run, by the commands that stand there, and print what the page says.

Each page gets an empty folder with the files that it includes from docs/code; syncbn is found as an installed package,
without launch/ and without a clone. Python programs are forks of a process that has imported torch, see tests/warm;
``SYNCBN_TEST_BLOCKS=plain`` starts each as a process of its own. Pages that need a model library run in tests/zoo.
"""

import ast
import re

import pytest

from tests.project import blocks, pages

PAGES = pages.every()
LONGEST, COLUMNS = 78, 106
ELSEWHERE = "not run by our tests: "
"""So begins the title of a block that needs what is not here: a GPU, a cluster, another library."""
RAW = ("benchmarks", "project/contributing", "project/changelog")
ZOO = {"kornia", "monai", "segmentation_models_pytorch", "timm", "torch_geometric", "torchvision", "ultralytics"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_run = pytest.mark.parametrize("page", [p for p in PAGES if p.runs and not p.modules & ZOO], ids=lambda p: p.name)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return blocks.Runner(tmp_path_factory.mktemp("blocks"))


@pytest.mark.program
@pytest.mark.timeout(300)  # a page may have some commands
@each_run
def test_every_command_of_a_page_prints_what_the_page_says(page, runner, tmp_path):
    if page.missing:
        pytest.skip(f"needs {', '.join(page.missing)}")
    wrong = runner.page(page, tmp_path)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.program
def test_a_block_that_fails_or_prints_something_else_is_found(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CODE", tmp_path)
    (tmp_path / "a.py").write_text("print('one')\nimport nobody_has_this")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.py").write_text("import sys\nimport syncbn\nprint(syncbn.init().size, *sys.argv[1:])")
    (tmp_path / "b.txt").write_text("2 x\n3 x\n")
    command = '```bash\n{}\n```\n```text\n--8<-- "{}.txt"\n```\n'
    page = tmp_path / "page.md"
    page.write_text(
        '```python\n--8<-- "a.py"\n--8<-- "b.py"\n```\n'
        + command.format("python a.py", "a")
        + command.format("torchrun --nproc-per-node 2 b.py x", "b")
    )
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    where = tmp_path / "where"
    where.mkdir()
    fails, differs = runner.page(pages.read(page), where)
    assert fails.startswith("page, line 5: python a.py\nstatus 1\n--- stdout\none\n--- stderr\nTraceback")
    assert "No module named 'nobody_has_this'" in fails
    assert "torchrun --nproc-per-node 2 b.py x\nstatus 0\n--- stdout\n2 x\n2 x\n" in differs
    assert "--- the page says\n2 x\n3 x" in differs


@pytest.mark.program
def test_a_block_sees_neither_a_clone_nor_what_another_one_left(runner, tmp_path):
    (tmp_path / "a.py").write_text("import os, syncbn\nsyncbn.here = 1\nprint(os.listdir())\nimport tests")
    (tmp_path / "b.py").write_text("import sys, syncbn\nprint(hasattr(syncbn, 'here'), sys.argv, __file__, __name__)")
    first, second = (runner.command(f"python {name}.py", tmp_path) for name in "ab")
    assert sorted(ast.literal_eval(first.stdout)) == ["a.py", "b.py"]
    assert first.stderr.endswith("ModuleNotFoundError: No module named 'tests'\n")
    assert second.stdout == f"False ['b.py'] {tmp_path / 'b.py'} __main__\n"


@each_page
def test_what_a_page_includes_is_there(page):
    assert [line for block in page.blocks for line in block.shown if pages.INCLUDED.match(line)] == []


@each_page
def test_every_program_that_a_page_shows_is_run_by_a_command(page):
    words = {word for command in page.commands() for word in command.split()}
    elsewhere = {word for other in PAGES for command in other.commands() for word in command.split()}
    assert [name for name in page.whole if name not in words] == []
    assert [name for name in page.files if name.endswith(".py") and name not in elsewhere] == []


@each_page
def test_code_of_a_page_is_a_file_or_says_why_not(page):
    if page.name in RAW or page.name.startswith("decisions/"):
        return
    loose = [b for b in page.blocks if b.language == "python" and not b.included and f'"{ELSEWHERE}' not in b.info]
    assert [f"line {block.line}" for block in loose] == []


@each_page
def test_code_and_commands_of_a_page_are_not_wider_than_a_block(page):
    if page.name in RAW or page.name.startswith("decisions/"):
        return
    wide = [line for block in page.blocks for line in block.shown if len(line) > LONGEST]
    code = {line for block in page.blocks if block.language in ("python", "bash", "yaml") for line in block.shown}
    assert [line for line in wide if line in code or line.startswith((">>>", "..."))] == []


@each_page
def test_tables_of_an_output_fit_on_a_wide_screen(page):
    """A longer line is wrapped there, as by a terminal, which a table does not bear."""
    lines = [line for block in page.blocks for line in block.shown if re.fullmatch(r"[-| ]*-{3}[-| ]*", line)]
    assert [len(line) for line in lines if len(line) > COLUMNS] == []


def test_every_file_is_on_a_page():
    shown = {name for page in PAGES for block in page.blocks for name, _ in block.included}
    files = {str(file.relative_to(pages.CODE)) for file in pages.CODE.rglob("[!.]*") if file.is_file()}
    assert sorted(files - shown - {"ruff.toml"}) == []
