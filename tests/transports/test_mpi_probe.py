# SPDX-License-Identifier: BSD-3-Clause
import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from syncbn.transports import mpi_probe


def _mpich(status, flag):
    def query(kind, answer):
        assert kind == mpi_probe.CUDA
        answer._obj.value = flag
        return status

    return SimpleNamespace(MPIX_GPU_query_support=query)


@pytest.mark.parametrize(
    ("library", "takes"),
    [
        (SimpleNamespace(MPIX_Query_cuda_support=lambda: 1), True),
        (SimpleNamespace(MPIX_Query_cuda_support=lambda: 0), False),
        (_mpich(0, 1), True),
        (_mpich(0, 0), False),
        (_mpich(1, 1), False),
        (SimpleNamespace(), False),
    ],
)
def test_gpu_pointers_need_a_clear_yes(monkeypatch, library, takes):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    assert mpi_probe.takes_gpu_pointers("libmpi.so") is takes


def test_a_library_that_is_gone_takes_no_gpu_pointers(tmp_path):
    assert mpi_probe.takes_gpu_pointers(str(tmp_path / "libmpi.so.40")) is False


def test_a_process_beside_finds_the_library_and_joins_it_alone():
    facts = mpi_probe.beside()
    assert facts.error == ""
    assert facts.name in ("Open MPI", "MPICH")
    assert "libmpi" in facts.library
    assert facts.size == 1
    assert facts.gpu_pointers is False  # the wheels of the Python package index are built without CUDA


def test_looking_beside_leaves_this_process_without_mpi():
    code = "import sys; from syncbn.transports import mpi_probe; mpi_probe.beside(); sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_an_mpi_that_aborts_is_an_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(mpi_probe, "__file__", _script(tmp_path, "import os; os.write(2, b'no runtime'); os.abort()"))
    assert mpi_probe.beside().error == "MPI_Init ended the process with status -6: no runtime"


def test_an_mpi_that_hangs_is_an_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(mpi_probe, "__file__", _script(tmp_path, "import time; time.sleep(60)"))
    assert mpi_probe.beside(limit=1).error == "MPI_Init did not return within 1 s"


def test_a_missing_mpi4py_is_an_answer(monkeypatch):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert "mpi4py" in mpi_probe.identify().error
    assert mpi_probe.join() == mpi_probe.identify()


def _script(folder, code):
    path = folder / "probe.py"
    path.write_text(code)
    return str(path)
