# SPDX-License-Identifier: BSD-3-Clause
"""Which batch norm functions the forward of a module calls, read from its bytecode: no source, no call, no import.

The reader follows loads of names and attributes to the values they have now, so ``self.batch_norm``, a layer, is not
``F.batch_norm``, a function. It does not follow values that a call returns.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from typing import Any

import torch
from torch import nn

from syncbn import functional

OURS = "syncbn.functional.sync_batch_norm"
_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (functional.sync_batch_norm, OURS),
    (nn.functional.batch_norm, "F.batch_norm"),
    *(
        (getattr(torch, name), f"torch.{name}")
        for name in ("batch_norm", "native_batch_norm", "batch_norm_stats", "cudnn_batch_norm", "miopen_batch_norm")
    ),
)
_DEPTH = 5
"""How many functions deep the reader goes from forward."""
_TRANSPARENT = frozenset({"CACHE", "PUSH_NULL", "EXTENDED_ARG", "PRECALL", "NOP", "SWAP", "POP_TOP"})
TRAINING_AT = 5
"""Where batch norm functions and operators have their argument ``training``."""
_HAS_PRECALL = "PRECALL" in dis.opmap  # Python 3.11: it takes the arguments from the stack, CALL the function
_UNKNOWN = object()


def batch_norm_calls(module: nn.Module) -> frozenset[str]:
    """Names the batch norm functions that the forward of a module reaches, without those of its submodules."""
    reader = _Reader(module)
    own = vars(module).get("forward", _UNKNOWN)  # a forward that was replaced on the instance
    reader.follow(reader.attribute(module, "forward") if own is _UNKNOWN else own, 0)
    return frozenset(reader.found)


def op_name(target: Any) -> str:
    """Names a batch norm function or operator. Empty for anything else."""
    for function, name in _FUNCTIONS:
        if target is function:
            return name
    is_op = type(target).__module__ == "torch._ops" and isinstance(
        target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    )
    name = str(target).removesuffix(".default") if is_op else ""
    return name if "batch_norm" in name and "backward" not in name else ""


class _Reader:
    """Reads functions from forward on, for one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: set[str] = set()
        self._seen: set[types.CodeType] = set()

    def follow(self, value: Any, depth: int) -> None:
        """Notes a batch norm function; reads a Python function of the user."""
        while isinstance(value, functools.partial):
            value = value.func
        if name := op_name(value):
            self.found.add(name)
            return
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            value = inspect.getattr_static(value, "forward")
        function = _unwrapped(value)
        if function is None or depth > _DEPTH or function.__code__ in self._seen:
            return
        package = (function.__module__ or "").split(".")[0]
        if package in ("torch", "syncbn"):
            return
        code = function.__code__
        self._seen.add(code)
        env = dict(zip(code.co_freevars, map(_content, function.__closure__ or ()), strict=False))
        owner = self._owner(function)
        if owner is not None and code.co_argcount:
            env[code.co_varnames[0]] = self.module
        self._read(code, function.__globals__, env, depth)
        if owner is not None and "super" in code.co_names:
            later = type(self.module).__mro__[type(self.module).__mro__.index(owner) + 1 :]
            self.follow(next((vars(cls)[code.co_name] for cls in later if code.co_name in vars(cls)), None), depth)

    def attribute(self, base: Any, name: str) -> Any:
        """Looks up an attribute without running code of the user."""
        if base is self.module:
            for held in (vars(base), base._parameters, base._buffers, base._modules):
                if name in held:
                    return held[name]
            return inspect.getattr_static(type(base), name, _UNKNOWN)
        if type(base).__module__ == "torch._ops":
            return getattr(base, name, _UNKNOWN)
        if isinstance(base, types.ModuleType):
            return vars(base).get(name, _UNKNOWN)
        return inspect.getattr_static(base, name, _UNKNOWN) if isinstance(base, type) else _UNKNOWN

    def _owner(self, function: types.FunctionType) -> type | None:
        """Returns the class of the module that defines a method."""
        name = function.__code__.co_name
        classes = type(self.module).__mro__
        return next((cls for cls in classes if name in vars(cls) and _unwrapped(vars(cls)[name]) is function), None)

    def _read(self, code: types.CodeType, names: dict[str, Any], env: dict[str, Any], depth: int) -> None:
        """Follows every value that the code loads. ``top`` is the value on top of the stack, if known."""
        top: Any = _UNKNOWN
        imported: Any = _UNKNOWN
        instructions = _instructions(code)
        for at, instruction in enumerate(instructions):
            op, argument = instruction.opname, instruction.argval
            if op in _TRANSPARENT:
                continue
            if op.startswith("STORE_FAST") or op == "STORE_DEREF":
                stored, *loaded = argument if isinstance(argument, tuple) else (argument,)
                env[stored] = top
                top = env.get(loaded[0], _UNKNOWN) if loaded and "LOAD" in op else _UNKNOWN
                continue
            if op == "IMPORT_NAME":
                top = imported = sys.modules.get(argument, _UNKNOWN)
                continue
            if isinstance(argument, types.CodeType):
                self._read(argument, names, env, depth)
            top = self._loaded(op, argument, imported if op == "IMPORT_FROM" else top, names, env)
            has_switch = op_name(top) not in ("", OURS, "torch.batch_norm_stats")
            if not (has_switch and self._needs_no_batch(instructions[at + 1 :], code.co_consts, env)):
                self.follow(top, depth + 1)

    def _loaded(self, op: str, argument: Any, base: Any, names: dict[str, Any], env: dict[str, Any]) -> Any:
        """Returns the value that an instruction loads, if known."""
        if op == "IMPORT_FROM":  # `import a.b as c` names b although a.b is imported by then
            held = self.attribute(base, argument)
            return base if held is _UNKNOWN else held
        if op in ("LOAD_ATTR", "LOAD_METHOD"):
            return self.attribute(base, argument)
        if op == "LOAD_GLOBAL":
            return names.get(argument, _UNKNOWN)
        if op.startswith("LOAD_FAST") or op == "LOAD_DEREF":
            return env.get(argument[-1] if isinstance(argument, tuple) else argument, _UNKNOWN)
        return _UNKNOWN

    def _needs_no_batch(
        self, after: tuple[dis.Instruction, ...], constants: tuple[Any, ...], env: dict[str, Any]
    ) -> bool:
        """Whether a call of a batch norm function has training=False, or standardizes a weight of the module."""
        words = [each for each in after[:8] if each.opname not in _TRANSPARENT]
        of_module = len(words) > 1 and env.get(str(words[0].argval)) is self.module
        if of_module and words[1].opname in ("LOAD_ATTR", "LOAD_METHOD") and words[1].argval in self.module._parameters:
            return True
        return _training_is_false(after, constants)


def _training_is_false(after: tuple[dis.Instruction, ...], constants: tuple[Any, ...]) -> bool:
    """Simulates the stack from the load of a function to its call, as far as there is no branch."""
    stack: list[Any] = []
    keywords: tuple[str, ...] = ()
    for each in after:
        if each.opname == "KW_NAMES":  # before Python 3.13
            keywords = constants[each.arg or 0]
            continue
        is_call = each.opname in (("PRECALL",) if _HAS_PRECALL else ("CALL", "CALL_KW"))
        if is_call and len(stack) == (each.arg or 0) + (each.opname == "CALL_KW"):
            keywords = stack.pop() if each.opname == "CALL_KW" else keywords
            named = dict(zip(reversed(keywords), reversed(stack), strict=False))
            positional = stack[: len(stack) - len(keywords)]
            return named.get("training", positional[TRAINING_AT] if len(positional) > TRAINING_AT else False) is False
        if each.opname in _TRANSPARENT - {"PRECALL", "POP_TOP"}:
            continue
        effect = 0 if "JUMP" in each.opname else dis.stack_effect(each.opcode, each.arg, jump=False)
        if "JUMP" in each.opname or len(stack) + effect < 0:
            return False
        del stack[len(stack) + min(effect, 0) :]
        if effect <= 0 and stack:
            stack[-1] = _UNKNOWN
        stack += [each.argval if each.opname == "LOAD_CONST" else _UNKNOWN] * effect
    return False


@functools.lru_cache(maxsize=4096)
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


def _unwrapped(value: Any) -> types.FunctionType | None:
    """Returns the Python function behind methods, properties and decorators."""
    for _ in range(10):
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, types.FunctionType) and "__wrapped__" in vars(value):
            value = vars(value)["__wrapped__"]
        else:
            break
    return value if isinstance(value, types.FunctionType) else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _UNKNOWN
