# SPDX-License-Identifier: BSD-3-Clause
"""The line of the user's that a rank is at, and what keeps it busy."""

import ast
import bdb
import io
import sys
import threading

import pytest
import torch

import syncbn
from syncbn.waits import status
from syncbn.waits.status import COMPILES, DEBUGGED, FILES

HERE = "tests/waits/test_where.py"


def where():
    """The line of the user's code of this thread, and what keeps it busy."""
    return status._where(threading.get_ident())[:2]


def test_the_line_is_that_of_the_users_function():
    line, busy = where()
    assert line[0] == HERE
    assert line[2] == "where"
    assert busy is None


def test_a_function_that_a_library_calls_is_the_users():
    class Visitor(ast.NodeVisitor):
        def visit_Name(self, node):
            self.found = where()[0], sys._getframe(1).f_code.co_filename

    visitor = Visitor()
    visitor.visit(ast.parse("x"))
    line, caller = visitor.found
    assert caller.endswith("/ast.py")
    assert line[0] == HERE


def run_as(filename, text="found = where()"):
    """Runs a text as if it stood in a file."""
    names = {"where": lambda: status._where(threading.get_ident())[:2]}
    names["where"].__code__ = names["where"].__code__.replace(co_filename=status.__file__)
    exec(compile(text, filename, "exec"), names)
    return names["found"]


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("<string>", "<string>"),  # python -c
        ("<stdin>", "<stdin>"),
        ("/somewhere/else/train.py", "/somewhere/else/train.py"),
        (f"{status._HERE}examples/train.py", "examples/train.py"),
    ],
)
def test_the_users_code_is_anywhere(filename, shown):
    assert run_as(filename)[0] == (shown, 1, "<module>")


@pytest.mark.parametrize(
    "filename",
    [
        ast.__file__,
        torch.__file__,
        syncbn.__file__,
        "<frozen runpy>",
        "/home/someone/.local/lib/python3.11/site-packages/torch/nn/modules/module.py",
        "/usr/lib/python3/dist-packages/numpy/core.py",
        "/tmp/torchinductor_someone/ab/cab.py",
    ],
)
def test_libraries_and_what_compilers_write_are_not_the_users(filename):
    line, _ = run_as(filename)
    assert line[0] == HERE  # the next frame outwards that is the user's


def test_without_any_line_of_the_users_the_innermost_one_is_told(monkeypatch):
    monkeypatch.setattr(status, "_about", lambda name: (False, None, None))
    assert where()[0][2] == "_stack"


def test_a_thread_that_has_ended_has_no_line():
    assert status._where(None) == (None, None, None)


@pytest.mark.parametrize(
    ("filename", "busy"),
    [
        ("/venv/lib/torch/_dynamo/convert_frame.py", COMPILES),
        ("/venv/lib/torch/_inductor/compile_fx.py", COMPILES),
        ("/venv/lib/torch/utils/cpp_extension.py", COMPILES),
        ("/venv/lib/torch/distributed/checkpoint/state_dict_saver.py", FILES),
        ("/usr/lib/python3.11/pdb.py", DEBUGGED),
        ("/home/someone/pydevd/_pydevd_bundle/pydevd_frame.py", DEBUGGED),
        ("/venv/lib/torch/_inductor/output_code.py", None),  # runs a graph that is compiled already
        ("/venv/lib/torch/_dynamo/eval_frame.py", None),
        ("/home/someone/my_pdb.py", None),
        ("/home/someone/train.py", None),
    ],
)
def test_what_keeps_a_rank_busy_is_told_by_its_frames(filename, busy):
    assert run_as(filename)[1] == busy


class Probe(io.BytesIO):
    """A file that asks where the thread is."""

    def write(self, data):
        self.found = where()
        return super().write(data)

    def read(self, *size):
        self.found = where()
        return super().read(*size)


def test_saving_and_loading_a_checkpoint_keeps_a_rank_busy():
    file = Probe()
    torch.save({"weight": torch.ones(3)}, file)
    assert file.found[1] == FILES
    file.seek(0)
    torch.load(file, weights_only=False)
    assert file.found[1] == FILES


def test_a_debugger_of_pythons_keeps_a_rank_busy():
    class Debugger(bdb.Bdb):
        found = None

        def user_line(self, frame):
            self.found = where()

    debugger, before = Debugger(), sys.gettrace()
    try:
        debugger.runcall(lambda: 1 + 1)
    finally:
        sys.settrace(before)
    assert debugger.found[1] == DEBUGGED


def test_a_debugger_from_outside_keeps_a_rank_busy(monkeypatch, tmp_path):
    found = tmp_path / "status"
    monkeypatch.setattr(status, "Path", lambda name: found)
    found.write_text("Name:\tpython\nTracerPid:\t0\nUid:\t0\n")
    assert where()[1] is None
    found.write_text("Name:\tpython\nTracerPid:\t4711\nUid:\t0\n")
    assert where()[1] == DEBUGGED
    found.unlink()  # another system
    assert where()[1] is None


@pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="from Python 3.12 on")
def test_a_debugger_of_sys_monitoring_keeps_a_rank_busy():
    sys.monitoring.use_tool_id(sys.monitoring.DEBUGGER_ID, "test")
    try:
        assert where()[1] == DEBUGGED
    finally:
        sys.monitoring.free_tool_id(sys.monitoring.DEBUGGER_ID)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiling_keeps_a_rank_busy_and_a_compiled_graph_does_not():
    found = []

    def backend(graph, inputs):
        found.append(where()[1])
        return graph.forward

    torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(3))
    assert found == [COMPILES]

    @torch.library.custom_op("syncbn_test::where", mutates_args=())
    def probe(x: torch.Tensor) -> torch.Tensor:
        found.append(where())
        return x.clone()

    probe.register_fake(torch.empty_like)
    compiled = torch.compile(lambda x: torch.ops.syncbn_test.where(x * 2) + 1)
    for _ in range(2):
        compiled(torch.ones(3))
    (line, busy) = found[-1]
    assert busy is None
    assert line[0] == HERE
