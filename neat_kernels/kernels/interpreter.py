"""Make Triton's interpreter right for bf16, which it computes on as if the bit patterns were integers.

With TRITON_INTERPRET=1 kernels run on CPU tensors as numpy code. There `tl.dot`, arithmetic and reductions on bf16 work
on uint16 patterns, and casts to bf16 truncate. Inside `faithful`, dots and casts are right and bf16 arithmetic is
refused, so that a kernel either computes what a GPU would or raises. Checked with triton 3.6.0, 3.7.1 and 3.9.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(data: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as GPUs do; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _create_dot(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if _is_bf16(a) and _is_bf16(b):
            return interpreter.TensorHandle(np.matmul(_widen(a.data), _widen(b.data)) + d.data, d.dtype.scalar)
        return original(self, a, b, d, *rest)

    return create_dot


def _cast(original: Any) -> Any:
    def cast(self: Any, src: Any, dst_type: Any, *rounding_mode: Any) -> Any:
        target = dst_type.scalar
        if _is_bf16(src) and target != tl.bfloat16:
            wide = interpreter.TensorHandle(_widen(src.data), tl.float32)
            return wide if target == tl.float32 else original(self, wide, dst_type, *rounding_mode)
        if target == tl.bfloat16 and not _is_bf16(src):
            return interpreter.TensorHandle(_round_to_bf16(src.data.astype(np.float32)), target)
        return original(self, src, dst_type, *rounding_mode)

    return cast


def _refuse_bf16(original: Any) -> Any:
    def operation(self: Any, first: Any, *rest: Any) -> Any:
        if _is_bf16(first) and rest[-1] not in _BITWISE:
            raise TypeError("the interpreter has no bf16 arithmetic: cast the tile to fp32 first")
        return original(self, first, *rest)

    return operation


def _refuse_bf16_reduction(original: Any) -> Any:
    def check_tensor(self: Any, tensors: Any) -> None:
        original(self, tensors)
        if any(t.dtype == tl.bfloat16 for t in tensors):
            raise TypeError("the interpreter has no bf16 reductions: cast the tile to fp32 first")

    return check_tensor


def _index_any_scalar(original: Any) -> Any:
    # triton 3.6 turns a runtime loop bound into an index in a way that numpy >= 2.4 refuses.
    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    return patch


@contextlib.contextmanager
def faithful() -> Iterator[None]:
    """Inside, interpreted kernels treat bf16 as a GPU does; nothing of Triton's stays changed outside."""
    builder = interpreter.InterpreterBuilder
    changes: list[tuple[Any, str, Any]] = [
        (builder, "create_dot", _create_dot),
        (builder, "cast_impl", _cast),
        (builder, "create_fp_to_fp", _cast),
        (builder, "binary_op", _refuse_bf16),
        (builder, "unary_op", _refuse_bf16),
        (builder, "create_fma", _refuse_bf16),
        (interpreter.ReduceScanOpInterface, "check_tensor", _refuse_bf16_reduction),
        (interpreter, "_patch_lang_tensor", _index_any_scalar),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    for (owner, name, replace), (_, _, original) in zip(changes, before, strict=True):
        setattr(owner, name, replace(original))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
