# SPDX-License-Identifier: BSD-3-Clause
"""What the pages say is true: their code runs, their links lead somewhere, their names exist."""

import ast
import re
import sys
import tomllib

import pytest
import yaml

import syncbn
from tests import processes

ROOT = processes.ROOT
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Not run here: make runs these very tests or takes minutes; pip and git need a network.
NOT_RUN = ("make ", "pip ", "git ")

THEMES = ("gh-light-mode-only", "gh-dark-mode-only")
"""Of a picture: GitHub and MkDocs' theme show it on pages of one kind alone."""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors that MkDocs and GitHub make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture
def train(tmp_path):
    """A folder with the README's example as train.py, and launch/ beside it, as in a clone."""
    (example,) = blocks(README, "python")
    (tmp_path / "train.py").write_text(example)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return tmp_path


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 130
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 13


def test_readme_commands_print_what_it_says_on_one_two_and_three_processes(train):
    commands = [line for block in blocks(README, "bash") for line in block.splitlines()]
    runnable = [line for line in commands if not line.startswith(NOT_RUN)]
    assert [re.sub(r"\W.*", "", line) for line in runnable] == ["python", "NPROC", "NPROC"]
    promised = blocks(README, "text")[-1]
    for command in runnable:
        done = processes.run("bash", "-c", command, cwd=train, limit=60, PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        assert done.stdout == promised, command


def test_readme_example_prints_something_else_without_the_conversion(train):
    program = train / "train.py"
    program.write_text(program.read_text().replace("syncbn.convert_sync_batchnorm(model)\n", ""))
    done = processes.run("bash", "-c", "NPROC=2 launch/mpirun.sh train.py", cwd=train, limit=60, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("running_var ")
    assert done.stdout != blocks(README, "text")[-1]


def test_readme_draws_the_data_flow_of_the_package():
    picture = [line.split() for line in blocks(README, "text")[0].splitlines()]
    assert picture == [line.split() for line in syncbn.__doc__.splitlines() if "all_reduce" in line]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        anchor = anchor if not anchor.startswith("only-") else ""  # the theme shows a picture in light or dark
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in (THEMES if linked.suffix == ".svg" else anchors(linked)), target


@pytest.mark.parametrize("name", NAMES)
def test_code_on_pages_parses(name):
    text = (ROOT / name).read_text()
    for block in blocks(text, "python"):
        ast.parse(block)
    for block in blocks(text, "bash"):
        done = processes.run("bash", "-n", "-c", block.replace("<this repository>", "URL"))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_pages_name_files_that_exist(name):
    """Names in code quotes that look like a file of the repository."""
    folders = [ROOT, ROOT / "syncbn", (ROOT / name).parent]
    quoted = re.findall(r"`([\w./-]+\.(?:py|sh|sbatch|yaml|md|txt))`", (ROOT / name).read_text())
    own = [word for word in quoted if word != "train.py"]
    assert [word for word in own if not any((folder / word).exists() for folder in folders)] == []


def test_launch_readme_documents_every_variable():
    text = (ROOT / "launch" / "README.md").read_text()
    for script in ("mpirun.sh", "torchrun.sh", "slurm.sbatch"):
        settable = re.findall(r"\$\{([A-Z_]+):-", (ROOT / "launch" / script).read_text())
        own = {word for word in settable if not word.startswith(("OMPI_", "PRTE_", "SLURM_"))}
        assert {word for word in own if f"`{word}`" not in text} == set(), script


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    for name in syncbn.__all__:
        assert any(entry.startswith(f"syncbn.{name}") for entry in documented), name


def test_navigation_has_every_page():
    nav = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(nav) == sorted(str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md"))


def test_documentation_builds_strictly_and_without_network_fonts(tmp_path):
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False
    done = processes.run("mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", NO_MKDOCS_2_WARNING=1)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    index = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "fonts.googleapis" not in index
    assert 'id="syncbn.SyncBatchNorm"' in index


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    latest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == syncbn.__version__ == latest.group(1)
