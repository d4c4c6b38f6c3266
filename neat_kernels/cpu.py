"""Products of a tall matrix with a narrow one on a CPU, by csrc: where it was built and the CPU has AVX-512.

a·b [M,r] and pᵀ·a [r,K], fp32 sums of fp32, bf16 or fp16 a [M,K] and fp32 b [K,r] or p [M,r]

a is read once, and nothing of its size is written. Torch's threads do the work. A sum does not depend on their number.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Where there is less, torch's own product takes no longer: csrc's tile is 12 rows by 16 columns.
LEAST_WORK, LEAST_ROWS, LEAST_COLUMNS = 1 << 17, 8, 2


class _Library(NamedTuple):
    rows_times: Callable[..., int]
    transposed_times: Callable[..., int]
    # Kept, since it holds what parallel_for points to.
    torch_library: ctypes.CDLL
    parallel_for: ctypes.c_void_p


def obstacle() -> str | None:
    """Why csrc does not run in this process, or None."""
    return None if isinstance(_loaded(), _Library) else str(_loaded())


def takes(a: Tensor, narrow: Tensor) -> bool:
    """Whether csrc multiplies these: on a CPU, rows or columns of a contiguous, and enough work to be worth a call.

    csrc reads memory as it stands: every other layout and a lazy negation are left to torch.
    """
    return (
        a.is_cpu
        and narrow.is_cpu
        and a.dtype in _DTYPES
        and a.layout == torch.strided
        and not (a.is_neg() or narrow.is_neg())
        and narrow.dtype != torch.float64
        and a.numel() * narrow.shape[1] >= LEAST_WORK
        and min(a.shape) >= LEAST_ROWS
        and narrow.shape[1] >= LEAST_COLUMNS
        and 1 in a.stride()
        and isinstance(_loaded(), _Library)
    )


def rows_times(a: Tensor, b: Tensor) -> Tensor:
    """a·b.

    Args:
        a: [M,K] in float32, bfloat16 or float16, its rows or its columns contiguous.
        b: [K,r], any float dtype but float64.

    Returns:
        [M,r] in float32, contiguous.

    Raises:
        ValueError: b has another number of rows.
    """
    if a.stride(1) != 1:
        return transposed_times(a.t(), b).t().contiguous()
    return _run(_library().rows_times, a, b, a.shape[1], (a.shape[0], b.shape[1]))


def transposed_times(a: Tensor, p: Tensor) -> Tensor:
    """pᵀ·a.

    Args:
        a: [M,K] in float32, bfloat16 or float16, its rows or its columns contiguous.
        p: [M,r], any float dtype but float64.

    Returns:
        [r,K] in float32, contiguous.

    Raises:
        ValueError: p has another number of rows.
    """
    if a.stride(1) != 1:
        return rows_times(a.t(), p).t().contiguous()
    return _run(_library().transposed_times, a, p, a.shape[0], (p.shape[1], a.shape[1]))


def _run(function: Callable[..., int], a: Tensor, narrow: Tensor, terms: int, shape: tuple[int, int]) -> Tensor:
    # An operator may be called without the checks of functional, and csrc would read past the end.
    if narrow.shape[0] != terms:
        raise ValueError(f"expected {terms} rows to multiply with a of {tuple(a.shape)}, got {tuple(narrow.shape)}")
    narrow, out = narrow.to(torch.float32).contiguous(), a.new_empty(shape, dtype=torch.float32)
    status = function(
        _library().parallel_for, _DTYPES[a.dtype], a.data_ptr(), a.stride(0), *a.shape,
        narrow.data_ptr(), narrow.shape[1], out.data_ptr(),
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"torch_parallel_for of torch {torch.__version__} failed with status {status}")
    return out


def _library() -> _Library:
    library = _loaded()
    assert isinstance(library, _Library), library
    return library


@functools.cache
def _loaded() -> _Library | str:
    """The library, or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return f"csrc needs a CPU with AVX-512, and torch reports {capability}"
    spec = importlib.util.find_spec("neat_kernels._csrc")
    if spec is None or spec.origin is None:
        return "csrc was not built; installing from source on Linux with a C++ compiler builds it"
    try:
        # The module stands for every library that it is linked to, wherever a distribution puts libtorch_cpu.so.
        built, torch_library = ctypes.CDLL(spec.origin), ctypes.CDLL(torch._C.__file__)
        parallel_for = ctypes.cast(torch_library.torch_parallel_for, ctypes.c_void_p)
        functions = built.neat_rows_times, built.neat_transposed_times
    except (OSError, AttributeError) as error:
        return f"csrc could not be loaded: {error}"
    for function in functions:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer, ctypes.c_int32, pointer, size, size, size, pointer, size, pointer]
        function.restype = ctypes.c_int32
    return _Library(*functions, torch_library, parallel_for)
