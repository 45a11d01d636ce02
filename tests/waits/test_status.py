# SPDX-License-Identifier: BSD-3-Clause
"""What a rank says of itself."""

import ast
import bdb
import gc
import io
import math
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import syncbn
from syncbn.calls import sites
from syncbn.moments import ABSTAINS, Message
from syncbn.waits import status
from syncbn.waits.status import COMPILES, DEBUGGED, ENDED, FILES, Reader, Status, Wait, of_exception

HERE = "tests/waits/test_status.py"


class Group:
    """A transport, as far as the reader looks."""

    def __init__(self, group_id=7, ranks=(0, 1)):
        self.group_id, self.ranks = group_id, ranks
        self.begun, self.current, self.completed, self.patience = 0, None, None, None
        self.failed = self.recent = None

    def enter(self, what, patience=None):
        self.begun += 1
        self.current, self.patience = Message(ABSTAINS, 2, what, -1, self.begun), patience

    def leave(self):
        self.completed, self.current, self.patience = self.current, None, None


def read(reader, seconds=0.5):
    return reader.read(seconds, 30.0)


def the_wait(reader, seconds=0.5):
    (wait,) = read(reader, seconds).waits
    return wait


@pytest.fixture
def group():
    return Group()


@pytest.fixture
def reader(group):
    made = Reader(3)
    made.add(group)
    return made


def where():
    """The line of the user's code of this thread, and what keeps it busy."""
    return status._where(threading.get_ident())[:2]


def test_a_group_without_a_call_is_not_told(reader):
    said = read(reader)
    assert (said.rank, said.limit, said.waits, said.ended) == (3, 30.0, [], None)


def test_the_calls_of_a_group_are_told(reader, group):
    group.enter("World.barrier", math.inf)
    wait = the_wait(reader)
    assert (wait.group, wait.begun, wait.current, wait.completed) == (7, 1, str(group.current), None)
    assert (wait.patience, wait.done) == (math.inf, 0)
    assert "World.barrier" in wait.current
    group.leave()
    wait = the_wait(reader)
    assert (wait.current, wait.done, wait.patience) == (None, 1, None)
    assert "World.barrier" in wait.completed


def test_a_wait_grows_only_while_the_same_call_lasts(reader, group):
    group.enter("World.average")
    assert the_wait(reader, 5.0).waited == 0.0  # it may have begun a moment ago
    assert the_wait(reader, 0.5).waited == 0.5
    assert the_wait(reader, 0.25).waited == 0.75
    group.leave()
    assert the_wait(reader).waited == 0.0
    group.enter("World.average")
    assert the_wait(reader).waited == 0.0
    assert the_wait(reader).waited == 0.5
    group.leave()
    group.enter("World.average")  # between two readings: the same name, another call
    assert the_wait(reader).waited == 0.0


def test_every_reading_has_a_beat_of_its_own(reader):
    assert [read(reader).beat for _ in range(3)] == [1, 2, 3]


def test_a_group_that_is_gone_is_told_no_more(reader, group):
    other = Group(8)
    reader.add(other)
    other.enter("World.average")
    assert [wait.group for wait in read(reader).waits] == [8]
    del other
    gc.collect()
    assert read(reader).waits == []
    assert reader.groups() == [group]


def test_a_status_survives_the_way_as_text():
    said = Status(
        3, 4, math.inf, [Wait(2**62, 5, "a\nb", None, 1.5, math.inf), Wait(1, 1, None, "é", 0.0, None)],
        ("a.py", 3, "f"), COMPILES, "a library", ["'bn'"], ENDED, True, {2: "gone"},
    )  # fmt: skip
    assert "\n" not in said.text()
    assert Status.of_text(said.text()) == said
    assert Status.of_text(Status(0).text()) == Status(0)


def test_the_line_is_that_of_the_users_function():
    line, busy = where()
    assert line[0] == HERE
    assert line[2] == "where"
    assert busy is None


def test_the_main_thread_is_read_from_another_one(reader):
    said = []
    thread = threading.Thread(target=lambda: said.append(read(reader)))
    thread.start()
    thread.join()  # the innermost frame is the library's
    here = sys._getframe().f_lineno
    file, line, function = said[0].line
    assert (file, function) == (HERE, "test_the_main_thread_is_read_from_another_one")
    assert line in (here - 2, here - 1)


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
    assert where()[0][2] == "_where"


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


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no\n  such   file"), "ended with ValueError: no such file"),
        (KeyboardInterrupt(), "ended with KeyboardInterrupt"),
        (RuntimeError("x" * 9999), "ended with RuntimeError: " + "x" * 500),
    ],
)
def test_an_exception_is_a_line(error, text):
    assert of_exception(error) == text


def test_layers_in_eval_mode_are_told_once_they_have_been_in_a_call(reader, group):
    layer = syncbn.name_layers(nn.Sequential(syncbn.SyncBatchNorm(3)))
    layer(torch.randn(4, 3))
    layer.eval()
    assert "'0'" not in read(reader).evaluates  # its group is this process alone
    sites.site_of(layer[0]).module = weakref.ref(layer[0])  # as its first call in a group of several does
    layer.train()
    assert "'0'" not in read(reader).evaluates
    layer.eval()
    assert "'0'" in read(reader).evaluates
    del layer
    gc.collect()
    assert "'0'" not in read(reader).evaluates


def test_layers_may_be_made_while_another_thread_reads():
    ends, errors, interval = threading.Event(), [], sys.getswitchinterval()

    def reads():
        try:
            while not ends.is_set():
                sites.in_eval_mode()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=reads)
    kept = [sites.Site("SyncBatchNorm") for _ in range(300)]
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(300):
            kept.append(sites.Site("SyncBatchNorm"))
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors
