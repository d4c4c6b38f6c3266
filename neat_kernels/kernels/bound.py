"""Launches of compiled kernels, found again by a shorter way than Triton's own.

Triton looks at every argument of a call in Python and in C++ to find what it compiled for arguments like these. What it
looks at is little: `_kind`. A call whose arguments have been seen launches what the first such call compiled.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# The compiled kernel and the constants to launch it with, by kernel, device, constants and kinds of arguments.
_COMPILED: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}
_IS_HIP = torch.version.hip is not None


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) on the current device and stream.

    Args:
        kernel: a JIT function; an interpreted one is called as it is.
        grid: one to three numbers.
        arguments: those that are not compiled in, in the kernel's order, before all others.
        constants: tl.constexpr arguments by name, num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **constants)
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, *constants, *constants.values(), *map(_kind, arguments))
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def _kind(argument: Any) -> Hashable:
    """What Triton compiles differently for: of a tensor dtype and alignment, of a number width, 1, and divisibility."""
    if argument is None or isinstance(argument, float):
        return argument is None
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() % 16 == 0
        # On AMD also whether offsets into it fit 32 bits.
        return argument.dtype, aligned, _IS_HIP and argument.untyped_storage().size() < 2**31
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
