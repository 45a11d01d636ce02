# SPDX-License-Identifier: BSD-3-Clause
"""Inputs that hypothesis draws: plain descriptions, equal on every rank, and how to make them.

N batch, C channels, L length.

A description holds names and numbers alone, so that every rank draws those of all ranks and makes its own.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from syncbn.transports.groups import ALONE, GroupSpec

C = 3


class Evil:
    """Raises whatever is asked of it."""

    def _raise(self, *args):
        raise KeyError("nothing may be asked of this")

    __repr__ = __str__ = __float__ = __index__ = __bool__ = __eq__ = __gt__ = __lt__ = __ge__ = __le__ = _raise
    __hash__ = object.__hash__


class EvilError(ValueError):
    def __str__(self):
        raise KeyError("no text")


class Unknown(torch.Tensor):
    """Of a kind that no check knows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("double", "sum", "item", "reshape"):
            raise NotImplementedError("not of this kind")
        return super().__torch_function__(func, types, args, kwargs or {})


class Derived(torch.Tensor):
    pass


class EvilModule(nn.Module):
    def named_parameters(self, *args, **kwargs):
        raise KeyError("no parameters")


class Drawn(NamedTuple):
    """A tensor."""

    kind: str
    dtype: str
    shape: tuple
    values: str
    grad: bool

    def make(self):
        """Makes it. What torch cannot make of a kind, dtype and shape is a plain tensor."""
        dtype, plain = getattr(torch, self.dtype), VALUES[self.values](torch.ones(self.shape))
        plain = (plain + torch.arange(plain.numel()).view(self.shape) % 7).to(dtype)
        try:
            made = KINDS[self.kind](plain)
        except Exception:
            made = plain
        if self.grad and made.dtype.is_floating_point and made.is_leaf:
            made = made.detach().requires_grad_() if not made.is_inference() else made
        return made


def _cut(t):
    t.untyped_storage().resize_(0)
    return t


def _inference(t):
    with torch.inference_mode():
        return t + 0


VALUES = {
    "ones": lambda t: t,
    "nan": lambda t: t * float("nan"),
    "inf": lambda t: t * float("inf"),
    "huge": lambda t: t * 3e38,
    "tiny": lambda t: t * 1e-45,
    "mean 1e4": lambda t: t * 1e4,
}
KINDS = {
    "plain": lambda t: t,
    "expanded": lambda t: t[:1].expand(t.shape),
    "one value": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape),
    "every other": lambda t: torch.stack((t, t), -1)[..., 0],
    "far apart": lambda t: torch.empty_strided(t.shape, [2**14 // (i + 1) for i in range(t.dim())]).copy_(t),
    "overlapping": lambda t: torch.cat((t.flatten(), t.flatten())).as_strided(t.shape, [1] * t.dim()),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "behind an offset": lambda t: torch.cat((t, t))[len(t) :],
    "negated view": torch._neg_view,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:1]]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones(t.shape, dtype=torch.bool)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "unknown": lambda t: t.as_subclass(Unknown),
    "derived": lambda t: t.as_subclass(Derived),
    "parameter": nn.Parameter,
    "inference": _inference,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "cut": _cut,
}
NON_TENSORS = {
    "None": lambda: None,
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "surrogate": lambda: "a file \udcff",
    "list": lambda: [1.0, 2.0],
    "dict": lambda: {"a": 1},
    "object": object,
    "evil": Evil,
    "type": lambda: int,
    "function": lambda: len,
    "array": lambda: np.ones((2, 3), np.float32),
    "number of numpy": lambda: np.float32(2),
    "module": lambda: nn.Linear(2, 2),
    "range": lambda: range(3),
    "complex": lambda: 1j,
    "True": lambda: True,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "-1": lambda: -1,
    "0.5": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1e-300": lambda: 1e-300,
    "beyond float": lambda: 10**400,
    "beyond text": lambda: 10**5000,
    "tensor": lambda: torch.tensor(0.25),
    "two values": lambda: torch.ones(2),
    "integers": lambda: torch.tensor([1, 2]),
    "meta": lambda: torch.ones((), device="meta"),
    "unknown tensor": lambda: torch.ones(()).as_subclass(Unknown),
}
ERRORS = {
    "ValueError": lambda: ValueError("a value"),
    "TypeError": lambda: TypeError("a type"),
    "KeyError": lambda: KeyError("a key"),
    "OSError": lambda: OSError(2, "No such file", "a\udcffb"),
    "without text": ValueError,
    "NUL": lambda: ValueError("\0\0"),
    "long": lambda: ValueError("é" * 5000),
    "EvilError": EvilError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
}


def _with_gradients(model, kind=lambda t: t):
    for p in model.parameters():
        p.grad = kind(torch.ones_like(p))
    return model


def _of_parameters(*tensors):
    model = nn.ParameterList(tensors)
    return model


MODULES = {
    "linear": lambda: _with_gradients(nn.Linear(2, 2)),
    "no gradients": lambda: nn.Linear(2, 2),
    "wider": lambda: _with_gradients(nn.Linear(3, 2)),
    "double": lambda: _with_gradients(nn.Linear(2, 2).double()),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
    "sparse": lambda: _with_gradients(nn.Linear(2, 2), lambda t: t.to_sparse()),
    "lazy": lambda: nn.LazyLinear(2),
    "meta": lambda: _with_gradients(nn.Linear(2, 2, device="meta")),
    "empty": nn.Sequential,
    "evil": EvilModule,
    "complex": lambda: _with_gradients(_of_parameters(torch.zeros(2, dtype=torch.complex64))),
    "cut": lambda: _of_parameters(nn.Parameter(_cut(torch.ones(3)))),
    "half": lambda: _with_gradients(nn.Linear(2, 2).bfloat16()),
    "norm": lambda: nn.BatchNorm1d(3),
}
GROUPS = {
    "None": lambda W: None,
    "text": lambda W: "everyone",
    "number": lambda W: 3,
    "object": lambda W: object(),
    "evil": lambda W: Evil(),
    "alone": lambda W: ALONE,
    "of no kind": lambda W: GroupSpec("weird", ()),
    "of no job": lambda W: GroupSpec("mpi", (0, 99)),
    "of no job over torch": lambda W: GroupSpec("torch", (0, 99)),
    "blocks of 7": lambda W: GroupSpec("blocks", (), size=7),
    "blocks of all": lambda W: GroupSpec("blocks", (), size=W),
    "blocks of -1": lambda W: GroupSpec("blocks", (), size=-1),
}

DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64", "float8_e4m3fn"]
_SHAPES = [(4, C), (1, C), (0, C), (2, C, 5), (3, C, 0), (4, C + 2), (), (C,), (2, 0), (1, C, 1, 1), (2, C, *[1] * 31)]


def mostly(good, others):
    """One of the first in three of four cases, in one draw: to draw is what takes longest here."""
    good, others = list(good), list(others)
    return st.sampled_from([each for each in good for _ in range(-(-3 * len(others) // len(good)))] + others)


def tensors(shapes, *, dtypes=("float32",), kinds=("plain",)):
    """Tensors, most of which are good."""
    return st.builds(
        Drawn,
        mostly(kinds, KINDS),
        mostly(dtypes, DTYPES),
        mostly(shapes[:4], shapes),
        mostly(["ones"], VALUES),
        st.booleans(),
    )


GOOD = st.builds(
    Drawn,
    st.sampled_from(["plain", "channels last", "every other", "behind an offset", "expanded"]),
    st.just("float32"),
    st.sampled_from([(4, C), (2, C, 5), (1, C, 1), (0, C)]),
    st.just("ones"),
    st.booleans(),
)
INPUTS = st.one_of(GOOD, tensors(_SHAPES), st.sampled_from(list(NON_TENSORS)))
VECTORS = tensors([(C,)] * 4 + [(C + 2,), (), (C, 1), (0,), (1,)])
COUNTERS = tensors([()] * 4 + [(1,), (2,), (0,)], dtypes=("int64",))
MASKS = tensors([(4,), (2, 5), (2, 1, 5), (0,), (1, 1), (4, C), ()], dtypes=("bool", "float32"))
NUMBERS = st.sampled_from(list(NON_TENSORS))
VECTOR_NAMES = ("weight", "bias", "running_mean", "running_var")


def make(drawn: Any):
    """Makes what a description stands for: a tensor, or one of NON_TENSORS by its name."""
    return drawn.make() if isinstance(drawn, Drawn) else NON_TENSORS[drawn]()


def _rarely(strategy):
    """None, for what is left as it is, in four of five cases."""
    return st.one_of(*[st.none()] * 4, strategy)


class Call(NamedTuple):
    """A call of a layer or of the function on one rank; None leaves an argument as it is."""

    x: Any
    mask: Any
    vectors: tuple
    counter: Any
    eps: Any
    momentum: Any
    grad: bool


def _calls(vectors):
    return st.builds(
        Call,
        INPUTS,
        _rarely(st.one_of(MASKS, NUMBERS)),
        st.tuples(*[_rarely(vectors) for _ in VECTOR_NAMES]),
        _rarely(st.one_of(COUNTERS, st.just("None"))),
        _rarely(NUMBERS),
        _rarely(NUMBERS),
        st.integers(0, 9).map(bool),
    )


LAYER_CALLS = _calls(st.one_of(VECTORS, st.just("None")))
FUNCTION_CALLS = _calls(st.one_of(VECTORS, NUMBERS))
