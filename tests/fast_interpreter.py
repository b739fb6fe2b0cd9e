"""Triton's interpreter with the same results in less time, for a process that does nothing but interpret. But for NaN,
which it gives the bits of a GPU's.

As it is, it puts its own functions in the place of triton.language's anew for every call of a function, for which it
reads all members of the module, and looks for integer overflow by ten operations, of which nothing hears the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_NAN = np.array(0x7FFFFFFF, dtype=np.uint32).view(np.float32)


def patch_once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """_patch_lang that works once for each of the modules that functions see, for good."""
    seen: set[frozenset[int]] = set()

    def patch(fn: Any) -> Any:
        modules = frozenset(id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core))
        if modules not in seen:
            seen.add(modules)
            patch_lang(fn)
        return interpreter._LangPatchScope()

    return patch


def made_once(kind: type) -> Callable[..., None]:
    """The constructor of block types, of which there are few, which computes each once."""
    init, made = kind.__init__, {}

    def construct(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(getattr(size, "value", size) for size in shape))
        if key not in made:
            init(self, element_ty, shape)
            made[key] = dict(self.__dict__)
        self.__dict__.update(made[key])  # it keeps element_ty alive, and with it the id

    return construct


def with_a_gpu_s_nan(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on floats whose NaN has all bits but the sign's, as on a GPU; numpy hands on those of an operand."""

    def compute(self: Any, *operands: Any) -> Any:
        result = operation(self, *operands)
        if result.data.dtype == np.float32 and (nan := np.isnan(result.data)).any():
            result.data = np.where(nan, _NAN, result.data)
        return result

    return compute


def install() -> None:
    tl.block_type.__init__ = made_once(tl.block_type)
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    assert not interpreter.interpreter_builder.options.debug  # with it, overflow would be heard of
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
    builder = interpreter.InterpreterBuilder
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_precise_divf", "create_fma"):
        setattr(builder, name, with_a_gpu_s_nan(getattr(builder, name)))
