# SPDX-License-Identifier: BSD-3-Clause
import subprocess
import sys

from syncbn.transports import mpi_probe


def test_a_process_beside_finds_the_library_and_joins_it_alone():
    facts = mpi_probe.beside()
    assert facts.error == ""
    assert facts.name in ("Open MPI", "MPICH")
    assert "libmpi" in facts.library
    assert facts.size == 1


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
