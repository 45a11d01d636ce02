# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels CPU tensors get: by the environment, and by what was built."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from syncbn import kernels
from tests import processes

pytest.importorskip("syncbn.kernels.host.ops", reason="built without a compiler", exc_type=ImportError)
explain = kernels.explain.__wrapped__  # asks anew; what this process was told, it keeps


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    assert str(explain()).startswith("Choice(name='host', reason='compiled C++ for")
    monkeypatch.setenv("SYNCBN_KERNELS", "torch")
    assert explain() == ("torch", "SYNCBN_KERNELS=torch")
    monkeypatch.setenv("SYNCBN_KERNELS", "fast")
    with pytest.raises(ValueError, match="SYNCBN_KERNELS must be one of auto, host, torch; received 'fast'"):
        explain()


def test_the_environment_chooses_the_instruction_set(monkeypatch):
    from syncbn.kernels.host import _host

    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    fastest = _host.instruction_set()
    try:
        for name in _host.instruction_sets():
            monkeypatch.setenv("SYNCBN_HOST_ISA", name)
            assert explain() == ("host", f"compiled C++ for {name}, by SYNCBN_HOST_ISA")
            assert _host.instruction_set() == name
        monkeypatch.setenv("SYNCBN_HOST_ISA", "pentium")
        with pytest.raises(
            ValueError, match=r"SYNCBN_HOST_ISA must be one of .*baseline on this .*; received 'pentium'"
        ):
            explain()
    finally:
        _host.use_instruction_set(fastest)


def test_without_compiled_kernels_the_readable_ones_serve(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    assert explain().name == "torch"
    assert explain().reason.startswith("the compiled host kernels were not built")
    monkeypatch.setenv("SYNCBN_KERNELS", "host")
    with pytest.raises(RuntimeError, match="SYNCBN_KERNELS=host needs the compiled host kernels"):
        explain()


def test_a_process_gets_the_kernels_that_its_environment_names():
    done = processes.python("-c", "from syncbn import kernels; print(kernels.explain().name)", SYNCBN_KERNELS="torch")
    assert done.stdout.strip() == "torch", done.stderr


@pytest.mark.builds
def test_a_build_without_a_compiler_succeeds(tmp_path):
    pytest.importorskip("setuptools", reason="the build's own tool")
    for name in ("syncbn", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = processes.ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for built in tmp_path.rglob("*.abi3.so"):
        built.unlink()
    words = [sys.executable, "setup.py", "--quiet", "build", "--build-base", "build"]
    nothing = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    limit = processes.patience(100)
    done = subprocess.run(words, cwd=tmp_path, env=nothing, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "build").rglob("torch_ops.py"))
    assert not list(tmp_path.rglob("*.abi3.so"))
