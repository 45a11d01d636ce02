# SPDX-License-Identifier: BSD-3-Clause
"""What the pages say is true: their code runs, their links lead somewhere, their names exist."""

import ast
import re
import tomllib

import pytest

import syncbn
from tests import processes
from tests.project import pages
from tests.project.blocks import HERE

ROOT = processes.ROOT
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Not run here: make runs these very tests or takes minutes; pip and git need a network.
NOT_RUN = ("make ", "pip ", "git ")
THEMES = ("only-light", "only-dark", "gh-light-mode-only", "gh-dark-mode-only")
"""Of a picture: MkDocs' theme, or GitHub and PyPI, show it on pages of one kind alone."""

OF_OTHERS = ("docs/guides/detectron2.md", "docs/guides/torchvision.md")
"""Pages that name files of other repositories."""

IN_A_CLONE = ("clusters/launchers", "concepts/gpu_checks", "benchmarks", "project/contributing")
"""Pages whose commands may use launch/, which an installed package does not have."""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def headings(page):
    """Those of a page, also of the file at the root that it consists of."""
    text = page.read_text()
    for name in re.findall(r"^--8<-- \"(\w+\.md)\"$", text, re.MULTILINE):
        text += (ROOT / name).read_text()
    return re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def anchors(page):
    """The anchors that MkDocs and GitHub make of a page's headings; one that comes again gets a number."""
    found = set()
    for heading in headings(page):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.lower()).strip()
        found |= {name.replace(" ", "-"), re.sub(r"[-\s]+", "-", name)}
    return found


def documented(page):
    """Names whose docstrings a page shows; each is an anchor, and so are those of its members."""
    return tuple(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)) if page.suffix == ".md" else ()


@pytest.fixture
def train(tmp_path):
    """A folder with the README's example as train.py."""
    (example,) = blocks(README, "python")
    (tmp_path / "train.py").write_text(example)
    return tmp_path


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 130
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 13


def test_readme_commands_print_what_it_says_on_one_two_and_three_processes(train):
    commands = [line for block in blocks(README, "bash") for line in block.splitlines()]
    runnable = [line for line in commands if not line.startswith(NOT_RUN)]
    assert [re.sub(r"\W.*", "", line) for line in runnable] == ["python", "torchrun", "mpirun"]
    promised = blocks(README, "text")[-1]
    for command in runnable:
        done = processes.run("bash", "-c", command, cwd=train, limit=60, **HERE)
        assert done.returncode == 0, done.stderr
        assert done.stdout == promised, command


def test_readme_example_prints_something_else_without_the_conversion(train):
    program = train / "train.py"
    program.write_text(program.read_text().replace("syncbn.convert_sync_batchnorm(model)\n", ""))
    done = processes.run("mpirun", "-n", 2, "python", "-m", "mpi4py", "train.py", cwd=train, limit=60, **HERE)
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
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        known = THEMES if linked.suffix == ".svg" else anchors(linked)
        assert not anchor or anchor in known or anchor.startswith(documented(linked) or " "), target


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
    own = [word for word in quoted if word != "train.py"] if name not in OF_OTHERS else []
    assert [word for word in own if not any((folder / word).exists() for folder in folders)] == []


def test_launch_readme_documents_every_variable():
    text = (ROOT / "launch" / "README.md").read_text()
    for script in ("mpirun.sh", "torchrun.sh", "slurm.sbatch"):
        settable = re.findall(r"\$\{([A-Z_]+):-", (ROOT / "launch" / script).read_text())
        own = {word for word in settable if not word.startswith(("OMPI_", "PRTE_", "SLURM_"))}
        assert {word for word in own if f"`{word}`" not in text} == set(), script


@pytest.mark.parametrize("name", syncbn.__all__)
def test_every_public_name_has_a_reference_page(name):
    shown = [entry for page in ROOT.glob("docs/reference/*.md") for entry in documented(page)]
    assert any(entry in (f"syncbn.{name}", f"syncbn.{name}.sync_batch_norm") for entry in shown)


def test_reference_lists_all_its_pages():
    index = (ROOT / "docs/reference/index.md").read_text()
    names = [page.name for page in ROOT.glob("docs/reference/*.md") if page.stem != "index"]
    assert [name for name in names if f"]({name}" not in index] == []


def test_navigation_has_every_page_once():
    nav = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md"))


def test_navigation_has_five_groups():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    groups = ["Start", "Guides", "Clusters", "Concepts", "Reference and project"]
    assert re.findall(r"^  - (.*):$", nav, re.MULTILINE) == groups


@pytest.mark.parametrize("page", pages.every(), ids=lambda page: page.name)
def test_commands_of_a_page_need_no_clone(page):
    if page.name not in IN_A_CLONE and not page.name.startswith("decisions/"):
        commands = [line for block in page.blocks if block.language == "bash" for line in block.shown]
        assert [line for line in commands if "launch/" in line] == []


@pytest.mark.parametrize("page", pages.every(), ids=lambda page: page.name)
def test_a_page_has_no_roles_of_another_language(page):
    assert re.findall(r":(?:class|func|meth|mod|attr):`", page.path.read_text()) == []


@pytest.mark.xdist_group("site")
def test_documentation_builds_strictly_and_without_network_fonts(site):
    assert re.search(r"^  font: false\b", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert site.done.returncode == 0, site.done.stderr
    assert "WARNING" not in site.done.stderr
    index = (site.folder / "reference" / "SyncBatchNorm" / "index.html").read_text()
    assert "fonts.googleapis" not in index
    assert 'id="syncbn.SyncBatchNorm"' in index


@pytest.mark.xdist_group("site")
def test_built_pages_have_no_roles_of_another_language(site):
    """Docstrings come into the reference, with what they say of other names."""
    roles = {str(f.parent.relative_to(site.folder)): f.read_text() for f in site.folder.rglob("index.html")}
    assert [name for name, text in roles.items() if re.search(r":(?:class|func|meth|mod|attr):", text)] == []


def test_links_of_the_package_lead_to_its_public_repository(tmp_path):
    """As a package index shows the README, which has no files beside it."""
    pytest.importorskip("setuptools", "77", reason="as pyproject.toml asks for")
    build = ("python", "setup.py", "-q", "egg_info", "--egg-base", tmp_path)
    done = processes.run(*build, SYNCBN_REPOSITORY="https://host.example/a/syncbn/")
    assert done.returncode == 0, done.stderr
    (written,) = (file.read_text() for file in tmp_path.glob("*/PKG-INFO"))
    assert "Project-URL: Repository, https://host.example/a/syncbn\n" in written
    links = re.findall(r"\]\(([^)\s]+)\)", written) + re.findall(r'(?:src|srcset)="([^"]+)"', written)
    assert [link for link in links if not link.startswith("https://")] == []
    own = {link.removeprefix("https://host.example/a/syncbn/") for link in links if "host.example" in link}
    assert [link for link in own if not (ROOT / re.sub(r"^(blob|raw)/HEAD/|#.*", "", link)).exists()] == []


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    latest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == syncbn.__version__ == latest.group(1)
