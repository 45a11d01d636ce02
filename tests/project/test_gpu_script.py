# SPDX-License-Identifier: BSD-3-Clause
"""launch/gpu.sh runs its jobs within their limits, says how each ended, and keeps what they said."""

import contextlib
import os
import re
import shutil
import signal
import tarfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests import processes
from tests.project.launched import LAUNCH, LIMIT

pytestmark = pytest.mark.program


# Stands in for the Python of gpu.sh: what it is told to run says how it ends.
GPU_PYTHON = """#!/bin/bash
echo "$SYNCBN_TEST_DEVICE $NPROC: $*"
case "$*" in
    "-c import pytest_mpi") exit {pytest_mpi} ;;
    "-m pip"*) mkdir -p "$RESULTS/site/lib/python3.12/site-packages" && exit {pip} ;;
    *test_layer.py*)
        echo "tests/test_layer.py::test_a "
        [ -z "$NAP" ] || sleep "$NAP"
        [ {layer} = 0 ] || echo "FAILED tests/test_layer.py::test_a[(5, 3)] - AssertionError: 1 | 2"
        echo "===== 1 failed, 2 passed in 3.00s ====="
        exit {layer}
        ;;
    *"-m not program and not slow tests/multiprocess") echo "===== 5 passed in 1.00s =====" ;;
    *) echo "$LD_LIBRARY_PATH $PYTHONPATH" ;;
esac
"""
TOOLS = (
    *("bash", "cat", "cut", "dirname", "env", "grep", "gzip", "head", "mkdir", "mv", "rm"),
    *("seq", "sleep", "tail", "tar", "timeout", "xargs"),
)
GPU_FILES = (
    *("syncbn/__init__.py", "benchmarks/gpu/__main__.py", "benchmarks/gpu/variants.py", "tests/gpu/stress.py"),
    *("tests/gpu/test_gpu.py", "tests/gpu/test_nccl.py"),
)
GPU_PARTS = {
    "contact": [
        *("kernels", "cases", "gpu", "nccl", "contract", "alone", "compile"),
        *("torchrun2-bits", "mpirun2-bits"),
    ],
    "bench": ["bench"],
    "ranks": [
        *("mpirun2", "mpirun3", "torchrun2", "torchrun3", "mpirun3-bits", "torchrun3-bits"),
        "mpirun2-compiled",
    ],
    "sanitize": ["memcheck", "racecheck", "synccheck", "initcheck", "stress"],
    "variants": ["variants"],
}
GPU_JOBS = [job for jobs in GPU_PARTS.values() for job in jobs]


class Gpu:
    """gpu.sh in a tree of its own, where the tools on PATH and what they say are ours."""

    def __init__(self, folder, *present, layer=0, pytest_mpi=0, pip=0):
        self.folder, self.results, self.archive = folder, folder / "results", folder / "kept/gpu.tgz"
        for name in ("launch", "bin", *(Path(file).parent for file in GPU_FILES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in GPU_FILES:
            (folder / name).touch()
        shutil.copy(LAUNCH / "gpu.sh", folder / "launch")
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        python = GPU_PYTHON.format(layer=layer, pytest_mpi=pytest_mpi, pip=pip)
        start = '#!/bin/bash\nexec "$PYTHON" "$@"\n'
        texts = {"bin/python": python, "launch/mpirun.sh": start, "launch/torchrun.sh": start}
        for name, text in (texts | {f"bin/{tool}": "#!/bin/bash\necho sanitized\n" for tool in present}).items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def words(self, extra):
        paths = {"PATH": self.folder / "bin", "PYTHON": self.folder / "bin/python"}
        return {**paths, "RESULTS": self.results, "ARCHIVE": self.archive, "OUT": self.folder / "not ours", **extra}

    def run(self, *parts, **extra):
        return processes.run("bash", self.folder / "launch/gpu.sh", *parts, limit=LIMIT, **self.words(extra))

    def start(self, *parts, **extra):
        return processes.start("bash", self.folder / "launch/gpu.sh", *parts, **self.words(extra))

    def packed(self):
        """The files of the archive: name and text."""
        with tarfile.open(self.archive) as archive:
            return {Path(f.name).name: archive.extractfile(f).read().decode() for f in archive if f.isfile()}


def gpu_tables(text):
    """The lines of each table that gpu.sh prints, by job. An empty line ends a table."""
    tables = [part.partition("\n\n")[0].splitlines()[1:] for part in re.split(r"^job  ", text, flags=re.MULTILINE)[1:]]
    return [{line.split()[0]: line for line in table if not line.startswith(" ")} for table in tables]


@pytest.fixture
def gpu(tmp_path):
    return partial(Gpu, tmp_path)


@contextlib.contextmanager
def napping_gpu(gpu):
    """The part contact, with one job that does not end and all others done and packed."""
    tree = gpu("mpirun")
    process, deadline, others = tree.start("contact", NAP=1000), time.monotonic() + LIMIT, GPU_PARTS["contact"]
    family = []
    try:
        want = {f"{job}.result" for job in others} - {"alone.result"}
        while not (tree.archive.exists() and want <= tree.packed().keys()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = processes.descendants(process)
        assert any(p.name() == "sleep" and p.cmdline()[1] == "1000" for p in family)
        yield tree, process, family
    finally:
        for each in [*family, *processes.descendants(process), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate()


def test_gpu_runs_its_five_parts_in_order_and_prints_the_table_after_each(gpu):
    tree = gpu("mpirun", "compute-sanitizer")
    done = tree.run()
    assert done.returncode == 0, done.stdout + done.stderr
    tables = gpu_tables(done.stdout)
    ends = [sum(len(jobs) for jobs in list(GPU_PARTS.values())[:n]) for n in range(1, 6)]
    assert [list(table) for table in tables] == [GPU_JOBS[:end] for end in (1, *ends)]  # once more after kernels
    assert all(" passed " in line for line in tables[-1].values())
    for job in ("mpirun2", "mpirun3", "torchrun2", "torchrun3"):
        assert "5 passed in 1.00s" in tables[-1][job]
    compiled = "-m slow -k not inductor tests/multiprocess/test_compile.py tests/multiprocess/test_combinations.py"
    assert compiled in (tree.results / "mpirun2-compiled.log").read_text()
    assert (tree.results / "mpirun3.log").read_text().startswith("cuda:0 3: -m pytest")
    assert "--with-mpi" in (tree.results / "mpirun3.log").read_text()
    assert "--with-mpi" not in (tree.results / "torchrun3.log").read_text()
    assert (tree.results / "contract.log").read_text().startswith("cuda:0 ")
    assert not (tree.folder / "not ours").exists()


@pytest.mark.parametrize("script", ["launch/gpu.sh", "tests/run.sh", "tests/sanitize.sh"])
def test_the_test_files_that_a_script_names_exist(script):
    text = (processes.ROOT / script).read_text().replace("$several", "tests/multiprocess")
    words = sorted(set(re.findall(r"\btests/[\w/.{},]+", text)))
    named = processes.run("bash", "-c", f"ls -d {' '.join(words)}", limit=LIMIT)
    assert named.returncode == 0, named.stderr
    assert len(words) > 1


def test_gpu_packs_every_log_and_result(gpu):
    tree = gpu("mpirun", "compute-sanitizer")
    done = tree.run()
    files = {f"{job}.{what}" for job in GPU_JOBS for what in ("log", "result")}
    assert tree.packed().keys() == files | {"table.txt"}
    assert tree.packed()["table.txt"] == "\n" + done.stdout[done.stdout.rindex("job  ") :]


def test_gpu_runs_the_parts_it_is_told(gpu):
    done = gpu("mpirun").run("variants", "bench")
    assert done.returncode == 0, done.stderr
    assert [list(table) for table in gpu_tables(done.stdout)] == [["variants"], ["variants", "bench"]]
    assert "-m benchmarks.gpu --repeats 5" in done.stdout  # the log of the benchmark


def test_gpu_refuses_an_unknown_part_before_it_runs_any(gpu):
    tree = gpu()
    done = tree.run("contact", "speed")
    assert done.returncode == 2
    assert done.stderr == (
        "launch/gpu.sh takes contact, bench, ranks, sanitize and variants, or nothing for all; received speed.\n"
    )
    assert not tree.results.exists()


@pytest.mark.parametrize(("status", "result"), [(1, " FAILED "), (124, " TIMEOUT after 110 s "), (137, " FAILED ")])
def test_gpu_ends_with_1_after_all_parts_where_a_job_fails(gpu, status, result):
    done = gpu("mpirun", layer=status).run("contact", "bench")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 1
    assert result in table["alone"]
    assert "1 failed, 2 passed in 3.00s" in table["alone"]
    assert "\n    FAILED tests/test_layer.py::test_a[(5, 3)] - AssertionError: 1 | 2\n" in done.stdout
    assert all(" passed " in line for name, line in table.items() if name != "alone")


@pytest.mark.parametrize("slower", [1, 2])
def test_gpu_ends_a_job_at_its_limit(gpu, slower):
    tree = gpu("mpirun")
    script = tree.folder / "launch/gpu.sh"
    script.write_text(script.read_text().replace("110 alone", "1 alone"))
    done = tree.run("contact", NAP=1000, SLOWER=slower)
    assert done.returncode == 1
    assert f" TIMEOUT after {slower} s " in gpu_tables(done.stdout)[-1]["alone"]
    assert "tests/test_layer.py::test_a" in gpu_tables(done.stdout)[-1]["alone"]  # the test that ran


def test_gpu_says_which_jobs_it_leaves_out_and_why(gpu):
    tree = gpu(pytest_mpi=1)
    done = tree.run(SYNCBN_TEST_DEVICE="cpu")
    table = gpu_tables(done.stdout)[-1]
    ran = {"contract", "alone", "compile", "torchrun2-bits", "torchrun2", "torchrun3", "torchrun3-bits"}
    assert done.returncode == 0
    assert table.keys() == set(GPU_JOBS)
    assert {name for name, line in table.items() if "passed" in line} == ran
    assert all("left out" in table[name] and "no mpirun" in table[name] for name in GPU_JOBS if "mpirun" in name)
    assert all("not on a GPU" in table[name] for name in set(GPU_JOBS) - ran if "mpirun" not in name)
    assert (tree.results / "torchrun2.log").read_text().startswith("cpu 2: ")


def test_gpu_leaves_out_what_a_checkout_or_a_machine_does_not_have(gpu):
    tree = gpu("mpirun")
    (tree.folder / "tests/gpu/test_nccl.py").unlink()
    done = tree.run("contact", "sanitize")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 0
    assert "no tests/gpu/test_nccl.py" in table["nccl"]
    assert "no compute-sanitizer" in table["racecheck"]
    assert " passed " in table["stress"]


def test_gpu_installs_wheels_beside_the_results_and_uses_them(gpu):
    tree = gpu("mpirun")
    done = tree.run("contact", WHEELS="wheels", LD_LIBRARY_PATH="/theirs")
    assert done.returncode == 0, done.stderr
    assert f"--prefix {tree.results}/site wheels/*.whl" in (tree.results / "wheels.log").read_text()
    said = (tree.results / "gpu.log").read_text()
    assert f"{tree.results}/site/lib:/theirs {tree.results}/site/lib/python3.12/site-packages:" in said


def test_gpu_goes_on_where_the_wheels_cannot_be_installed(gpu):
    done = gpu("mpirun", pip=1).run("contact", WHEELS="wheels")
    table = gpu_tables(done.stdout)[-1]
    assert done.returncode == 1
    assert " FAILED " in table["wheels"]
    assert " passed " in table["gpu"]


@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_gpu_ends_all_jobs_when_it_is_stopped_and_keeps_what_they_said(gpu, by, status):
    with napping_gpu(gpu) as (tree, process, family):
        os.killpg(process.pid, by)
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == status, err
        assert processes.survivors(family) == []
        table = gpu_tables(out)[-1]
        assert " stopped " in table["alone"]
        assert "tests/test_layer.py::test_a" in table["alone"]  # the test that ran
        assert " passed " in table["gpu"]
        assert " stopped " in gpu_tables(tree.packed()["table.txt"])[0]["alone"]


def test_gpu_that_is_killed_leaves_what_was_done_in_the_archive(gpu):
    with napping_gpu(gpu) as (tree, process, _):
        process.kill()
        process.wait(LIMIT)
        table = gpu_tables(tree.packed()["table.txt"])[0]
        assert "has not ended" in table["alone"]
        assert all(" passed " in line for name, line in table.items() if name != "alone")
        assert "tests/test_layer.py::test_a" in tree.packed()["alone.log"]
