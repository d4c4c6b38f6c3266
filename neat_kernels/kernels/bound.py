"""Launches prepared once for shapes that were seen before: what is left to do for a call is to pass its tensors.

The host code of a stage is in two parts. A function under `prepared` turns shapes, strides and options into a `Bound`
launch, and is looked up by them; the launcher allocates and passes tensors. Triton looks at every argument of a call in
Python and in C++ to find what it compiled for arguments like these; of tensors that is dtype and alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_IS_HIP = torch.version.hip is not None
_T = TypeVar("_T")
_PREPARED: list[Any] = []


def prepared(function: Callable[..., _T]) -> Callable[..., _T]:
    """`function`, whose last results are kept by its hashable arguments until `forget`.

    1,024 of them: batches of so many sizes, each a few hundred bytes.
    """
    cached = functools.lru_cache(maxsize=1024)(function)
    _PREPARED.append(cached)
    return cached


def forget() -> None:
    """Prepare everything anew, since something changed that is no argument of what prepares: a launch configuration."""
    for cached in _PREPARED:
        cached.cache_clear()


class Bound:
    """kernel[grid](tensors..., numbers..., constants...) on the current device and stream, but for the tensors.

    Args:
        kernel: a JIT function; an interpreted one is called as it is.
        grid: one to three numbers; where one is 0, nothing is launched.
        numbers: the arguments that follow the tensors, and are not compiled in.
        constants: tl.constexpr arguments by name, num_warps and num_stages.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_kernel", "_numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        # A compiled kernel, and the arguments of its launch before and after the tensors, by device and kinds of
        # tensors.
        self._compiled: dict[Hashable, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor | TensorDescriptor | None) -> None:
        """Launch with `tensors`, which the kernel has before all other arguments."""
        if 0 in self._grid:
            return
        if not isinstance(self._kernel, JITFunction):
            self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
            return
        active = driver.active
        device = active.get_current_device()
        # What Triton compiles differently for, a tensor's dtype and alignment, and what a launch passes. Of a tensor
        # that is the address: a tensor's own Triton has the driver look up, and asks the tensor for it once more.
        kinds: list[Hashable] = [device]
        passed: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                kinds.append(None)
                passed.append(None)
            elif isinstance(tensor, TensorDescriptor):
                kinds.append(tensor.base.dtype)
                passed.append(tensor)
            else:
                address = _address(tensor)
                kinds.append(tensor.dtype if address % 16 == 0 else (tensor.dtype, "unaligned"))
                if _IS_HIP:
                    # On AMD also whether offsets into it fit 32 bits.
                    kinds.append(tensor.untyped_storage().size() < 2**31)
                passed.append(address)
        key = tuple(kinds)
        found = self._compiled.get(key)
        if found is None:
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            rest = (*self._numbers, *(self._constants[name] for name in names))
            self._compiled[key] = compiled, (compiled.function, compiled.packed_metadata, None, None, None), rest
            return
        compiled, first, rest = found
        stream = active.get_current_stream(device)
        if _is_watched():
            compiled[self._grid](*passed, *rest, stream=stream)
        else:
            compiled.run(*self._grid, stream, *first, *passed, *rest)


# Where a tensor lies.
_address = Tensor.data_ptr


def _is_watched() -> bool:
    """Whether somebody hooks into launches, as Triton's profiler does.

    Triton calls the hooks where there are none, too, and makes metadata for them: three calls of Python a launch.
    """
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True))


class Described:
    """Tensor descriptors of matrices of one layout, contiguous along the rows: checked once, then made unchecked."""

    __slots__ = ("_fields",)

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int], stride: int, block_shape: tuple[int, int]) -> None:
        # Of a tensor that holds nothing: to keep a real one would keep its memory.
        like = torch.empty((0,), dtype=dtype)
        self._fields = vars(TensorDescriptor(like, list(shape), [stride, 1], list(block_shape)))

    def __call__(self, base: Tensor) -> TensorDescriptor:
        """The descriptor of the memory of `base`, which must hold such a matrix and be 16-byte aligned."""
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._fields, base=base)
        return descriptor
