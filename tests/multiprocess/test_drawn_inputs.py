# SPDX-License-Identifier: BSD-3-Clause
"""Whatever a rank passes, by itself or with others: no crash, no wait, and one outcome on all ranks.

hypothesis draws for every rank what it passes, from SYNCBN_TEST_SEED, on all ranks alike: some hundred examples in
``make test``, 3,000 in ``make test-all``, another number of them for SYNCBN_TEST_INPUTS. By hand there are more:

SYNCBN_TEST_INPUTS=10000 SYNCBN_TEST_SEED=7 NPROC=2 launch/mpirun.sh -m pytest --with-mpi -m slow \
    tests/multiprocess/test_drawn_inputs.py
"""

import contextlib
import os
import warnings
import zlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import syncbn
from syncbn.checks import inputs
from syncbn.transports import gather
from syncbn.waits import limits
from tests.multiprocess import drawn
from tests.multiprocess.drawn import C

SEED = int(os.environ.get("SYNCBN_TEST_SEED", "0"))
FEW, MANY = 150, int(os.environ.get("SYNCBN_TEST_INPUTS", "3000"))
CLEAR = (ValueError, TypeError, RuntimeError)

pytestmark = [
    pytest.mark.ranks(2),
    pytest.mark.cpu("the tensors of these cases are on the CPU"),
    pytest.mark.filterwarnings("ignore"),
]


def numbers(part):
    """Runs a test on few examples, and on its part of many."""
    slow = pytest.param(int(part * MANY), marks=[pytest.mark.slow, pytest.mark.timeout(1200)], id="many")
    return pytest.mark.parametrize("examples", [pytest.param(FEW, id="few"), slow])


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    """What hangs is ended with a report, not after five minutes."""
    monkeypatch.setattr(limits, "_given", [20.0])


def for_all(ranks, strategy, examples, check):
    """Runs a check on drawn examples: the same ones on every rank, and as many, since all fail together."""

    @seed(SEED)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # to shrink would be another sequence of calls
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.tuples(*[strategy] * ranks.size))
    def run(example):
        check(ranks, example)

    run()


class Outcomes:
    """What each rank has got from one example, and whether that may be."""

    def __init__(self, ranks, example):
        self.ranks, self.example, self.error, self.numbers = ranks, example, None, []

    @contextlib.contextmanager
    def caught(self):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (Exception, KeyboardInterrupt) as error:
            error.__traceback__ = None
            self.error = error

    def agree(self, *, collective=True, allowed=CLEAR):
        """Fails on every rank unless all drew the same, and raised alike. Collective: two short messages."""
        text = f"{type(self.error).__name__}: {self.error}" if self.error is not None else ""
        text = text.partition(" The library below said")[0]  # MPI refuses the longer message, gloo one of the two
        row = [
            zlib.crc32(repr(self.example).encode("utf-8", "replace")),
            zlib.crc32(text.encode("utf-8", "replace")) if collective else 0,
            self.error is None or (type(self.error) in allowed and bool(str(self.error))),
            *(self.numbers if self.error is None else [0.0] * len(self.numbers)),
        ]
        table = gather.gather(torch.tensor(row, dtype=torch.float64, device="cpu"), self.ranks.transport, "the outcome")
        same = all((column == column[0]).all() for column in table.T)
        if not same or not table[:, 2].all():
            notes = gather.gather_notes(f"{text[:400]} {row[3:]}", self.ranks.transport)
            self.ranks.check(same and bool(table[0, 2]), f"of {self.example}: {notes}")


def bits(t):
    """A number that stands for the bits of a tensor."""
    return 0.0 if t is None else float(zlib.crc32(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()))


def build(call):
    """The layer of one rank."""
    layer = syncbn.SyncBatchNorm(C)
    for name, vector in zip(drawn.VECTOR_NAMES, call.vectors, strict=True):
        if vector is not None:
            made = drawn.make(vector)
            (layer._parameters if name in layer._parameters else layer._buffers)[name] = made
    if call.counter is not None:
        layer._buffers["num_batches_tracked"] = drawn.make(call.counter)
    for name in ("eps", "momentum"):
        if getattr(call, name) is not None:
            setattr(layer, name, drawn.make(getattr(call, name)))
    return layer


def backward(y):
    """A backward on every rank, or on none: all have agreed on whether there is one."""
    if y.grad_fn is not None:
        y.sum().backward()


def check_layer(ranks, example):
    call, seen = example[ranks.rank], Outcomes(ranks, example)
    layer = build(call)
    x = drawn.make(call.x)
    args = (x,) if call.mask is None else (x, drawn.make(call.mask))
    before = dict(layer._buffers)
    before = {name: bits(t) if type(t) is torch.Tensor and readable(t) else 0.0 for name, t in before.items()}
    with seen.caught(), torch.set_grad_enabled(call.grad):
        backward(layer(*args))
    if seen.error is not None:
        after = [bits(t) if type(t) is torch.Tensor and readable(t) else 0.0 for t in layer._buffers.values()]
        if after != list(before.values()):
            seen.error = AssertionError(f"the buffers moved before {seen.error}")
    alike = all(c.vectors[2:] == (None, None) and c.counter is None for c in example)
    seen.numbers = [bits(t) for t in layer._buffers.values()] if alike else []
    seen.agree()


def readable(t):
    with contextlib.suppress(Exception):
        bits(t)
        return t.untyped_storage().nbytes() > 0
    return False


def width(call):
    """C of a call of the function, by which the length of its message is chosen."""
    vectors = dict(zip(drawn.VECTOR_NAMES, (None, None, torch.zeros(C), torch.ones(C)), strict=True))
    given = zip(drawn.VECTOR_NAMES, call.vectors, strict=True)
    vectors |= {name: drawn.make(each) for name, each in given if each is not None}
    return inputs.most_common_width(vectors, drawn.make(call.x))


def check_function(ranks, example):
    call, seen = example[ranks.rank][0], Outcomes(ranks, example)
    if len({width(each) for each, _ in example}) > 1:  # of messages of other lengths, MPI and gloo promise nothing
        return
    group = drawn.GROUPS[example[0][1]](ranks.size)  # the same on all ranks: nobody can know what a wrong one meant
    moved = [torch.zeros(C), torch.ones(C)]
    arguments = dict(zip(drawn.VECTOR_NAMES, (None, None, *moved), strict=True))
    named = {**dict(zip(drawn.VECTOR_NAMES, call.vectors, strict=True)), "num_batches_tracked": call.counter}
    named |= {"eps": call.eps, "momentum": call.momentum, "mask": call.mask}
    arguments |= {name: drawn.make(each) for name, each in named.items() if each is not None}
    x = drawn.make(call.x)
    with seen.caught(), torch.set_grad_enabled(call.grad):
        backward(syncbn.functional.sync_batch_norm(x, process_group=group, **arguments))
    alike = all(c.vectors[2:] == (None, None) for c, _ in example)
    alone = example[0][1] == "alone"
    seen.numbers = [bits(t) for t in moved] if alike and not alone else []
    seen.agree(collective=not alone and not example[0][1].startswith("of no"))  # each rank refuses those by itself


def check_world(ranks, example):
    """All call one method; each rank has arguments of its own."""
    method, seen = example[0][0], Outcomes(ranks, example)
    names = example[ranks.rank][1]
    if method == "within":  # the first use of a group is collective: nobody can know what a wrong one meant
        names = example[0][1]
    arguments, collective, allowed = ARGUMENTS[method](ranks, *names), method not in ("within", "free"), CLEAR
    with seen.caught():
        result = getattr(ranks.world, method)(*arguments)
        if method == "subgroup" and result is not None:
            ranks.world.free(result)
        if method in ("average", "loss_scale"):
            float(result)
        if method == "average":
            seen.numbers = [bits(torch.tensor([result], dtype=torch.float64))]
    if method == "average":
        seen.numbers = seen.numbers or [0.0]
    seen.agree(collective=collective, allowed=allowed)


def number(name):
    return drawn.NON_TENSORS[name]()


ARGUMENTS = {
    "average": lambda ranks, a, b, *_: (number(a), number(b)),
    "loss_scale": lambda ranks, a, *_: (number(a),),
    "barrier": lambda ranks, a, *_: (number(a),),
    "subgroup": lambda ranks, a, *_: (number(a),),
    "raise_together": lambda ranks, a, b, c, d, e: ({**drawn.NON_TENSORS, **drawn.ERRORS}[c](),),
    "average_gradients": lambda ranks, a, b, c, d, e: ({**drawn.NON_TENSORS, **drawn.MODULES}[d](),),
    "broadcast": lambda ranks, a, b, c, d, e: ({**drawn.NON_TENSORS, **drawn.MODULES}[d](), number(b)),
    "within": lambda ranks, a, b, c, d, e: (drawn.GROUPS[e](ranks.size),),
    "free": lambda ranks, a, b, c, d, e: (drawn.GROUPS[e](ranks.size),),
}


GOOD_NUMBERS, NUMBERS = ["1", "2", "0.5", "tensor"], list(drawn.NON_TENSORS)
WORLD_CALLS = st.tuples(
    st.sampled_from(list(ARGUMENTS)),
    st.tuples(
        drawn.mostly(GOOD_NUMBERS, NUMBERS),
        drawn.mostly(["1", "0", "2"], NUMBERS),
        drawn.mostly(["None"], [*drawn.NON_TENSORS, *drawn.ERRORS]),
        drawn.mostly(["linear", "no gradients"], [*drawn.NON_TENSORS, *drawn.MODULES]),
        st.sampled_from([each for each in drawn.GROUPS if each != "blocks of all"]),
    ),
)


@numbers(0.4)
def test_whatever_a_layer_is_given_the_ranks_end_alike(ranks, examples):
    for_all(ranks, drawn.LAYER_CALLS, examples, check_layer)


@numbers(0.3)
def test_whatever_the_function_is_given_the_ranks_end_alike(ranks, examples):
    groups = drawn.mostly(["None"], drawn.GROUPS)
    for_all(ranks, st.tuples(drawn.FUNCTION_CALLS, groups), examples, check_function)


@numbers(0.3)
def test_whatever_the_world_is_given_the_ranks_end_alike(ranks, examples):
    for_all(ranks, WORLD_CALLS, examples, check_world)
